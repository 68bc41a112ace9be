"""README.md, the READMEs of the packages and what contributors read say what is so."""

import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from contextlib import redirect_stderr
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

import pytest

from numpy_ref.cli import Parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LONGEST = 200  # lines of README.md
FOLDERS = ("numpy_ref", "torch_impl", "export", "tests")
HISTORY = ".github/CHANGELOG.md"  # which has old names too
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [
        ROOT / "README.md",
        *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("README.md"))),
        ROOT / ".github/CONTRIBUTING.md",
        ROOT / HISTORY,
    ]
    if "node_modules" not in file.parts
}
CONSOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv.*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    names = set(re.findall(r"`([\w./]+\.(?:py|mjs|mts|png))`", PAGES[page]))
    assert page != "README.md" or len(names) > 20
    known = {
        file.name for folder in FOLDERS for kind in ("py", "mjs", "png") for file in (ROOT / folder).rglob(f"*.{kind}")
    }
    for name in names:
        assert name in known or any((folder / name).exists() for folder in (ROOT, (ROOT / page).parent)), name


# --- links -------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead to, but for what is in code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "``", FENCED.sub("", text)))


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead(page: str, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page):
    assert dead(page, PAGES[page]) == []


def test_a_dead_link_is_noticed():
    text = "[a](README.md) [b](nowhere.md) [c](README.md#nowhere) [d](https://example.com) ![e](.github/nowhere.png)"
    assert dead("README.md", text) == ["nowhere.md", "README.md#nowhere", ".github/nowhere.png"]


# --- commands ----------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised where a command's arguments were parsed, before it does anything."""


def commands(text: str) -> list[str]:
    """The commands of this project that a page shows: lines of its sh blocks, and code within sentences."""
    blocks = [block for language, block in FENCED.findall(text) if language == "sh"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    parts = [part for line in [*lines, *spans] for part in line.split("&&")]
    return [shlex.join(command) for part in parts if program(command := words(part))]


def words(command: str) -> list[str]:
    """The words of a command, up to a pipe or a comment; `[WORD]`, which may be left out, is given."""
    try:
        split = shlex.split(command, comments=True)
    except ValueError:
        return []  # half of a quotation: no command
    return [re.sub(r"^\[([A-Z_]+)\]$", r"\1", word).removeprefix(".venv/bin/") for word in takewhile("|".__ne__, split)]


def program(command: list[str]) -> str | None:
    """What a command runs of this project: the name of a console command, or `python -m` and a module."""
    first, *rest = command or [""]
    if first in CONSOLE:
        return first
    if first in ("python", "python3") and rest[:1] == ["-m"] and rest[1].split(".")[0] in FOLDERS:
        return f"python -m {rest[1]}"
    return None


def parse(command: str, monkeypatch) -> None:
    """Start a command, and let its own parser read its arguments, if there are any; it does nothing else.

    Raises AssertionError with what the parser says.
    """
    name = program(shlex.split(command))
    arguments = shlex.split(command)[len(name.split()) :]

    def stop(original):
        def parse_args(parser, *ignored):
            if arguments:
                original(parser, arguments)
            raise Parsed

        return parse_args

    monkeypatch.setattr(Parser, "parse_args", stop(Parser.parse_args))
    monkeypatch.setattr(Parser, "parse_intermixed_args", stop(Parser.parse_intermixed_args))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    printed = io.StringIO()
    with redirect_stderr(printed), pytest.raises((Parsed, SystemExit)) as ended:
        start(name)
    shown_and_ended = ended.type is SystemExit and not ended.value.code  # as --help does
    assert ended.type is Parsed or shown_and_ended, f"{command}: {printed.getvalue() or ended.value}"


def start(name: str) -> None:
    """Run a console command, or a module as `python -m` does, in this process."""
    if name in CONSOLE:
        module, _, function = CONSOLE[name].partition(":")
        getattr(import_module(module), function)()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module was imported before
            runpy.run_module(name.removeprefix("python -m "), run_name="__main__")


SHOWN = sorted({command for page, text in PAGES.items() if page != HISTORY for command in commands(text)})


def test_the_commands_are_found():
    assert {program(shlex.split(command)) for command in SHOWN} >= {
        *CONSOLE, "python -m numpy_ref", "python -m torch_impl.train", "python -m export.benchmark",
        "python -m tests.calibrate",
    }  # fmt: skip


@pytest.mark.parametrize("command", SHOWN)
def test_every_command_takes_the_options_shown(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "run-onnx IMAGE PROMPT --nowhere",
        "export-onnx --precision int5",
        "run-onnx-batch --input FOLDER",
        "python -m numpy_ref IMAGE PROMPT --threads 2",
        "python -m export.drift --seed 1",
        "python -m export.benchmark --rounds many",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    with pytest.raises(AssertionError):
        parse(command, monkeypatch)


def test_a_module_that_does_not_exist_is_noticed(monkeypatch):
    with pytest.raises(ImportError):
        parse("python -m export.nowhere", monkeypatch)


def test_no_placeholder_is_left():
    assert not any("<!--" in text for text in PAGES.values())
