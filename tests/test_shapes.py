"""The shapes that docstrings state are those of the arrays that go in and come out.

A docstring says `x [B, T, D], key and value [B, K, S, H] -> [B, T, D] and one (key, value), each [B, K, S, H].` Before
the arrow a shape stands behind the arguments that have it; behind the arrow, up to the end of the sentence, stands one
for each result, or one for all. A letter is one number throughout a docstring: the one that the configuration gives it,
if it does. `in [-1, 1]` is a range, not a shape.

The reference's functions are run; test_parity.py holds the twins to the same shapes, so theirs are read beside the same
arrays.
"""

import importlib
import inspect
import re
from functools import cache

import numpy as np
import pytest

import numpy_ref.model
from torch_impl.model.segmentation import Codec, CodecConfig

from .cases import CASES, Case, normal, random_like, with_dtype
from .models import CONFIGS, random_batch, random_params
from .parity import cast
from .test_mirror import CASES as MIRRORED
from .test_mirror import EXPORTED, public_functions

SHAPE = re.compile(r"(?<![\w\]])\[(?P<axes>[^\[\]]*)\]")
RANGE = re.compile(r"\bin $")
#: At the end of what stands before a shape: `key and value (already scaled) each `.
NAMES = re.compile(r"(?P<names>(?:\w+(?:, | and ))*\w+)`?(?: \([^()]*\))?(?: each)? (?:\{\w+: )?$")
#: Attributes of configurations, and arguments, that are the number of an axis.
LETTERS = {
    "image_size": "S", "patches": "P", "length": "L", "vocab": "V", "width": "D", "heads": "N", "kv_heads": "K",
    "head_dim": "H", "capacity": "C",
}  # fmt: skip


class ShapeError(AssertionError):
    """A docstring that does not say what is so."""


# --- reading -----------------------------------------------------------------------------------------------


def statements(doc: str) -> tuple[dict[str, str], list[str]]:
    """The shapes that a docstring states: {argument: axes}, and the axes of the results."""
    doc = " ".join(line.strip() or "\n" for line in (doc or "").splitlines())
    head, arrow, tail = doc.partition("->")
    arguments = {}
    for match in SHAPE.finditer(head):
        before = head[: match.start()]
        if RANGE.search(before):
            continue
        if not (names := NAMES.search(before)):
            raise ShapeError(f"[{match['axes']}] belongs to no argument")
        arguments |= dict.fromkeys(re.split(r", | and ", names["names"]), match["axes"])
    sentence = re.split(r"\.\s|\n", tail + "\n")[0]
    results = [match["axes"] for match in SHAPE.finditer(sentence) if not RANGE.search(sentence[: match.start()])]
    if arrow and "one number" in sentence:
        results.append("")
    return arguments, results


# --- comparing ---------------------------------------------------------------------------------------------


def check(doc: str, arguments: dict, result, parameters=()) -> None:
    """Raise ShapeError unless a docstring states the shapes of all results, and of no argument another than it has.

    `parameters` are the names of arguments besides those that are given.
    """
    stated, results = statements(doc)
    if unknown := stated.keys() - arguments.keys() - set(parameters):
        raise ShapeError(f"no argument is called {', '.join(sorted(unknown))}")
    pairs = [(name, axes, array) for name, axes in stated.items() for array in leaves(arguments.get(name))]
    outputs = result if isinstance(result, tuple) else (result,)
    if len(results) == 1:
        results = results * len(outputs)
    if len(results) != len(outputs):
        raise ShapeError(f"{len(results)} shapes are stated for {len(outputs)} results")
    pairs += [("result", axes, array) for axes, each in zip(results, outputs, strict=True) for array in leaves(each)]
    unify(pairs, axes_of(arguments))


def unify(pairs: list, known: dict) -> None:
    """Raise ShapeError unless one number for each letter makes all of (what, axes, array) true, `known` ones included."""
    aligned = [(what, axis, size) for what, axes, array in pairs for axis, size in align(what, axes, array.shape)]
    for what, axis, size in sorted(aligned, key=lambda each: not is_name(each[1])):  # names first, then what uses them
        number = known.setdefault(axis, size) if is_name(axis) else evaluate(axis, known)
        if number != size:
            raise ShapeError(f"{what}: {axis} is {number} elsewhere, here {size}")


