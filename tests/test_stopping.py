"""Endless graphs of a stranger: Ctrl-C and --timeout end the command while one is loaded, and while one runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export import bundle, cli, stopping
from export.session import Session
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.errors import PaliGemmaError

from .fuzz import corpus

ROOT = Path(__file__).parent.parent
EXAMPLE = SHIPPED / "example.png"
MAIN = {name: [sys.executable, "-c", f"from export.cli import {name}; {name}()"] for name in ("run_main", "batch_main")}


def endless_to_load(model, depth=28) -> None:
    """Functions that call the one before twice: a billion nodes when they are unfolded, in a few kilobytes."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    for i in range(depth):
        inner, domain = (f"f{i - 1}", "local") if i else ("Neg", "")
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("x", "y"), ("y", "z"))]
        model.functions.append(helper.make_function("local", f"f{i}", ["x"], ["z"], nodes, opsets))
    model.opset_import.append(opsets[1])
    # Of an input, or the graph's way to its output would not lead through it.
    first = model.graph.node[0]
    for i, name in enumerate(first.input):
        if name in {value.name for value in model.graph.input}:
            first.input[i] = "unfolded"
            model.graph.node.insert(0, helper.make_node(f"f{depth - 1}", [name], ["unfolded"], domain="local"))
            return
    raise AssertionError("the first node takes no input")


def endless_to_run(model) -> None:
    """A loop that nothing ends, before the first node."""
    name = model.graph.node[0].input[0]
    found = next(value for value in model.graph.input if value.name == name)
    kind = found.type.tensor_type.elem_type

    def value(name, kind, shape=None):
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes"]), helper.make_node("Identity", ["v"], ["w"])], "body",
        [value("i", TensorProto.INT64, []), value("going", TensorProto.BOOL, []), value("v", kind)],
        [value("goes", TensorProto.BOOL, []), value("w", kind)],
    )  # fmt: skip
    model.graph.initializer.append(helper.make_tensor("always", TensorProto.BOOL, [], [True]))
    loop = helper.make_node("Loop", ["", "always", name], ["looped"], body=body)
    model.graph.node[0].input[0] = "looped"
    model.graph.node.insert(0, loop)


@pytest.fixture(params=[endless_to_load, endless_to_run])
def endless(request, copy):
    model = onnx.load(copy / "prefill.onnx", load_external_data=False)
    request.param(model)
    corpus.sealed(copy, "prefill.onnx", model.SerializeToString())
    return copy


def started(name, *arguments):
    command = [*MAIN[name], *map(str, arguments), "--provider", "cpu", "--threads", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": str(EXAMPLE), "prompt": "caption en"}) + "\n")
    return ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"]


def test_run_onnx_gives_up(endless):
    with started("run_main", endless, EXAMPLE, "caption en", "--timeout", "3") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith("run-onnx: error: --timeout 3: not done by then")


@pytest.mark.parametrize("workers", [1, 2])
def test_run_onnx_batch_gives_up(endless, tmp_path, workers):
    with started("batch_main", endless, *rows(tmp_path), "--timeout", "4", "--workers", str(workers)) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith("run-onnx-batch: error: --timeout 4: not done by then")
    assert not children_of(process.pid)


@pytest.mark.parametrize("name", ["run_main", "batch_main"])
def test_an_interrupt_ends_it(endless, tmp_path, name):
    asked = [EXAMPLE, "caption en"] if name == "run_main" else rows(tmp_path)
    with started(name, endless, *asked) as process:
        time.sleep(4)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 2 * stopping.GRACE + 5
    assert (process.returncode, output, errors) == (130, "", "")


def children_of(pid) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def test_what_is_quick_enough_is_answered(tmp_path, capsys):
    bundle.shipped()
    for options in ([], ["--timeout", "200"]):
        assert run("run-onnx", cli.run_onnx, [str(EXAMPLE), "caption en", *options]) == 0
        assert "black cross" in capsys.readouterr().out


def test_errors_come_as_they_are():
    def fail():
        raise PaliGemmaError("wrong")

    for seconds in (None, 100):
        with pytest.raises(PaliGemmaError, match="wrong"):
            stopping.stoppable(fail, seconds)
    assert stopping.stoppable(lambda: 3, 1) == 3


def test_python_code_is_stopped_too():
    ended = []

    def work():
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.append(True)

    with pytest.raises(PaliGemmaError, match=r"--timeout 0\.3"):
        stopping.stoppable(work, 0.3)
    assert ended == [True]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "1e400"])
def test_times_that_are_none(seconds, capsys):
    with pytest.raises(SystemExit):
        cli.run_onnx([str(EXAMPLE), "caption en", f"--timeout={seconds}"])
    assert "argument --timeout: must be a number from 0.001" in capsys.readouterr().err


def test_rays_workers_are_not_stopped_by_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.run_onnx_batch([*map(os.fspath, rows(tmp_path)), "--engine", "ray", "--timeout", "3"])
    assert "not with --engine ray" in capsys.readouterr().err


def test_the_runtime_says_nothing_of_its_own(copy):
    """Its default logger writes where no session is concerned, such as of constants too large to be folded."""
    model = onnx.load(copy / "prefill.onnx", load_external_data=False)
    model.graph.initializer.append(helper.make_tensor("huge", TensorProto.INT64, [1], [2**62]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge"], ["zeros"]))
    model.graph.output.append(helper.make_tensor_value_info("zeros", TensorProto.FLOAT, None))
    corpus.sealed(copy, "prefill.onnx", model.SerializeToString())
    with started("run_main", copy, EXAMPLE, "caption en") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("run-onnx: error: ")


def test_a_session_can_be_used_after_a_stop(copy):
    """What stopped one run must not stop those that come after it."""
    engine = Session(bundle.load(copy), "cpu")
    with pytest.raises(PaliGemmaError, match="--timeout"):
        stopping.stoppable(lambda: [time.sleep(0.01) for _ in range(1000)], 0.1)
    assert not any(options.terminate for options in stopping.RUNS)
    size = engine.config.vision.image_size
    ids = np.array([[engine.config.image_token] * engine.config.vision.patches + [2, 5]])
    logits, _ = engine.prefill(np.zeros((1, 3, size, size), np.float32), ids, np.array([ids.shape[1]], np.int32), 40)
    assert np.isfinite(logits).all()
