"""A parameter tree, nested dicts and lists, and the same flat, by dotted path."""

from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict:
    """{"a": [{"b": x}]} -> {"a.0.b": x}."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(flat: dict) -> Any:
    """The inverse of `flatten`: levels whose keys are all numbers become lists."""
    if "" in flat:
        return flat[""]
    groups: dict[str, dict] = {}
    for path, value in flat.items():
        head, _, rest = path.partition(".")
        groups.setdefault(head, {})[rest] = value
    tree = {head: unflatten(group) for head, group in groups.items()}
    return [tree[str(i)] for i in range(len(tree))] if all(head.isdigit() for head in tree) else tree