def leaves(tree) -> list:
    """The arrays of a nested structure."""
    if isinstance(tree, dict | list | tuple):
        return [array for branch in (tree.values() if isinstance(tree, dict) else tree) for array in leaves(branch)]
    return [tree] if isinstance(tree, np.ndarray | np.generic) else []


def axes_of(arguments: dict) -> dict:
    """The numbers that the configuration and whole numbers among the arguments give to axes."""
    known = {LETTERS.get(name, name): value for name, value in arguments.items() if type(value) is int}
    config = arguments.get("config")
    for part in (config, getattr(config, "vision", None), getattr(config, "text", None)):
        known |= {LETTERS[name]: getattr(part, name) for name in LETTERS if hasattr(part, name)}
    pictures = arguments.get("pixel_values", arguments.get("images"))
    if pictures is not None and "input_ids" in arguments:  # N is then how many of them a row has
        known["N"] = len(pictures) // len(arguments["input_ids"])
    return known


def align(what: str, stated: str, shape: tuple) -> list[tuple[str, object]]:
    """Each axis that is stated beside its size; `...` stands for any number of them, and is beside a tuple."""
    axes = [axis.strip() for axis in stated.split(",")] if stated else []
    if "..." in axes:
        at, rest = axes.index("..."), len(shape) - len(axes) + 1
        shape = (*shape[:at], shape[at : at + rest], *shape[at + rest :]) if rest >= 0 else shape
    if len(axes) != len(shape):
        raise ShapeError(f"{what}: [{stated}] is not {list(shape)}")
    return list(zip(axes, shape, strict=True))


def is_name(axis: str) -> bool:
    return axis == "..." or re.fullmatch(r"[A-Za-z_]\w*'?", axis) is not None


def evaluate(axis: str, known: dict) -> int:
    """A number, or arithmetic with axes: `H/2`, `N*H`."""
    try:
        return eval(axis.replace("/", "//"), {"__builtins__": {}}, known)
    except (NameError, SyntaxError):
        raise ShapeError(f"[{axis}] is not to be had from {sorted(known)}") from None


# --- what is run -------------------------------------------------------------------------------------------


def model_cases():
    """Functions that test_models.py and test_sampling.py compare, so that the case table need not have them."""
    config = CONFIGS["paligemma2"]
    params = random_params(config, dtype=np.float32)
    pixel_values, input_ids, lengths = random_batch(config)
    batch = {"p": params, "config": config, "pixel_values": pixel_values, "input_ids": input_ids, "lengths": lengths}
    slots = (len(lengths), config.text.kv_heads, 29, config.text.head_dim)
    cached = [(np.zeros(slots, np.float32),) * 2] * config.text.depth
    for name, dropped, added in [
        ("encode_image", {"input_ids", "lengths"}, {}),
        ("embed_prefix", {"lengths"}, {}),
        ("forward", {}, {"prefix_lengths": lengths - 2}),
        ("hidden_states", {}, {"prefix_lengths": lengths - 2}),
        ("prefill", {}, {"capacity": 29}),
        ("decode", {"pixel_values"}, {"input_ids": input_ids[:, -1:], "cache": cached}),
        ("extend", {"pixel_values"}, {"input_ids": input_ids[:, -3:], "cache": cached}),
        ("further_states", {"pixel_values"}, {"input_ids": input_ids[:, -3:], "cache": cached}),
    ]:
        arguments = {key: value for key, value in batch.items() if key not in dropped} | added
        yield Case(name, "paligemma", name, lambda r, arguments=arguments: arguments, torch=f"PaliGemma.{name}")
    text = config.text
    given = {
        "p": params["text"], "config": text, "x": np.zeros((len(lengths), 1, text.width), np.float32),
        "positions": lengths[:, None], "masks": dict.fromkeys({*text.windows, None}, np.ones((len(lengths), 1, 29), bool)),
        "cache": cached, "start": lengths,
    }  # fmt: skip
    yield Case("gemma.decoder with a cache", "gemma", "decoder", lambda r: given, torch="Decoder")
    last = lambda r: {"x": normal(r, 3, 5, 11), "lengths": np.array([1, 5, 3])}  # noqa: E731
    yield Case("last_position", "paligemma", "last_position", last)


