"""What people get wrong, on every command that takes it: one line that says what the thing is and what to do."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from export import cli as export_cli
from numpy_ref import __main__ as numpy_main
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.checkpoint import __main__ as convert
from numpy_ref.cli import run
from torch_impl import __main__ as torch_main
from torch_impl import train

EXAMPLE = str(SHIPPED / "example.png")
ANSWER = {"run-onnx": export_cli.run_onnx, "numpy": numpy_main.main, "torch": torch_main.main}
CHECKPOINT = {  # commands that take a checkpoint -> their arguments around one
    "numpy": lambda path: [path, EXAMPLE, "caption en"],
    "torch": lambda path: [path, EXAMPLE, "caption en"],
    "export-onnx": lambda path: [path, "--plan"],
    "train": lambda path: ["--init", path, "--output", "out", "--data", "rows.jsonl"],
    "convert": lambda path: ["convert", path, "out.npz"],
}
MAIN = {**ANSWER, "export-onnx": export_cli.export_onnx, "train": train.main, "convert": convert.main}


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A folder with what people have lying about, which is where the commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder, files in {
        "bundle": ["bundle.json", "weights.bin"], "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "pickles": ["config.json", "pytorch_model.bin"], "pictures": ["a.png"],
    }.items():  # fmt: skip
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text("{}")
    for name in ("model.gguf", "model.safetensors", "pt.npz.part0", "notes.txt", "empty.txt"):
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else b"x")
    return tmp_path


def line_of(command, arguments, capsys) -> tuple[int, str]:
    """The exit code of a command, and the last line that it wrote on stderr."""
    try:
        code = run(command, MAIN[command], arguments)
    except SystemExit as ended:  # argparse's
        code = ended.code
    printed = capsys.readouterr()
    assert not printed.out
    return code, printed.err.splitlines()[-1]


@pytest.mark.parametrize("command", CHECKPOINT)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("bundle", "a bundle, not a checkpoint"), ("adapter", "an adapter, not a model"), ("pickles", "a pickle"),
        ("model.gguf", "GGUF"), ("model.safetensors", "one file of a checkpoint: give its folder"),
        ("pt.npz.part0", "one part of a .npz"), ("nowhere", "no such checkpoint directory"),
        ("someone/model", "is not in the Hugging Face cache|nor is all of it in the Hugging Face cache"),
    ],
)  # fmt: skip
def test_in_place_of_a_checkpoint(things, capsys, command, path, words):
    code, line = line_of(command, CHECKPOINT[command](path), capsys)
    assert code in (1, 2)
    assert re.search(words, line), line
    assert path in line
    assert {file.name for file in things.iterdir()} & {"out", "out.npz", "out.training"} == set()


@pytest.mark.parametrize("command", ANSWER)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope.png", "caption en"], "nope.png"),
        (["pictures", "caption en"], "a folder"),
        (["notes.txt", "caption en"], "not a picture of a known format"),
        (["https://example.com/cat.png", "caption en"], "https://example.com/cat.png: pictures are not fetched"),
        ([EXAMPLE], "expected IMAGE PROMPT"),
        (["caption en", EXAMPLE], "a picture in the place of the prompt"),
        ([EXAMPLE, ""], "the prompt is empty"),
        ([EXAMPLE, "@nofile"], "nofile: cannot read the prompt"),
        ([EXAMPLE, "@empty.txt"], "empty.txt is empty"),
        ([EXAMPLE, "caption en", "--temperature", "-1"], "--temperature"),
        ([EXAMPLE, "caption en", "--temprature", "1"], "did you mean --temperature"),
        ([EXAMPLE, "caption en", "--top-k", "many"], "must be a whole number"),
        ([EXAMPLE, "caption en", "--draw", "out.xyz"], "drawings are written as"),
        ([EXAMPLE, "caption en", "--draw", "gone/out.png"], "there is no folder gone"),
        ([EXAMPLE, "caption en", "--provider", "cuda"], "--provider cuda"),
    ],
)  # fmt: skip
def test_around_a_question(things, capsys, command, arguments, words):
    code, line = line_of(command, arguments, capsys)
    assert code in (1, 2)
    assert words in line, line
    assert len(line) <= 2000


# --- what has to be installed ------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: What messages say to install -> the extra that they name beside it.
INSTALLS = {
    "'torch>=2.9,<2.14'": "torch", "pyarrow": "parquet", "'ray[data]'": "ray", "'ray[serve]'": "ray",
    "pillow-heif": "heic", "starlette uvicorn pydantic python-multipart prometheus_client httpx": "serve",
}  # fmt: skip
WORD = r"(?:'[^']+'|[\w.-]+)"


def advice() -> dict[str, str]:
    """What the texts of the packages say to install -> the text, of all that is said at all."""
    found = {}
    for package in ("numpy_ref", "torch_impl", "export"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for names in re.findall(f"pip install ({WORD}(?: {WORD})*)", node.value):
                        found[names] = node.value
    return found


def names_in(requirements: list[str]) -> set[str]:
    """Names of distributions but this project's own, which the index does not have."""
    return {re.match(r"[\w.-]+", each)[0].lower() for each in requirements} - {PROJECT["name"]}


def test_only_names_of_the_index_are_recommended():
    """Libraries that this project declares itself."""
    declared = names_in([*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)])
    assert advice().keys() >= INSTALLS.keys()
    for names in advice():
        recommended = [each.strip("'") for each in names.split()]
        assert {re.match(r"[\w.-]+", each)[0].lower() for each in recommended} <= declared, names


@pytest.mark.parametrize(("names", "extra"), INSTALLS.items())
def test_what_is_recommended_is_what_the_extra_has(names, extra):
    assert f"the extra `{extra}`" in advice()[names]
    recommended = [each.strip("'") for each in names.split()]
    assert names_in(recommended) == names_in(EXTRAS[extra])


@pytest.mark.parametrize(
    "module", ["torch_impl", "torch_impl.train", "torch_impl.train.recipe", "torch_impl.train.pretrain"]
)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_without_pytorch_every_command_of_its_package_says_so(module, option):
    hidden = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = '-m'"
    code = f"{hidden}; runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    ended = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.endswith("(the extra `torch`): pip install 'torch>=2.9,<2.14'")
