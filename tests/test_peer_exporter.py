"""Head to head with transformers' own ONNX exporter, which it has since 5.24: what the two write of one PaliGemma.

What README.md says of that exporter is shown here for the version that is installed. If a later one does better, a test
fails, and the sentence has to go.
"""

import numpy as np
import onnx
import pytest
import torch

from export import bundle
from export.session import Session
from numpy_ref import checkpoint

from . import make_goldens

exporters = pytest.importorskip("transformers.exporters", reason="transformers has its exporter from 5.24 on")

PREFIX = make_goldens.PREFIXES[0]
BUDGET = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def model():
    """A random PaliGemma 1: version 2 has soft caps, and its attention is not fused by that exporter."""
    return make_goldens.build("gemma", text={"head_dim": 16})


def asked(model):
    ids = torch.tensor([make_goldens.row_ids(model.config, PREFIX)])
    pixel_values = torch.from_numpy(make_goldens.pixels(model.config, 1))
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "pixel_values": pixel_values, "attention_mask": ones, "token_type_ids": ones * 0}


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected(model):
    """transformers' logits after the prompt."""
    return model(**asked(model)).logits[0, -1].numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_theirs(model, expected, tmp_path):
    """The graphs that it writes for ONNX Runtime's CPU provider, and the logits that they give."""
    from transformers.exporters.utils import decompose_for_generation

    config = exporters.OnnxConfig(ort_fusions="cpu")
    exported = exporters.OnnxExporter().export_for_generation(model, asked(model), config)
    exported.save_pretrained(tmp_path)

    # No vision tower, and weights for each graph: those of the decoder, and the table, twice.
    assert set(exported.components) == {"language_model", "lm_head", "decode"}
    graphs = {
        name: onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph for name in exported.components
    }
    assert not any("pixel" in value.name for graph in graphs.values() for value in graph.input)
    sizes = {file.stem.removesuffix(".onnx"): file.stat().st_size for file in tmp_path.glob("*.onnx.data")}
    assert set(sizes) == set(graphs)
    assert sizes["decode"] > sizes["language_model"] > sum(sizes.values()) / 3

    # Its cache is a new one at every step: what comes out is longer than what went in.
    def lengths(values, side):
        shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
        return {name.removeprefix(side): dim[2].dim_value for name, dim in shapes.items() if name.startswith(side)}

    past, present = lengths(graphs["decode"].input, "input.cache"), lengths(graphs["decode"].output, "output.cache")
    assert len(past) == 2 * model.config.text_config.num_hidden_layers
    assert present == {name: length + 1 for name, length in past.items()}

    inputs = decompose_for_generation(model, asked(model))["language_model"][1]
    hidden = exported.runners["language_model"](**inputs)["last_hidden_state"]
    error = relative(exported.runners["lm_head"](input=hidden)[0, -1].numpy(), expected)
    fused = [node for node in graphs["language_model"].node if node.op_type == "GroupQueryAttention"]
    # PaliGemma's prefix is bidirectional, and GroupQueryAttention is causal unless it is told not to be.
    assert fused
    assert all(attribute.name != "causal" for node in fused for attribute in node.attribute)
    assert error > 0.2, f"its fused PaliGemma 1 is right now ({error:.1e}): say so in README.md"


def test_ours(model, expected, tmp_path):
    """The same model as a bundle."""
    model.save_pretrained(tmp_path / "hf")
    bundle.write(checkpoint.load(tmp_path / "hf"), tmp_path / "bundle")
    opened = bundle.load(tmp_path / "bundle")
    files = {file.name for file in opened.path.iterdir()}
    assert files >= {"prefill.onnx", "decode.onnx", "weights.bin", "preprocess.onnx", "sample.onnx", "example.json"}
    ids = asked(model)["input_ids"].numpy()
    length = np.array([ids.shape[1]], np.int32)
    logits, _ = Session(opened, "cpu").prefill(asked(model)["pixel_values"].numpy(), ids, length, ids.shape[1] + 1)
    assert relative(logits[0], expected) < BUDGET
