"""What goes wrong around a command: output that nobody takes, memory, Ctrl-C. One line on stderr, and no traceback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export import bundle
from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.errors import PaliGemmaError, explained

EXAMPLE = SHIPPED / "example.png"
ROOT = Path(__file__).parent.parent
RUN = ["-c", "from export.cli import run_main; run_main()"]
EXPORT = ["-c", "from export.cli import export_main; export_main()"]
BATCH = ["-c", "from export.cli import batch_main; batch_main()"]


def start(command, *arguments, **options):
    command = [sys.executable, *command, *map(os.fspath, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **options)


def call(command, *arguments, **options) -> tuple[int, str]:
    """A command's exit code, and what it says on stderr."""
    with start(command, *arguments, **options) as process:
        _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


def only_line(errors: str) -> str:
    """What was said, in one line that is no traceback and not too long."""
    (line,) = [line for line in errors.splitlines() if not line.startswith("exporting the shipped model")]
    assert "Traceback" not in line
    assert len(line) <= 2000
    return line


# --- output that nobody takes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        [*RUN, EXAMPLE, "caption en"],
        [*RUN, EXAMPLE, "caption en", "--json"],
        [*RUN, "--help"],
        [*EXPORT, "--version"],
        [*EXPORT, "--plan"],
        ["-m", "numpy_ref", EXAMPLE, "caption en", "--max-new-tokens", "2", "--trace"],
        ["-m", "numpy_ref.checkpoint", "--help"],
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_one_line(command, unbuffered):
    with open("/dev/full", "w") as full:
        code, errors = call(command, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert code == 1
    assert "standard output cannot be written (No space left on device)" in only_line(errors)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8:strict"])
def test_a_narrow_output_shows_escapes(encoding, tmp_path):
    target = os.fsencode(tmp_path) + b"/caf\xe9-\xe2\x98\x83"
    code, errors = call([*EXPORT, "--output"], target, stdout=subprocess.PIPE,
                        env=os.environ | {"PYTHONIOENCODING": encoding})  # fmt: skip
    assert code == 0
    assert "example.json has no answer" in only_line(errors)  # the runtime cannot open it there
    assert os.path.isdir(target)


def test_a_bundle_where_the_runtime_opens_nothing_is_refused_in_one_line(tmp_path):
    target = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(bundle.shipped().path, os.fsdecode(target))
    code, errors = call(RUN, target, EXAMPLE, "caption en", stdout=subprocess.PIPE)
    assert code == 1
    assert "ONNX Runtime opens no path that is not UTF-8" in only_line(errors)


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_no_ones_file(closed, tmp_path):
    """The next file that is opened would get its number, and with it what is printed."""
    redirect = f'"$0" "$@" {closed}>&-'
    command = ["sh", "-c", redirect, sys.executable, *EXPORT, "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert ended.returncode == 0
    assert ended.stderr == b""
    assert ended.stdout == (b"" if closed == 1 else f"wrote {tmp_path / 'out'}\n".encode())


# --- whatever is raised ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/there/file"), "/there/file: No space left on device"),
        (OverflowError("int too large"), "OverflowError: int too large"), (RecursionError(), "RecursionError"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal"), "UnicodeEncodeError"), (AssertionError(), "AssertionError"),
        (ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger"), "not enough memory"),
        (PaliGemmaError("x" * 10**7), "x … x"), (ValueError("\x1b[2J\u202e" * 10**6), r"\x1b[2J\u202e"),
    ],
)  # fmt: skip
def test_every_exception_is_one_line(error, words, capsys):
    def main(argv):
        raise error

    assert cli.run("command", main) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith("command: error: ")
    assert words in line
    assert line.isprintable()


def test_a_fault_says_where_it_is():
    with pytest.raises(TypeError) as raised:
        cli.printable(None)
    assert "this should not have happened at numpy_ref/cli/__init__.py:" in str(explained(raised.value))


def test_a_libraries_interrupt_is_an_interrupt(capsys):
    def main(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    assert cli.run("command", main) == 130
    assert capsys.readouterr().err == ""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_errors_of_arguments_quote_no_commands(capsys):
    with pytest.raises(SystemExit):
        cli.parser("program", "MODEL", "text").parse_args(["--seed", "\x1b[2J\u202e" + "9" * 10**6 + "x"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.isprintable()
    assert len(line) <= 2000


def test_characters_of_format_are_shown():
    assert cli.printable("a\u202eb\u2066\u200b\u2028c") == r"a\u202eb\u2066\u200b\u2028c"
    assert cli.printable("naïve 日本\u3000\u00a0☕") == "naïve 日本\u3000\u00a0☕"


# --- Ctrl-C ------------------------------------------------------------------------------------------------

SCRIPT = "from export.cli import {0}; {0}()"  # what the console scripts hold


@pytest.mark.parametrize(
    "command",
    [
        ["-c", SCRIPT.format("run_main"), EXAMPLE, "caption en"],
        ["-c", SCRIPT.format("batch_main"), "--help"],
        ["-m", "export", EXAMPLE, "caption en"],
        ["-m", "numpy_ref", EXAMPLE, "caption en"],
        ["-m", "torch_impl", EXAMPLE, "caption en"],
        ["-m", "torch_impl.train", "--help"],
        ["-m", "export.drift", "--help"],
    ],
)
@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.4, 0.8])
def test_an_interrupt_in_the_first_second(command, seconds):
    """From the moment on that the project's first module is loaded: before that it is Python's own."""
    process = start(["-X", "importtime", *command], stdout=subprocess.DEVNULL)
    first = ""
    while "numpy_ref.interrupts" not in first:
        first = process.stderr.readline().decode()
        assert first, "it ended"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    printed = [line for line in errors.decode().splitlines() if not line.startswith("import time:")]
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert not [line for line in printed if not line.startswith("exporting the shipped model")]