def other_cases():
    """Casts, sampling, the codec's way from masks to tokens, masks in a picture."""
    codec = random_like(Codec(CodecConfig(8, 5)))
    mask = np.zeros((90, 130), bool)
    for module, function, arguments in [
        ("layers", "upcast", lambda r: {"x": normal(r, 3, 5)}),
        ("layers", "cast_like", lambda r: {"weight": normal(r, 3, 5), "x": np.float32(0)}),
        ("layers", "matmul", lambda r: {"x": normal(r, 2, 3, 5), "y": normal(r, 2, 5, 7)}),
        ("sampling", "sample", lambda r: {"logits": normal(r, 3, 7), "known": np.ones(7, bool), "temperature": 1.0,
                                          "uniform": r.uniform(size=3)}),
        ("sampling", "log_probability", lambda r: {"logits": normal(r, 3, 7), "token": np.array([2, 0, 6])}),
        ("sampling", "likeliest", lambda r: {"logits": normal(r, 3, 7), "among": np.arange(7) > 0, "count": 2,
                                             "ends": np.array([0, 4, 5, 6])}),
        ("sampling", "location_spread", lambda r: {"logits": normal(r, 3, 7), "locations": np.arange(2, 7)}),
        ("sampling", "keep_top_p", lambda r: {"weights": r.uniform(size=(3, 7)), "top_p": 0.5}),
        ("sampling", "invert_cdf", lambda r: {"weights": r.uniform(size=(3, 7)), "uniform": r.uniform(size=3)}),
        ("segmentation", "quantize", lambda r: {"vectors": normal(r, 2, 3, 5), "codebook": codec["codebook"]}),
        ("segmentation", "crop", lambda r: {"mask": mask, "box": (0.1, 0.2, 0.5, 0.9)}),
        ("segmentation", "paste", lambda r: {"mask": normal(r, 64, 64), "box": (3, 5, 60, 70), "width": 130, "height": 90}),
        ("contrastive", "recall_at_1", lambda r: {"image": normal(r, 5, 7), "text": normal(r, 5, 7)}),
    ]:  # fmt: skip
        yield Case(function, module, function, arguments)
    masks = lambda r: {"p": codec, "masks": normal(r, 2, 64, 64)}  # noqa: E731
    yield Case("encode", "segmentation", "encode", masks, torch="Codec.encode")


PACKAGES = ("numpy_ref", "torch_impl", "export")
ALL = [*CASES, *model_cases(), *other_cases()]
#: Functions of the reference whose arguments or results are no arrays.
WITHOUT_SHAPES = {"identity", "scoped", "spell", "run_lengths", "names", "load", "find", "decoder_of"}


def documented(package: str, case: Case):
    """What carries the case's function in a package, a function, a method or a module; None if it has none."""
    try:
        module = importlib.import_module(f"{package}.model.{case.module}")
    except ModuleNotFoundError:
        return None
    path = case.torch if package == "torch_impl" and case.torch else case.function
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


RUNS = [(package, case) for package in PACKAGES for case in ALL if documented(package, case)]


@cache
def run(case: Case):
    """The case's arguments, and what the reference gives for them."""
    arguments = cast(with_dtype(case, np.float32).arguments(np.random.default_rng(0)), np.float32)
    return arguments, documented("numpy_ref", case)(**arguments)


# --- the tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "case"), RUNS, ids=[f"{package}-{case.name}" for package, case in RUNS])
def test_docstrings_state_the_shapes(package, case):
    parameters = inspect.signature(documented("numpy_ref", case)).parameters
    check(documented(package, case).__doc__, *run(case), parameters)


@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_the_reference_states_the_shape_of_every_array(case):
    arguments, _ = run(case)
    arrays = {name for name, value in arguments.items() if name != "p" and any(leaf.ndim for leaf in leaves(value))}
    assert arrays <= statements(documented("numpy_ref", case).__doc__)[0].keys()


