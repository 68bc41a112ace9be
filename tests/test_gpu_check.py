"""The check for a GPU, on the CPU provider: every stage is answered, and one that fails stops no other."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from export.gpu_check import bandwidth, command, correctness, kernels, models, placement, speed
from export.gpu_check.stage import DIFFERS, FAILED, NOT_HERE, OK, Report, Settings, status_of, work
from export.session import cuda
from numpy_ref import checkpoint
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

from .models import CONFIGS

BROKEN = """
import os, time
LIMIT, PART_LIMIT = 30, {limit}
def parts(settings):
    return ["raises", "dies", "hangs", "answers"]
def run(part, settings, found):
    found.add(started=part)
    if part == "raises":
        raise RuntimeError("CUDA failure 700")
    if part == "dies":
        os._exit(3)
    if part == "hangs":
        time.sleep(60)
def lines(part, found):
    return [f"{{part}} it was"]
"""


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "work", "cpu", "tiny", CONFIGS["paligemma1"], steps=4, generations=4)


def test_every_stage_is_answered(settings, capfd):
    answers = command.check(settings)
    assert {name: answer["status"] for name, answer in answers.items()} == {
        "environment": OK, "placement": OK, "numbers": OK, "capture": OK, "speed": OK, "peer": OK,
        "kernels": NOT_HERE, "compiled": NOT_HERE,
    }  # fmt: skip
    for answer in answers.values():
        assert answer["parts"]
        for part in answer["parts"].values():
            assert part["status"] in (OK, NOT_HERE)
            assert part.get("error") or part["status"] == OK
    numbers = answers["numbers"]["parts"]
    assert numbers["float32 portable"]["worst"] < 1e-5
    assert numbers["float32 fused"]["tokens_same"] == len(correctness.PROMPTS)
    assert "no bfloat16 kernels" in numbers["bfloat16 portable"]["error"]
    graph = answers["placement"]["parts"]["float32 fused"]["graphs"]["decode"]
    assert graph["nodes"].keys() == {"CPUExecutionProvider"}
    assert set(graph["inputs"].values()) == {"Cpu"}
    plain = answers["speed"]["parts"]["float32 plain"]
    assert plain["ms_per_token"] > 0
    assert plain["share_of_copy"] is None
    printed = capfd.readouterr().out
    assert "numbers: ok" in printed
    assert re.search("captured float16 fused +not here: decode is captured on CUDA alone", printed)


def test_what_fails_is_answered_and_the_rest_goes_on(settings, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken_stage.py").write_text(BROKEN.format(limit=2))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "STAGES", {"broken": "broken_stage", "environment": command.STAGES["environment"]})
    answers = command.check(settings)
    assert {name: answer["status"] for name, answer in answers.items()} == {"broken": FAILED, "environment": OK}
    parts = answers["broken"]["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "raises": FAILED, "dies": FAILED, "hangs": FAILED, "answers": OK,
    }  # fmt: skip
    assert parts["raises"]["error"].startswith("RuntimeError: CUDA failure 700 (broken_stage.py:")
    assert parts["dies"]["error"] == "the process ended with exit code 3"
    assert parts["hangs"]["error"].startswith("stopped after")
    assert "broken_stage.py" in parts["hangs"]["error"]  # where it was
    assert parts["hangs"]["started"] == "hangs"
    assert "answers it was" in capfd.readouterr().out


def test_no_time_is_an_answer_too(settings):
    answers = command.check(settings, ["environment", "numbers"], seconds=0)
    assert {part["error"] for answer in answers.values() for part in answer["parts"].values()} == {"no time was left"}


def test_the_command(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    arguments = ["--provider", "cpu", "--layers", "1", "--stages", "environment", "--output", str(output)]
    assert command.main(arguments) == 0
    result = json.loads(output.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["stages"]["environment"]["status"] == OK
    assert (result["variant"], result["layers"], result["provider"]) == ("paligemma-3b-224", 1, "cpu")
    with pytest.raises(PaliGemmaError, match="exists already"):
        command.main(arguments)
    with pytest.raises(PaliGemmaError, match="--stages nothing: there are environment"):
        command.main(["--stages", "nothing"])


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (NOT_HERE, 0), (DIFFERS, 1), (FAILED, 1)])
def test_the_exit_code_says_whether_all_is_well(status, code, monkeypatch, capsys):
    monkeypatch.setattr(command, "check", lambda *arguments: {"numbers": {"status": status, "worst": float("inf")}})
    assert command.main(["--provider", "cpu"]) == code
    assert json.loads(capsys.readouterr().out)["stages"]["numbers"]["worst"] == "inf"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((OK, NOT_HERE), OK),
        ((OK, DIFFERS), DIFFERS),
        ((DIFFERS, FAILED), FAILED),
        ((NOT_HERE,), NOT_HERE),
        ((), NOT_HERE),
    ],
)
def test_status_of_a_stage(parts, status):
    assert status_of([{"status": part} for part in parts]) == status


def test_numbers_that_are_wrong_differ(settings, tmp_path, monkeypatch):
    """Other weights in the reference than in the bundle."""
    config, params = correctness.rounded("float32")
    params = checkpoint.unflatten({path: -array for path, array in checkpoint.flatten(params).items()})
    monkeypatch.setattr(correctness, "rounded", lambda precision: (config, params))
    monkeypatch.setattr(correctness, "parts", lambda settings: ["float32 portable"])
    report = Report(tmp_path / "report.json")
    assert work(correctness, settings, report) == 0
    assert report.parts["float32 portable"]["status"] == DIFFERS
    assert "error" in command.text(correctness, "float32 portable", report.parts["float32 portable"])[0]


def test_shares_of_the_bandwidth():
    """Five gigabytes in two milliseconds are 2.5 TB/s."""
    found = speed.shares(5_000_000_000, 2.0, 3.0e12, 3.35e12)
    assert found["bytes_per_s"] == 2.5e12
    assert found["share_of_copy"] == pytest.approx(2.5 / 3.0)
    assert found["share_of_data_sheet"] == pytest.approx(2.5 / 3.35)
    assert speed.shares(10, 1.0, None, None)["share_of_data_sheet"] is None


@pytest.mark.parametrize(
    ("name", "width"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H200", 4.8e12), ("NVIDIA L4", 0.3e12),
     ("NVIDIA L40S", 0.864e12), ("NVIDIA A100-SXM4-80GB", 2.039e12), ("NVIDIA GeForce RTX 4090", 1.008e12),
     ("Some other device", None)],
)  # fmt: skip
def test_data_sheets(name, width):
    assert bandwidth.data_sheet(name) == width


def test_without_the_library_the_device_is_not_asked():
    with pytest.raises(cuda.MissingError, match=r"libmissing\.so with anything was not found"):
        cuda.call("anything", names=("libmissing.so",))


def test_the_dearest_kernels_of_a_trace():
    trace = [
        {"cat": "kernel", "name": "product", "ts": 0, "dur": 30}, {"cat": "kernel", "name": "norm", "ts": 40, "dur": 5},
        {"cat": "kernel", "name": "product", "ts": 50, "dur": 50}, {"cat": "cpu_op", "name": "call", "ts": 0, "dur": 99},
    ]  # fmt: skip
    found = kernels.dearest(trace, 2)
    assert found["kernels"] == [
        {"name": "product", "us": 40.0, "launches": 1.0}, {"name": "norm", "us": 2.5, "launches": 0.5}
    ]  # fmt: skip
    assert (found["busy_us"], found["span_us"], found["launches"]) == (42.5, 50.0, 1.5)
    assert kernels.dearest([], 2)["launches"] == 0


def test_the_attention_that_the_runtime_prints():
    line = "\x1b[36mOperator=GroupQueryAttention Node=a DataType=fp16 SdpaKernel=FLASH_ATTENTION\x1b[0m\n"
    assert kernels.chosen(2 * line) == {"GroupQueryAttention FLASH_ATTENTION": 2}
    assert kernels.chosen("") == {}


def test_copies_between_providers_are_seen():
    graph = {"memcpy": 0, "inputs": {"lengths": "Cuda"}, "outputs": {"logits": "Cuda"}}
    assert placement.wholly({"prefill": graph, "decode": graph}, True)
    assert not placement.wholly({"prefill": graph, "decode": {**graph, "inputs": {"lengths": "Cpu"}}}, True)
    assert not placement.wholly({"prefill": {**graph, "memcpy": 1}, "decode": graph}, True)


def test_random_weights_are_of_the_scale_of_synthetic_ones():
    config = models.few_layers(VARIANTS["paligemma-3b-224"], 1)
    config = replace(config, text=replace(config.text, vocab=5003))
    arrays = models.random_arrays(config, np.dtype(np.float16))
    wanted = {p.path: p.shape for p in checkpoint.parameters(config)}
    assert {path: array.shape for path, array in arrays.items()} == wanted
    for path, scale in (("text.embedding", 0.02), ("text.blocks.0.mlp.down.kernel", 16384**-0.5)):
        assert np.std(arrays[path][:50].astype(np.float64)) == pytest.approx(scale, rel=0.05)
    rows = arrays["text.embedding"]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_a_bundle_that_cannot_be_made_says_why(settings, monkeypatch):
    folder = models.full_folder(settings, "float32")
    folder.parent.mkdir(parents=True)
    models.reason_of(folder).write_text("OSError: no space")
    with pytest.raises(RuntimeError, match="the float32 bundle could not be made: OSError: no space"):
        models.full(settings, "float32")


def test_torch_is_not_imported():
    for module in (correctness, kernels, speed):
        assert not hasattr(sys.modules[module.__name__], "torch")
