"""README.md says what is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv.*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_file_it_names_exists():
    names = set(re.findall(r"`([\w./]+\.(?:py|png))`", README)) | set(re.findall(r"\]\(([\w./]+)\)", README))
    assert len(names) > 20
    known = {file.name for folder in ("numpy_ref", "torch_impl", "export") for file in (ROOT / folder).rglob("*.py")}
    for name in names:
        assert name in known or (ROOT / name).exists(), name


def test_every_module_it_runs_exists():
    for module in re.findall(r"python -m ([\w.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_no_placeholder_is_left():
    assert "<!--" not in README
