"""numpy_ref/README.md: what its blocks print is what they print today, and what it says of the model is so."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from numpy_ref import checkpoint
from numpy_ref.__main__ import main
from numpy_ref.image import open_image, preprocess
from numpy_ref.model import paligemma
from numpy_ref.tokenizer import Tokenizer

from . import walk

PAGE = walk.PAGE.read_text(encoding="utf-8")
EXAMPLE = checkpoint.SHIPPED / "example.png"
LINES, FILES = 305, 6  # of the way from pixels to logits; measured 305 in 6


def test_every_output_is_what_its_line_prints():
    page, changed = walk.renew(PAGE)
    hint = "the page shows something else: read why, then run `python -m tests.walk`, which writes what is printed now"
    assert not changed, hint
    assert page == PAGE


def test_there_is_no_output_without_a_command():
    """Other fences hold a command, or one of the two drawings."""
    others = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    drawings = [body for kind, body in others if kind not in ("pycon", "console", "sh")]
    assert [drawing[:7] for drawing in drawings] == ["picture", "B batch"]


def test_a_changed_output_is_found():
    page = "a\n```pycon\n>>> x = 2\n>>> for i in range(x):\n...     i\n0\n{}\n\n>>> x\n{}\n```\nb\n"
    page += "```console\n$ echo 1; echo\n1\n\n$ echo 3.14159\n{}\n```\n"
    right = page.format(1, 2, 3.1415)
    assert walk.renew(right) == (right, [])
    renewed, changed = walk.renew(page.format(2, 3, 3.2))
    assert renewed == page.format(1, 2, 3.14159)
    assert changed == ["for i in range(x):\n    i", "x", "echo 3.14159"]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("float32  -2.496 … 2.866   a.b", "float32  -2.497 … 2.866 a.b", True),
        ("-5 … 1e-09", "-4.999 … 2.1e-09", True),
        ("2.50", "2.52", False),
        ("[1, 68]", "[1, 69]", False),
        ("1", "2", False),
        ("1.5 a", "1.5 b", False),
        ("1.5", "1.5 2.5", False),
        ("", "1.5", False),
        ("1.5", "nan", False),
    ],
)
def test_agreement(shown, printed, same):
    assert walk.agree(shown, printed) == same


def test_a_command_that_fails_is_not_an_output():
    with pytest.raises(RuntimeError, match="no such picture"):
        walk.run_command('python -m numpy_ref missing.png "caption en"')


def test_the_map_has_the_shapes_of_the_trace(capsys):
    main([str(EXAMPLE), "caption en", "--trace"])
    traced = re.findall(r" \[(.*?)\] ", capsys.readouterr().out)
    shapes = {re.sub(r"[\w*-]+=", "", shape) for shape in traced}
    (drawing,) = re.findall(r"^```\n(picture.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    drawn = re.findall(r"\[(.*?)\]", drawing)
    assert len(drawn) == 9
    for shape in drawn:
        assert shape in shapes, shape


def test_functions_that_it_names_exist():
    folder = walk.PAGE.parent
    sources = {file.stem: file.read_text() for file in folder.rglob("*.py")}
    functions = re.findall(r"`(siglip|gemma|layers|paligemma|sampling|image|generate)\.(?!py\b)(\w+)`", PAGE)
    assert len(functions) >= 5
    for module, name in functions:
        assert f"def {name}(" in sources[module], (module, name)


def test_the_way_from_pixels_to_logits_is_short():
    """The lines of every function that runs, docstrings included, while a picture becomes logits."""
    loaded = checkpoint.load(checkpoint.SHIPPED)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    ids, image = np.array([tokenizer.prompt("caption en")]), open_image(EXAMPLE)
    ran, folder, before = set(), str(walk.PAGE.parent), sys.gettrace()
    try:
        sys.settrace(lambda frame, event, argument: ran.add(frame.f_code))
        pixel_values = preprocess(image, loaded.config.vision.image_size)
        paligemma.prefill(loaded.params, loaded.config, pixel_values, ids, np.array([ids.shape[1]]), ids.shape[1])
    finally:
        sys.settrace(before)
    functions = {code for code in ran if code.co_filename.startswith(folder) and "<" not in code.co_name}
    lines = {(code.co_filename, line) for code in functions for line in span(code)}
    assert {Path(code.co_filename).name for code in functions} >= {"image.py", "siglip.py", "gemma.py", "layers.py"}
    assert len({file for file, _ in lines}) <= FILES
    assert 150 < len(lines) <= LINES


def span(code) -> range:
    """The lines of a function, from its `def` to its end."""
    lines, first = inspect.getsourcelines(code)
    return range(first, first + len(lines))
