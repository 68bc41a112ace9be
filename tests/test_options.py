"""Every option of every command says in plain English what it takes."""

import argparse
import os
import re
from importlib import import_module

import numpy as np
import pytest

from numpy_ref import cli
from numpy_ref.cli.options import MOST_PER_CORE, Parser, check_on_cores, on_cores, pair, real, whole
from numpy_ref.errors import plural
from numpy_ref.model.sampling import sample

MAINS = [
    "numpy_ref.__main__:main", "numpy_ref.checkpoint.__main__:main", "numpy_ref.checkpoint.synthetic:main",
    "torch_impl.__main__:main", "torch_impl.train:main", "torch_impl.train.recipe:main",
    "torch_impl.train.pretrain:main", "export.cli:export_onnx", "export.cli:run_onnx", "export.cli:run_onnx_batch",
    "export.service.command:serve_onnx", "export.benchmark.serve:main", "tests.soak_serve:main",
    "export.benchmark:main", "export.benchmark.batch:main", "export.drift:main", "export.evaluate:main",
    "export.gallery:main", "export.gpu_check.command:main", "export.measure:main", "tests.calibrate:main",
    "numpy_ref.dataset.__main__:main", "numpy_ref.scenes.example:main",
    "tests.faults:main", "tests.fuzz.__main__:main", "tests.install_sizes:main", "tests.soak:main",
]  # fmt: skip
VALUES = ["-1", "0", "1", "x", "", "1.5", "nan", "inf", "1e9", "99999999999", "9" * 5000, "a=b", "\udcff"]


class ReachedError(Exception):
    """The parser of a command, at the moment when it would parse."""


def parser_of(name, monkeypatch, arguments=()):
    def stop(parser, *_):
        raise ReachedError(parser)

    monkeypatch.setattr(Parser, "parse_args", stop)
    monkeypatch.setattr(Parser, "parse_intermixed_args", stop)
    module, function = name.split(":")
    with pytest.raises(ReachedError) as reached:
        getattr(import_module(module), function)([*arguments])
    return reached.value.args[0]


def refusal(parse, value) -> str:
    """What a type says against a value; "" if it takes it. Any other exception is let through."""
    try:
        parse(value)
    except argparse.ArgumentTypeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "arguments"), [*((name, []) for name in MAINS), ("export.cli:run_onnx", ["--serve"])])
def test_options_refuse_in_english(name, arguments, monkeypatch):
    """No bare int or float, whose refusal argparse words by the function's name; only our types may refuse."""
    parser = parser_of(name, monkeypatch, arguments)
    assert isinstance(parser, Parser)
    for action in parser._actions:
        for message in filter(None, (refusal(action.type, value) for value in VALUES if action.type)):
            assert re.match(r"must be (a (whole )?number (of at least|from) [\d. to]+|KEY=VALUE)", message)
            assert len(message) < 250


@pytest.mark.parametrize("command", ["run_onnx", "run_onnx_batch"])
@pytest.mark.parametrize("value", ["-1", "100000", "x"])
def test_threads_are_bounded(command, value, tmp_path, capsys):
    most = MOST_PER_CORE * os.cpu_count()
    words = {
        "run_onnx": ["a.png", "caption en"],
        "run_onnx_batch": ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--prompt", "caption en"],
    }
    with pytest.raises(SystemExit) as ended:
        getattr(import_module("export.cli"), command)([*words[command], "--threads", value])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "argument --threads: must be a whole number " in line
    assert line.endswith(f"not '{value}'")
    assert (str(most) in line) == (value == "100000" or command == "run_onnx")


def test_workers_are_bounded(tmp_path, capsys):
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "100000"]
    with pytest.raises(SystemExit) as ended:
        import_module("export.cli").run_onnx_batch(words)
    assert ended.value.code == 2
    assert "argument --workers: must be a whole number from " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["export.benchmark:main", "export.benchmark.batch:main", "tests.soak:main"])
def test_threads_are_bounded_in_every_tool(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    (action,) = (action for action in parser._actions if "--threads" in action.option_strings)
    assert action.type("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="for each of this machine's cores"):
        action.type("100000")


def test_rays_threads_are_the_clusters():
    """A cluster may have more cores than this machine; however many threads are asked for, the answer is quick."""
    ray_workers = pytest.importorskip("export.batch.ray_workers")
    assert ray_workers.share_out([64, 64], 2, 10**12) == 64
    assert ray_workers.share_out([4], 2, 3) == 1


def test_limits():
    assert [whole(0, 3)(text) for text in ("0", "3", " 2 ")] == [0, 3, 2]
    assert real(0, 1)("0.5") == 0.5
    assert pair("a=b=c") == ("a", "b=c")
    assert on_cores(1)(str(MOST_PER_CORE * os.cpu_count()))
    for parse, text, message in [
        (whole(1), "0", "must be a whole number of at least 1, not '0'"),
        (whole(0, 65535), "99999", "must be a whole number from 0 to 65535, not '99999'"),
        (real(0), "-1", "must be a number of at least 0, not '-1'"),
        (real(0, 1), "1.5", "must be a number from 0 to 1, not '1.5'"),
        (pair, "foo", "must be KEY=VALUE, not 'foo'"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            parse(text)
        assert str(refused.value) == message


@pytest.mark.parametrize("option", ["--top-k", "--max-new-tokens", "--seed"])
@pytest.mark.parametrize("value", [10**20, 10**24, 2**31, 2**63, "9" * 5000, -(10**30)])
def test_whole_numbers_of_any_size(option, value, capsys):
    options = cli.parser("program", "MODEL", "text")
    with pytest.raises(SystemExit):
        options.parse_args([f"{option}={value}"])
    assert "must be a whole number" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["1e-320", "1e-7", "1e300", "1e7", "inf", "nan", "-0.1"])
def test_temperatures_that_no_logits_bear(value, capsys):
    with pytest.raises(SystemExit):
        cli.parser("program", "MODEL", "text").parse_args([f"--temperature={value}"])
    assert "must be a number from" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "1e-6", "1", "1e6"])
def test_temperatures_at_the_limits(value):
    """No warning of NumPy's, which is an error here, whatever the logits."""
    temperature = cli.parser("program", "MODEL", "text").parse_args([f"--temperature={value}"]).temperature
    logits = np.array([[-1e30, 1e30, 5, 0]], np.float32)
    assert sample(logits, np.ones(4, bool), temperature, uniform=np.array([0.5], np.float32)) == [1]


def test_a_number_and_its_noun():
    assert [plural(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    with pytest.raises(SystemExit):
        check_on_cores(Parser(prog="p"), argparse.Namespace(threads=10**6), "threads")


def test_one_argument_is_not_one_arguments(capsys):
    with pytest.raises(SystemExit):
        import_module("export.cli").run_onnx(["a.png"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("got 1 argument")


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9.09 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory.\nTried to allocate"),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    from numpy_ref.cli import run

    def main(argv):
        raise error

    assert run("command", main) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command: error: there is not enough memory")
    assert " ".join(str(error).split()) in line


def test_a_fault_of_ours_is_one_line_too(capsys):
    from numpy_ref.cli import run

    def main(argv):
        raise RuntimeError("a mistake of ours")

    assert run("command", main) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command: error: this should not have happened")
    assert "RuntimeError: a mistake of ours" in line


def test_a_picture_that_memory_is_too_short_for_is_not_called_broken(monkeypatch):
    from PIL import Image

    from numpy_ref.checkpoint import SHIPPED
    from numpy_ref.image import open_image

    def short(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", short)
    with pytest.raises(MemoryError):
        open_image(SHIPPED / "example.png")
