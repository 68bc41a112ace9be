"""Public functions and methods say the types of what they take and give, so that mypy checks who calls them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("numpy_ref", "torch_impl", "export")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def public_functions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module and the methods of its public classes, with their dotted names."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body, f"{inside}{node.name}.")
            elif node.name != "main":
                yield f"{inside}{node.name}", node


def untyped(source: str) -> list[str]:
    """`line name: argument, ...` of each public function that lacks the type of an argument or of its return."""
    found = []
    for name, function in public_functions(ast.parse(source).body):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if "." in name and not any(_name(each) == "staticmethod" for each in function.decorator_list):
            named = named[1:]  # self or cls
        named += [each for each in (arguments.vararg, arguments.kwarg) if each]
        lacks = [each.arg for each in named if each.annotation is None] + ["return"] * (function.returns is None)
        if lacks:
            found.append(f"{function.lineno} {name}: {', '.join(lacks)}")
    return found


def _name(decorator: ast.expr) -> str:
    return getattr(decorator, "id", "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_functions_are_typed(file):
    assert untyped(file.read_text(encoding="utf-8")) == []


def test_what_lacks_a_type_is_found():
    source = """
def a(x: int, *rest: int, y: int = 1, **more: int) -> int: ...
def b(x, *rest, y=1, **more) -> int: ...
def c(x: int): ...
def _d(x): ...
def main(arguments=None): ...
class E:
    def __init__(self, x): ...
    def f(self) -> None: ...
    def g(self, x) -> None: ...
    @staticmethod
    def h(x) -> None: ...
    @classmethod
    def i(cls) -> None: ...
    def _j(self, x): ...
class _K:
    def l(self, x): ...
"""
    assert untyped(source) == ["3 b: x, y, rest, more", "4 c: return", "10 E.g: x", "12 E.h: x"]
