"""LoRA training: the maths and the file are peft's; memory savings change nothing but the memory."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from export import bundle
from export.cli import export_onnx
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED, adapter
from numpy_ref.checkpoint.layouts import canonical, module_name, parameters, unwrapped
from numpy_ref.engine import NumpyEngine
from torch_impl.load import ModuleEngine, TorchEngine, from_params
from torch_impl.model.layers import Linear
from torch_impl.train import data, loop, lora, memory
from torch_impl.train.finetune import prefix_lm_loss

from . import faults
from .models import CONFIGS, random_batch, random_params
from .test_adapter import answers_of, assert_answers, base_model, opened

peft = pytest.importorskip("peft", reason="adapters are compared with peft's")
pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = [*lora.PARTS]


def with_pairs(model, kernels, rank=3, alpha=5.0):
    """A model with pairs beside some kernels, whose b is no longer zero, in its own dtype."""
    torch.manual_seed(1)
    dtype = model.projector.kernel.dtype
    lora.adapt(model, kernels, rank, alpha)
    with torch.no_grad():
        for pair in lora.pairs(model).values():
            for side in pair:
                side.normal_(std=0.2)
    return model.to(dtype)


def ours_of(base, targets):
    """The twin of a base, with random pairs."""
    loaded = checkpoint.load(base)
    return with_pairs(from_params(loaded.config, loaded.params), lora.target_kernels(loaded.config, targets))


def batch_of(config, dtype=torch.float64):
    """Three rows with suffixes of their own lengths."""
    pixels, ids, lengths = random_batch(config)
    examples = [(p, row[: n - 2].tolist(), [7, 11, 1][:m]) for p, row, n, m in zip(pixels, ids, lengths, (2, 3, 1), strict=True)]  # fmt: skip
    batch = data.collate(examples, config.pad)
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


# --- equal to peft -----------------------------------------------------------------------------------------


def with_torch_layers(model):
    """The twin with `torch.nn.Linear` in place of its own layers, since those are what peft knows."""
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear and name != "text.head":  # whose kernel is used by itself
            plain = torch.nn.Linear(*layer.kernel.shape, bias=layer.bias is not None, dtype=layer.kernel.dtype)
            plain.weight.data = layer.kernel.detach().T.clone()
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().clone()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model


@pytest.mark.parametrize("targets", [["text"], EVERYTHING, ["q_proj", "fc1"]], ids=["text", "everything", "names"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_peft(name, targets):
    """In float64, by peft's own layers in the same model. (transformers' computes parts of it in float32.)"""
    config = CONFIGS[name]
    params, kernels = random_params(config), lora.target_kernels(config, targets)
    ours = with_pairs(from_params(config, params, torch.float64), kernels)
    theirs = peft.get_peft_model(
        with_torch_layers(from_params(config, params, torch.float64)),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=[path.removesuffix(".kernel") for path in kernels]),
        autocast_adapter_dtype=False,
    )
    layers = {path: theirs.base_model.model.get_submodule(path.removesuffix(".kernel")) for path in kernels}
    with torch.no_grad():
        for path, (a, b) in lora.pairs(ours).items():
            layers[path].lora_A["default"].weight.copy_(a.T)
            layers[path].lora_B["default"].weight.copy_(b.T)
    batch = batch_of(config)
    arguments = [batch[key] for key in ("pixel_values", "input_ids", "lengths", "prefix_lengths")]
    logits, expected = ours(*arguments), theirs.base_model.model(*arguments)
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    losses = [prefix_lm_loss(model, batch) for model in (ours, theirs.base_model.model)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    for loss in losses:
        loss.backward()
    for path, (a, b) in lora.pairs(ours).items():
        for gradient, side in ((a.grad, layers[path].lora_A), (b.grad, layers[path].lora_B)):
            wanted = side["default"].weight.grad
            assert (gradient.T - wanted).abs().max() <= 1e-10 * wanted.abs().max() > 0, path
    assert all(p.grad is None for key, p in ours.named_parameters() if "lora_" not in key)
    assert {key for key, p in theirs.named_parameters() if p.requires_grad} == {key for key, _ in theirs.named_parameters() if "lora_" in key}  # fmt: skip


def test_pairs_begin_as_those_of_peft(tmp_path):
    """The change is nothing at first; a has peft's spread."""
    base = base_model(tmp_path / "base", "gemma")
    loaded = checkpoint.load(base)
    model, plain = (from_params(loaded.config, loaded.params) for _ in range(2))
    torch.manual_seed(0)
    lora.adapt(model, lora.target_kernels(loaded.config, EVERYTHING), 8, 16.0)
    batch = batch_of(loaded.config, torch.float32)
    assert torch.equal(prefix_lm_loss(model, batch), prefix_lm_loss(plain, batch))
    theirs = peft.get_peft_model(opened(base), peft.LoraConfig(r=8, target_modules=["q_proj"]))
    a = next(p for name, p in theirs.named_parameters() if "language_model.layers.0" in name and "lora_A" in name)
    ours = lora.pairs(model)["text.blocks.0.attention.query.kernel"][0]
    assert ours.abs().max() <= a.abs().max() * 1.05
    assert ours.std().item() == pytest.approx(a.std().item(), rel=0.15)


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_the_inverse_of_those_that_are_read(name):
    for parameter in parameters(CONFIGS[name]):
        if parameter.path.endswith("kernel"):
            tensors, _ = unwrapped({f"base_model.model.{module_name(parameter.hf.name)}.weight": None})
            assert [canonical(each) for each in tensors] == [parameter.hf.name]


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_what_is_saved_loads_everywhere(family, tmp_path):
    """In peft on transformers' model, in the reference, in PyTorch and in a bundle: one answer, that of training."""
    base = base_model(tmp_path / "base", family)
    model = ours_of(base, EVERYTHING)
    lora.save(tmp_path / "lora", model, 5.0, str(base), {"training.json": b"{}"})
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {adapter.CONFIG, adapter.WEIGHTS, "training.json"}
    theirs = peft.PeftModel.from_pretrained(opened(base), tmp_path / "lora").eval()
    examples = answers_of(theirs)
    loaded = checkpoint.load(adapter=tmp_path / "lora")  # its base is named in it
    assert export_onnx(["--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "bundle")]) == 0
    engines = [ModuleEngine(model), NumpyEngine(loaded), TorchEngine(loaded), Session(bundle.load(tmp_path / "bundle"), "cpu")]  # fmt: skip
    for engine in engines:
        assert_answers(engine, *examples)
    plain, _ = NumpyEngine(checkpoint.load(base)).prefill(examples[0], *make_prompts(examples[1]), 40)
    assert np.abs(plain - examples[2]).max() > 1e-2 * np.abs(plain).max()


def make_prompts(rows):
    from numpy_ref.generate import pad_prompts

    return pad_prompts(rows, 0)


def test_peft_saves_the_same_file(tmp_path):
    """The tensors of what peft reads and writes again, name by name, and the fields that count."""
    base = base_model(tmp_path / "base", "gemma")
    lora.save(tmp_path / "ours", ours_of(base, ["text", "fc2"]), 5.0, str(base), {})
    peft.PeftModel.from_pretrained(opened(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (checkpoint.safetensors.map_safetensors_file(tmp_path / name / adapter.WEIGHTS) for name in ("ours", "theirs"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    fields = [json.loads((tmp_path / name / adapter.CONFIG).read_text()) for name in ("ours", "theirs")]
    for key in ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "bias", "use_rslora"):
        assert fields[0][key] == fields[1][key], key
    assert adapter.read_settings(tmp_path / "ours") == adapter.read_settings(tmp_path / "theirs")


def test_a_base_of_the_hub_is_named_with_its_revision(tmp_path):
    base = base_model(tmp_path / "base", "gemma")
    for name, hub in [("a", "someone/model"), ("b", "someone/model@main")]:
        lora.save(tmp_path / name, ours_of(base, ["q_proj"]), 5.0, hub, {})
        assert adapter.base_of(tmp_path / name) == hub


def test_targets(tmp_path):
    config = CONFIGS["paligemma1"]
    text, everything = lora.target_kernels(config, ["text"]), lora.target_kernels(config, EVERYTHING)
    assert len(text) == 7 * config.text.depth
    assert len(everything) == len(text) + 6 * config.vision.depth + 1
    assert lora.target_kernels(config, ["projector", "o_proj"]) == ["projector.kernel", *(f"text.blocks.{i}.attention.output.kernel" for i in range(config.text.depth))]  # fmt: skip
    assert set(lora.NAMES) == {module_name(p.hf.name).rpartition(".")[2] for p in parameters(config) if p.path in everything} - {"linear"}  # fmt: skip


# --- memory ------------------------------------------------------------------------------------------------


def gradients_of(model, batch):
    model.zero_grad()
    loss = prefix_lm_loss(model, batch)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapted_only", [True, False], ids=["adapter", "all weights"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_no_gradient(name, adapted_only):
    config = CONFIGS[name]
    model = from_params(config, random_params(config), torch.float64)
    if adapted_only:
        torch.manual_seed(0)
        lora.adapt(model, lora.target_kernels(config, EVERYTHING), 3, 5.0)
        model.double()
    batch = batch_of(config)
    loss, expected = gradients_of(model, batch)
    calls = []
    block = model.text.blocks[0]
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    memory.recompute_blocks(model)
    again, found = gradients_of(model, batch)
    assert torch.equal(loss, again)
    assert len(calls) == 2  # once on the way, once for the gradients
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_int4_is_near_and_its_gradient_is_that_of_what_it_stands_for():
    torch.manual_seed(0)
    kernel = torch.randn(128, 23)
    codes, scales = memory.quantize(kernel)
    back = memory.dequantize(codes, scales, torch.float32)
    assert (codes.dtype, codes.nbytes) == (torch.uint8, kernel.numel() // 2)
    groups = kernel.reshape(2, 64, 23)
    assert ((back - kernel).reshape(2, 64, 23).abs() <= groups.abs().amax(1, keepdim=True) / 14 * 1.001).all()
    assert torch.equal(memory.dequantize(*memory.quantize(torch.zeros(16, 2)), torch.float32), torch.zeros(16, 2))
    layer = torch.nn.Module()
    layer.kernel, layer.bias = torch.nn.Parameter(kernel), torch.nn.Parameter(torch.randn(23))
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = memory.Int4Linear(layer)(x)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    plain = x @ back + layer.bias
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    assert torch.allclose(y, plain, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "share", "far"), [("bfloat16", 0.5, 0.02), ("int4", 0.3, 0.3)])
def test_a_base_in_fewer_bits(dtype, share, far):
    """Near the whole one in its loss, in so much of the memory; the pairs stay in float32, and gradients reach them."""
    loaded = checkpoint.load(SHIPPED)
    whole, small = (from_params(loaded.config, loaded.params) for _ in range(2))
    memory.store_base(small, dtype)
    blocks = [sum(memory.of_weights(block) for block in model.text.blocks) for model in (whole, small)]
    assert blocks[1] <= share * blocks[0]
    lora.adapt(small, lora.target_kernels(loaded.config, ["text"]), 4, 8.0)
    rng = np.random.default_rng(0)
    image = [loaded.config.image_token] * loaded.config.vision.patches
    example = (rng.uniform(-1, 1, (3, 96, 96)).astype(np.float32), [*image, 2, 40, 41], [50, 60, 1])
    batch = data.collate([example], 0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [prefix_lm_loss(model, batch) for model in (whole, small)]
    losses[1].backward()
    assert abs(losses[1] / losses[0] - 1) < far
    for a, b in lora.pairs(small).values():
        assert a.dtype == b.dtype == torch.float32
        assert b.grad.abs().max() > 0


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path):
    return faults.own_data(tmp_path / "data")


def command_of(*arguments, processes=1):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"] if processes > 1 else []
    return list(map(str, [sys.executable, "-m", *launcher, "torch_impl.train", *arguments]))


def train(*arguments, processes=1):
    command = command_of(*arguments, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=faults.environment())


SMALL = ["--batch-size", 4, "--lora-rank", 4, "--learning-rate", "1e-2", "--float32"]


def test_an_adapter_from_the_command_line(own_data, tmp_path, capsys):
    """It learns, validates, tests, saves the best weights, and the whole way to a bundle answers with it."""
    options = [*SMALL, "--data", own_data, "--steps", 40, "--validation", "0.25", "--test", own_data]
    result = train(*options, "--output", tmp_path / "lora", "--checkpointing")
    assert result.returncode == 0, result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"data", "lora"}
    found = json.loads((tmp_path / "lora" / "training.json").read_text())
    assert found["test"]["exact"] == 1.0
    assert [row["step"] for row in found["validation"]] == list(range(4, 41, 4))
    best = max(found["validation"], key=lambda row: (row["exact"], -row["loss"]))
    assert f"best validation: loss {best['loss']:.3f}, exact {best['exact']:.3f}" in result.stderr
    assert "validation after step 4: loss" in result.stderr
    settings = adapter.read_settings(tmp_path / "lora")
    assert (settings.rank, settings.alpha, settings.base) == (4, 8.0, str(SHIPPED))
    question = [str(own_data.parent / "0.png"), "answer en what color?"]
    from numpy_ref import __main__ as numpy_command

    assert numpy_command.main([*question, "--adapter", str(tmp_path / "lora")]) == 0
    assert capsys.readouterr().out == "red\n"
    assert export_onnx(["--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "bundle")]) == 0
    ran = subprocess.run(
        [sys.executable, "-m", "export", tmp_path / "bundle", *question], capture_output=True, text=True
    )
    assert ran.stdout == "red\n", ran.stderr


def losses_of(folder):
    with (folder / "log.csv").open() as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def tensors_of(folder):
    return checkpoint.safetensors.map_safetensors_file(folder / adapter.WEIGHTS)


def test_two_processes_are_as_one(own_data, tmp_path):
    """The same losses and, but for the order of sums, the same weights."""
    options = [*SMALL, "--data", own_data, "--steps", 8, "--accumulate", 2]
    for processes in (1, 2):
        result = train(*options, "--output", tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("wrote") == 1
    one, two = (losses_of(tmp_path / name) for name in "12")
    assert two == pytest.approx(one, rel=1e-4)
    one, two = (tensors_of(tmp_path / name) for name in "12")
    assert one.keys() == two.keys()
    for name in one:
        assert np.abs(one[name] - two[name]).max() <= 1e-3 * np.abs(one[name]).max(), name
    assert {file.name for file in tmp_path.iterdir()} == {"data", "1", "2"}


def test_a_batch_that_cannot_be_shared(own_data, tmp_path):
    result = train("--data", own_data, "--batch-size", 3, "--output", tmp_path / "out", processes=2)
    assert result.returncode != 0
    assert "a batch of 3 examples cannot be shared by 2 processes; give a --batch-size that can" in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"data"}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_taken_up_again(own_data, tmp_path, processes):
    """SIGKILL to all of them, twice: in the end adapter, curve and validations are those of a run left alone."""
    options = [*SMALL, "--data", own_data, "--steps", 30, "--validation", "0.25", "--save-every", 0]
    assert train(*options, "--output", tmp_path / "whole", processes=processes).returncode == 0
    output, moments, kills = tmp_path / "parts", random.Random(processes), 0
    state, steps = tmp_path / "parts.training" / loop.STATE, []
    while not output.exists():
        before = faults.modified(state)
        process = subprocess.Popen(
            command_of(*options, "--output", output, processes=processes), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True, env=faults.environment(),
        )  # fmt: skip
        while kills < 2 and process.poll() is None and faults.modified(state) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        if kills < 2 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        steps.append(faults.steps_of(state))
    assert kills
    assert steps[:-1] == sorted(steps[:-1])
    assert losses_of(output) == losses_of(tmp_path / "whole")
    ours, expected = tensors_of(output), tensors_of(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in ours)
    records = [json.loads((folder / "training.json").read_text()) for folder in (output, tmp_path / "whole")]
    assert records[0]["validation"] == records[1]["validation"]
    assert {file.name for file in tmp_path.iterdir()} == {"data", "parts", "whole"}
