"""Identifiers are the field's terms, not a private vocabulary."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RETIRED = {"told", "cook", "hear", "crew", "said", "begun", "tell"}
FILES = [file for folder in ("numpy_ref", "torch_impl", "export", "tests") for file in (ROOT / folder).rglob("*.py")]


def identifiers(tree):
    """Every name that a module binds: variables, attributes that are set, arguments, functions, classes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name


def retired(name) -> bool:
    """Whether a name contains a retired word."""
    words = re.findall(r"[A-Z]?[a-z]+", name)
    return bool({word.lower() for word in words} & RETIRED) or "in_line" in name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_retired_word_is_a_name(file):
    found = {name for name in identifiers(ast.parse(file.read_text())) if retired(name)}
    assert not found


def test_it_would_be_noticed():
    tree = ast.parse("def _told(said): self.crew = InLine(hear=1)\nclass BegunRun: pass\nimport tell\nfile.tell()")
    assert {name for name in identifiers(tree) if retired(name)} == {"_told", "said", "crew", "BegunRun", "tell"}
