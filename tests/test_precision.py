"""Half-precision bundles, the plan, the disk, and that verification can fail."""

import json
import re

import numpy as np
import onnx
import pytest

from export import bundle, verify
from export.cli import export_onnx
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import synthetic
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

from .make_goldens import GOLDEN
from .models import CONFIGS, random_params

NAMES = ["paligemma1", "paligemma2"]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_verified_export(name, precision, tmp_path, capsys):
    """Part by part in every precision; end to end where this machine has the kernels."""
    assert (
        export_onnx([str(GOLDEN / name), "--output", str(tmp_path / "out"), "--precision", precision, "--verify"]) == 0
    )
    rows = json.loads((tmp_path / "out" / "bundle.json").read_text())["parity"]
    parts = {(row["stage"], row["part"]) for row in rows}
    config = checkpoint.load_config(GOLDEN / name)
    for i in range(config.text.depth):
        assert {(stage, f"text.blocks.{i}") for stage in ("prefill", "decode", "extend")} <= parts
    assert (("end to end", "decode 4 logits") in parts) == (precision != "bfloat16")
    assert (("end to end", "extend logits") in parts) == (precision != "bfloat16")
    assert all(row["error"] <= row["budget"] for row in rows)
    assert "text.blocks.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_keeps_the_stream_in_float32(name, tmp_path):
    """Norms, the residual additions, rotation, softmax and logits are float32; products are in half precision."""
    config = CONFIGS[name]
    loaded = checkpoint.Checkpoint(tmp_path, config, random_params(config), np.dtype("f8"))
    bundle.write(loaded, tmp_path / "out", "bfloat16")
    for graph in ("prefill", "decode", "extend"):
        model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out" / f"{graph}.onnx"))
        dtypes = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
        half = onnx.TensorProto.BFLOAT16
        by_type = {}
        for node in model.graph.node:
            by_type.setdefault(node.op_type, set()).add(dtypes.get(node.output[0]))
        assert by_type["MatMul"] == {half}
        for float_only in ("ReduceMean", "Sqrt", "Div", "Tanh", "Softmax", "Where", "Cos", "Pow"):
            assert by_type[float_only] == {onnx.TensorProto.FLOAT}, float_only
        assert dtypes["logits"] == onnx.TensorProto.FLOAT
        assert dtypes["present.0.key"] == half


@pytest.mark.parametrize("precision", ["bfloat16", "int4-bfloat16"])
def test_a_bfloat16_bundle_says_what_it_needs(tmp_path, precision):
    from export.session import cuda

    if cuda.device_count():
        pytest.skip("there is a GPU")
    bundle.write(checkpoint.load(GOLDEN / "paligemma1"), tmp_path / "out", precision)
    with pytest.raises(PaliGemmaError, match=f": {precision} needs CUDA; export float32, int8 or int4 for the CPU"):
        Session(bundle.load(tmp_path / "out"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plan_is_what_is_written(tmp_path, precision, capsys):
    assert export_onnx([str(GOLDEN / "paligemma1"), "--plan", "--precision", precision]) == 0
    planned = dict(re.findall(r"(\S+\.\S+) +([\d,]+) bytes", capsys.readouterr().out))
    assert export_onnx([str(GOLDEN / "paligemma1"), "--output", str(tmp_path / "out"), "--precision", precision]) == 0
    written = {file.name: f"{file.stat().st_size:,}" for file in (tmp_path / "out").iterdir()}
    assert planned == written


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: usage(10, 5, 5))
    monkeypatch.setattr(bundle.weights, "write", lambda *arguments: pytest.fail("wrote"))
    with pytest.raises(PaliGemmaError, match=r"the disk has 0\.0 MB free, the export needs 0\.\d MB"):
        bundle.write(checkpoint.load(GOLDEN / "paligemma1"), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_verified_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "SMALL", 1000)
    monkeypatch.setattr(verify, "choose_provider", lambda wanted: "CPUExecutionProvider")
    monkeypatch.setattr(bundle.weights, "write", lambda *arguments: pytest.fail("wrote"))
    arguments = [str(GOLDEN / "paligemma1"), "--output", str(tmp_path / "out"), "--precision", "bfloat16", "--verify"]
    with pytest.raises(PaliGemmaError, match="needs a CUDA device"):
        export_onnx(arguments)
    assert not list(tmp_path.iterdir())


def test_weights_without_a_checksum_are_refused(tmp_path):
    bundle.write(checkpoint.load(GOLDEN / "paligemma1"), tmp_path / "out")
    file = tmp_path / "out" / "bundle.json"
    description = json.loads(file.read_text())
    del description["files"]["weights.bin"]
    file.write_text(json.dumps(description))
    with pytest.raises(PaliGemmaError, match=r"lists no checksum for weights\.bin"):
        bundle.load(tmp_path / "out")


@pytest.mark.parametrize("damage", ["weight", "graph"])
def test_verification_fails_and_leaves_nothing(tmp_path, monkeypatch, damage):
    """A wrong weight in the file, or a wrong formula in the graph, is named; the bundle does not appear."""
    loaded = checkpoint.load(GOLDEN / "paligemma2")
    if damage == "weight":
        write = bundle.weights.write

        def spoiled(file, placed, arrays, progress, rounded):
            arrays = dict(arrays)
            arrays["text.blocks.1.mlp.up.kernel"] = arrays["text.blocks.1.mlp.up.kernel"] * 1.01
            return write(file, placed, arrays, progress, rounded)

        monkeypatch.setattr(bundle.weights, "write", spoiled)
    else:
        from export.model import gemma

        softcap = gemma.softcap
        monkeypatch.setattr(gemma, "softcap", lambda op, x, cap: softcap(op, x, 1.01 * cap))
    expected = "text.blocks.1" if damage == "weight" else "logits"
    with pytest.raises(PaliGemmaError, match="differs from the reference by more than") as error:
        bundle.write(loaded, tmp_path / "out", verify=verify.verify)
    assert expected in str(error.value)
    assert "text.blocks.0" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_synthetic_checkpoints_repeat(tmp_path, capsys):
    """Same seed, same bytes; another seed, others. One layer of each tower, and only the smaller tensors."""
    config = VARIANTS["paligemma2-3b-224"]
    tensors = synthetic.random_tensors(config, np.dtype("f4"))
    name = "language_model.model.layers.3.self_attn.k_proj.weight"
    assert tensors[name].shape == (1024, 2304)
    assert np.array_equal(tensors[name][5:9], tensors[name][5:9])
    other = synthetic.random_tensors(config, np.dtype("f4"), seed=1)[name][5:9]
    assert not np.array_equal(tensors[name][5:9], other)
    assert tensors[name][0:1024].std() == pytest.approx(2304**-0.5, rel=0.01)
