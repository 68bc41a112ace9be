"""Who imports whom: no circle in a package, and no arrow between the siblings; lazy and computed imports count."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from export import bundle, serve
from export.gpu_check.command import STAGES
from numpy_ref.checkpoint import SHIPPED

ROOT = Path(__file__).parent.parent
PACKAGES = ("numpy_ref", "torch_impl", "export")


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, source: str | None = None) -> set[str]:
    """The modules of this project that a module imports, anywhere in it, by statement or by `import_module("name")`."""
    file = modules()[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            inside = names & modules().keys()
            found |= inside | ({base} if names - inside else set())
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return {name for name in found if name in modules() and name != module}


def _name(function) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def circle(graph) -> list[str]:
    """Modules that import each other in a ring, or none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph.get(module, ())):
            if ring := visit(other):
                return ring
        done.add(path.pop())
        return []

    return next((ring for module in sorted(graph) if (ring := visit(module))), [])


def test_there_is_no_circle():
    assert circle({module: imports(module) for module in modules()}) == []


@pytest.mark.parametrize(("package", "sibling"), [
    ("numpy_ref", "torch_impl"), ("numpy_ref", "export"), ("torch_impl", "export"), ("export", "torch_impl"),
])  # fmt: skip
def test_siblings_do_not_know_each_other(package, sibling):
    for module in modules():
        if module.split(".")[0] == package:
            assert not any(name.split(".")[0] == sibling for name in imports(module)), module


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("source", [
    "def f():\n    from ..generate import generate", "import importlib\nimportlib.import_module('numpy_ref.generate')",
    "from .. import generate", "import numpy_ref.generate",
])  # fmt: skip
def test_every_kind_of_import_is_seen(source):
    assert imports("numpy_ref.checkpoint.tree", source) == {"numpy_ref.generate"}


def test_the_mirror_has_one_folder_a_package():
    folders = {package: {file.stem for file in (ROOT / package / "model").glob("*.py")} for package in PACKAGES}
    assert folders["numpy_ref"] >= {"layers", "siglip", "gemma", "paligemma", "segmentation", "contrastive", "sampling"}
    assert folders["torch_impl"] <= folders["numpy_ref"]
    assert folders["export"] >= folders["numpy_ref"] - {"contrastive"}


# --- what moving a file could break ------------------------------------------------------------------------


def test_the_shipped_bundle_is_made_again_when_any_source_changes():
    """The key of the user's cache is of every module of the two packages, whatever folder it is in."""
    expected = {file for package in ("numpy_ref", "export") for file in (ROOT / package).rglob("*.py")}
    assert set(bundle.sources()) == expected
    assert len({file.parent for file in expected}) > 10


def test_what_lies_beside_the_code_is_found():
    assert (SHIPPED / "model.safetensors").is_file()
    assert {folder.name for folder in serve.HOSTS.iterdir()} >= {"common", "node", "web"}
    assert all((serve.HOSTS / "web" / name).is_file() for name in serve.PAGE_FILES)


def test_modules_named_by_strings_exist():
    for module in STAGES.values():
        assert importlib.util.find_spec(module), module
