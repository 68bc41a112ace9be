"""Every command tells what it is, and which version; a misspelt option is guessed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from export import cli as export_cli
from export.service.command import serve_onnx
from numpy_ref import __version__
from numpy_ref.cli import Parser

ROOT = Path(__file__).parent.parent
HELP = re.compile(r"usage: .*\n\n.+", re.DOTALL)


def runs(file: Path) -> bool:
    """Whether `python -m` of a module does something: it has the guard, and nobody else is meant to start it."""
    tree = ast.parse(file.read_text())
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    return bool(guards) and file.parent.name not in ("tests", "fuzz")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


MODULES = sorted(
    module_of(file)
    for folder in ("numpy_ref", "torch_impl", "export")
    for file in (ROOT / folder).rglob("*.py")
    if runs(file)
)
TOOLS = [
    "tests.calibrate",
    "tests.faults",
    "tests.fuzz",
    "tests.install_sizes",
    "tests.make_goldens",
    "tests.make_sprites",
    "tests.soak",
    "tests.walk",
]


def test_the_commands_are_found():
    assert {"export", "export.benchmark", "numpy_ref", "numpy_ref.checkpoint", "torch_impl", "torch_impl.train"} <= {
        *MODULES
    }


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("module", [*MODULES, *TOOLS])
def test_modules(module, option):
    command = [sys.executable, "-m", module, option]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    if option == "--help":
        assert HELP.match(ended.stdout)
    else:
        assert re.fullmatch(rf"\S.* {re.escape(__version__)}\n", ended.stdout)


@pytest.mark.parametrize(
    "command", [export_cli.export_onnx, export_cli.run_onnx, export_cli.run_onnx_batch, serve_onnx]
)
def test_console_commands(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--version"])
    assert ended.value.code == 0
    name = command.__name__.replace("_", "-")
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--temprature", "1"], " (did you mean --temperature?)"),
        (["--temprature=1"], " (did you mean --temperature?)"),
        (["--temp"], " (did you mean --temperature?)"),
        (["--xyz"], ""),
    ],
)
def test_a_misspelt_option_is_guessed(words, hint, capsys):
    parser = Parser(prog="program")
    parser.add_argument("--temperature", type=float)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{' '.join(words)}{hint}")


@pytest.mark.parametrize(("argument", "end"), [("-m", "torch_impl: error: "), ("program.py", "ModuleNotFoundError: ")])
def test_without_pytorch_its_package_says_what_is_missing(argument, end):
    """As a command in one line, which even --help needs; as a library by an ImportError."""
    code = f"import sys; sys.modules['torch'] = None; sys.argv = [{argument!r}]; import torch_impl"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 1
    assert f"{end}PyTorch is missing, which torch_impl needs (the extra `torch`)" in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()) == 1 or argument != "-m"
