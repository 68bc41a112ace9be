"""ONNX Runtime's telemetry is off in every process that loads it, and a user's own choice is kept."""

import os
import subprocess
import sys

import pytest

from export import bundle
from numpy_ref.checkpoint import SHIPPED

from .test_hosts import RUN, node  # noqa: F401

VARIABLE = "ORT_DISABLE_TELEMETRY"
EXAMPLE = SHIPPED / "example.png"
COMMANDS = {
    "run-onnx": ["-m", "export", EXAMPLE, "caption en"],
    "run-onnx-batch": ["-c", "from export.cli import batch_main; batch_main()"],
    "export-onnx": ["-c", "from export.cli import export_main; export_main()", "--plan"],
    "a program": ["-c", "from export import session; session.load()"],
}
GETENV = f"import ctypes; c = ctypes.CDLL(None); c.getenv.restype = ctypes.c_char_p; print(c.getenv(b'{VARIABLE}'))"


def run(home, command, **changes):
    """A process of a user who has nothing yet: what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **changes}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def left(home) -> set[str]:
    """The folders of the user's cache; there is nothing else."""
    found = [file.relative_to(home) for file in home.rglob("*") if file.is_file()]
    assert all(file.parts[0] == "cache" for file in found), found
    return {file.parts[1] for file in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_left_in_a_home_but_this_projects_own(tmp_path, name):
    arguments = COMMANDS[name]
    if name == "run-onnx-batch":  # in processes of its own
        (tmp_path / "rows.jsonl").write_text(f'{{"image": "{EXAMPLE}", "prompt": "caption en"}}\n' * 2)
        arguments = [
            *arguments,
            "--input",
            tmp_path / "rows.jsonl",
            "--output",
            tmp_path / "out.jsonl",
            "--workers",
            "2",
        ]
    run(tmp_path / "home", [sys.executable, *arguments])
    assert left(tmp_path / "home") <= {"paligemma-onnx"}


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's environment is looked at through ctypes")
@pytest.mark.parametrize(("own", "seen"), [(None, "b'1'"), ("0", "b'0'"), ("", "b''")])
def test_the_c_library_sees_it_and_a_users_own_value_stays(tmp_path, own, seen):
    changes = {} if own is None else {VARIABLE: own}
    assert run(tmp_path, [sys.executable, "-c", f"import export; {GETENV}"], **changes) == f"{seen}\n"


def test_the_node_host_leaves_nothing(tmp_path, node):  # noqa: F811
    folder = bundle.shipped().path
    run(tmp_path / "home", [node, RUN, folder, EXAMPLE, "caption en"])
    assert not (tmp_path / "home").exists()
    program = tmp_path / "own.mjs"
    program.write_text(f'import "{RUN.parent / "index.mjs"}"; console.log(process.env.{VARIABLE});')
    assert run(tmp_path, [node, program]) == "1\n"
    assert run(tmp_path, [node, program], **{VARIABLE: "0"}) == "0\n"
