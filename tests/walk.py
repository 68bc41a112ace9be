"""python -m tests.walk: run the blocks of `numpy_ref/README.md`, and write what they print where the page shows otherwise.

Two kinds of fenced block are run, from the top of the page to its end. `pycon`: one Python session over all of them, each
statement followed by what it prints. `console`: a command after "$ ", followed by its output.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from numpy_ref.cli import Parser

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "numpy_ref" / "README.md"
_FENCE = re.compile(r"^```(pycon|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?")


def renew(page: str) -> tuple[str, list[str]]:
    """Run the blocks of a page: the page with what they print now, and the statements and commands that differ."""
    changed, session = [], {"__name__": "__walk__"}

    def output(source, shown, printed):
        if agree(shown, printed):
            return shown
        changed.append(source.strip())
        return printed

    def statements(body):
        for part in doctest.DocTestParser().parse(body):
            if isinstance(part, str):
                yield part
            else:
                yield prompted(part.source)
                yield output(part.source, part.want, run_statement(part.source, session))

    def command(match):
        return f"$ {match[1]}\n{output(match[1], match[2], run_command(match[1]))}"

    def block(match):
        kind, body = match.groups()
        body = _COMMAND.sub(command, body) if kind == "console" else "".join(statements(body))
        return f"```{kind}\n{body}```"

    return _FENCE.sub(block, page), changed


def prompted(source: str) -> str:
    """A statement as Python's prompt shows it."""
    first, *more = source.splitlines()
    return "".join([f">>> {first}\n", *(f"... {line}".rstrip() + "\n" for line in more)])


def run_statement(source: str, session: dict) -> str:
    """What a Python statement prints, its value included."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.chdir(ROOT):
        exec(compile(source, "<page>", "single"), session)
    return printed.getvalue()


def run_command(command: str) -> str:
    """What a shell command prints, with this interpreter as `python`."""
    script = f'python() {{ "{sys.executable}" "$@"; }}\n{command}'
    shell = ["bash", "-e", "-o", "pipefail", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    ended = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    if ended.returncode:
        raise RuntimeError(f"{command}\n{ended.stderr}")
    return ended.stdout


def agree(shown: str, printed: str) -> bool:
    """Whether two outputs say the same: words and whole numbers exactly, others to three digits, spaces aside.

    Another processor adds in another order, which moves the last digits.
    """
    numbers = [_NUMBER.findall(text) for text in (shown, printed)]
    words = [_NUMBER.sub(" 0 ", text).split() for text in (shown, printed)]
    return words[0] == words[1] and len(numbers[0]) == len(numbers[1]) and all(map(close, *numbers))


def close(a: str, b: str) -> bool:
    if a.lstrip("-").isdigit() and b.lstrip("-").isdigit():
        return int(a) == int(b)
    return bool(np.isclose(float(a), float(b), rtol=3e-3, atol=1e-3))


def main(argv=None):
    options = Parser(prog="python -m tests.walk", description="Renew what the blocks of numpy_ref/README.md print.")
    options.parse_args(argv)
    page, changed = renew(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    print("\n".join([*changed, f"{len(changed)} outputs changed"]))


if __name__ == "__main__":
    main()