def test_no_function_is_left_out():
    held = {package: {(case.module, case.function) for each, case in RUNS if each == package} for package in PACKAGES}
    files = {file: getattr(numpy_ref.model, file) for file, _ in held["numpy_ref"]}
    public = {(file, name) for file, module in files.items() for name in public_functions(module)}
    assert {name for _, name in public - held["numpy_ref"]} == WITHOUT_SHAPES
    assert set(MIRRORED) <= held["torch_impl"]
    assert set(EXPORTED) <= held["export"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_whose_shape_is_stated_is_given_in_some_case(package):
    given, stated = set(), set()
    for each, case in RUNS:
        if each == package:
            given |= {(case.module, case.function, name) for name in run(case)[0]}
            names = statements(documented(package, case).__doc__)[0]
            stated |= {(case.module, case.function, name) for name in names}
    assert stated
    assert stated <= given


@pytest.mark.parametrize(("package", "case"), RUNS, ids=[f"{package}-{case.name}" for package, case in RUNS])
def test_a_falsified_shape_is_found(package, case):
    """Each shape in turn that the docstring states of an array at hand: with an axis more, and with a wrong number."""
    doc, (arguments, result) = documented(package, case).__doc__, run(case)
    shapes, results = statements(doc)
    falsified = 0
    for match in SHAPE.finditer(doc):
        for axes in (f"{match['axes']}, 1", re.sub(r"^[^,]+", "23", match["axes"])):
            false = doc[: match.start("axes")] + axes + doc[match.end("axes") :]
            false_shapes, false_results = statements(false)
            if false_results != results or any(
                false_shapes[name] != shapes[name] for name in shapes if name in arguments
            ):
                falsified += 1
                with pytest.raises(ShapeError):
                    check(false, arguments, result, shapes)
    assert falsified >= 2 or "one number" in doc


@pytest.mark.parametrize(("doc", "reason"), [
    ("x [B, D] -> [B, D].", None),
    ("Of x [..., D], values in [-1, 1], with y [B] in [0, 1) -> int64 [..., D] in [-1, 1].", None),
    ("x (already scaled) [B, D] -> [B, 1 + 2*size].", None),
    ("x and sin [B, D] -> [B, D].", "no argument is called sin"),
    ("x [B, D] -> [B].", "not"),
    ("x [B, D] -> [D, B].", "elsewhere"),
    ("x [B, D] -> [B, D/2].", "elsewhere"),
    ("x [B, D] -> [B, 2*F].", "not to be had"),
    ("x [B, D] -> [B, D] and [B].", "2 shapes are stated for 1"),
    ("x [B, D] -> one number.", "not"),
    ("x [B, D], without a result.", "0 shapes are stated for 1"),
    ("z [B, D] -> [B, D].", "no argument is called z"),
    ("[B, D] -> [B, D].", "belongs to no argument"),
    ("x [size, D] -> [size, D].", "elsewhere"),
    ("x [N, D] -> [N, D].", "elsewhere"),
    ("x [B, D], w [B] -> [B, D].", "no argument is called w"),
    (None, "0 shapes"),
])  # fmt: skip
def test_a_checked_statement(doc, reason):
    arguments = {"x": np.zeros((3, 5)), "y": np.zeros(3), "size": 2, "heads": 7}
    if reason is None:
        check(doc, arguments, np.zeros((3, 5)))
    else:
        with pytest.raises(ShapeError, match=re.escape(reason)):
            check(doc, arguments, np.zeros((3, 5)))


def test_several_results():
    pair = (np.zeros((2, 3)), [np.zeros((2, 5)), np.zeros((2, 5))])
    check("x [B, D] -> [B, D] and a pair, each [B, F].", {"x": np.zeros((2, 3))}, pair)
    with pytest.raises(ShapeError, match="F is 5 elsewhere, here 7"):
        check(
            "x [B, D] -> [B, D] and a pair, each [B, F].",
            {"x": np.zeros((2, 3))},
            (pair[0], [pair[1][0], np.zeros((2, 7))]),
        )
