"""One import: `PaliGemma.load(...).answer(...)`; pictures as people have them, many prompts, many threads, clear errors."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

from export import PaliGemma
from export.cli import run_onnx, run_onnx_batch
from export.session import Session
from numpy_ref import api, cli
from numpy_ref.__main__ import load as load_numpy
from numpy_ref.__main__ import main as numpy_main
from numpy_ref.answer import Album, Picture
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.show import Piecewise, line, one_of_several
from numpy_ref.detection import Box
from numpy_ref.engine import Engine
from numpy_ref.errors import PaliGemmaError
from torch_impl.__main__ import main as torch_main

EXAMPLE = SHIPPED / "example.png"
PROMPTS = ["detect star", "caption en", "segment star", "answer en how many shapes are there?"]
MAINS = {"run-onnx": run_onnx, "numpy": numpy_main, "torch": torch_main}


@pytest.fixture(scope="module")
def model():
    return PaliGemma.load(provider="cpu")


@pytest.fixture(scope="module")
def alone():
    """What each prompt is answered with where nothing is shared."""
    return [PaliGemma.load(provider="cpu").answer(EXAMPLE, prompt) for prompt in PROMPTS]


@pytest.fixture
def encoded(model, monkeypatch):
    """How many pictures went through the vision tower, each time."""
    calls, encode = [], Session.encode
    monkeypatch.setattr(Session, "encode", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels))
    return calls


def same(found, expected):
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_the_import_is_lazy_and_telemetry_stays_off():
    code = "import sys, os, export; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY']); "
    code += "from export import PaliGemma; print(PaliGemma.__module__, 'onnxruntime' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "1", "export.api", "True"]
    with pytest.raises(ImportError):
        from export import PaliGemm  # noqa: F401


def test_an_answer(model):
    found = model.answer(str(EXAMPLE), "segment star")
    assert found.text
    assert found.tokens
    (box,) = found.boxes
    assert box.label == "star"
    assert 0 < box.score <= 1
    assert found.masks[0].shape == (found.height, found.width) == (224, 224)
    assert found.timings.prefill_s > 0


def test_pictures_as_people_have_them(model, alone, tmp_path):
    with Image.open(EXAMPLE) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    for picture in (
        str(EXAMPLE),
        EXAMPLE,
        image,
        pixels,
        [EXAMPLE],
        (image,),
        np.dstack([pixels, pixels[:, :, 0] * 0 + 255]),
    ):
        same([model.answer(picture, PROMPTS[0])], alone[:1])
    two = model.answer([EXAMPLE, image], "caption en")
    assert two.tokens == model.answer((pixels, EXAMPLE), "caption en").tokens


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("absent.png", "absent.png: no such picture"), (SHIPPED, "a folder, not a picture"), ([], "a list of no pictures"),
        (np.zeros((4, 4, 3)), "an array of float64 [4, 4, 3] is no picture"), (5, "a int is no picture"),
        (np.zeros((4, 4, 2), np.uint8), "uint8 [4, 4, 2] is no picture"), (np.zeros((0, 4), np.uint8), "[0, 4] is no picture"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_picture(model, picture, words):
    for ask in (model.answer, lambda p, q: model.answer_all([(p, q)]), lambda p, q: model.picture(p).answer(q)):
        with pytest.raises(PaliGemmaError) as error:
            ask(picture, "caption en")
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature is -1"), ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("nan")}, "temperature is nan"), ({"top_p": 1.5}, "top_p is 1.5"), ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"), ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"boxes": "coco"}, "boxes is 'coco'"),
        ({"max_new_tokens": 10**6}, "exceeds the capacity"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be(model, options, words):
    for ask in (model.answer, lambda p, q, **o: model.answer_all([(p, q)], **o)):
        with pytest.raises(PaliGemmaError) as error:
            ask(EXAMPLE, "caption en", **options)
        assert words in str(error.value)
    with pytest.raises(TypeError, match="no option temprature"):
        model.answer(EXAMPLE, "caption en", temprature=1)


def test_many_prompts_about_a_picture(model, alone, encoded):
    about = model.picture(EXAMPLE)
    same(about.answer_all(PROMPTS), alone)
    same([about.answer(prompt) for prompt in PROMPTS], alone)
    same(about.answer_all(iter(PROMPTS), batch_size=3), alone)
    assert encoded == [1]
    ids, logprobs = about.score(PROMPTS[1], alone[1].text)
    assert ids[:-1] == alone[1].tokens
    assert logprobs[:-1] == pytest.approx(alone[1].logprobs, abs=1e-4)
    assert encoded == [1]


def test_pairs(model, alone, encoded):
    """In any order, of one picture or several; what is named again is looked at once."""
    with Image.open(EXAMPLE) as opened:
        other = opened.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pairs = [(EXAMPLE, PROMPTS[0]), (other, PROMPTS[0]), (EXAMPLE, PROMPTS[1]), ([EXAMPLE, other], "caption en")]
    found = model.answer_all(pairs)
    assert encoded == [2]
    expected = [alone[0], model.answer(other, PROMPTS[0]), alone[1], model.answer([EXAMPLE, other], "caption en")]
    same(found, expected)


def test_sampled_answers_are_those_alone(model):
    options = {"temperature": 2.0, "top_p": 0.95, "seed": 3, "max_new_tokens": 12}
    expected = [model.answer(EXAMPLE, prompt, **options) for prompt in PROMPTS]
    same(model.picture(EXAMPLE).answer_all(PROMPTS, **options), expected)
    same(model.answer_all([(EXAMPLE, prompt) for prompt in PROMPTS], **options), expected)
    assert [each.tokens for each in expected] != [each.tokens for each in model.picture(EXAMPLE).answer_all(PROMPTS)]


def test_a_grammar_and_a_start(model):
    for found in (
        model.answer(EXAMPLE, "detect star", constrain="detect", start="<loc0000>"),
        model.picture(EXAMPLE).answer_all(["detect star"], constrain="detect", start="<loc0000>", lookup=True)[0],
    ):
        assert found.text.startswith("<loc0000>")
        assert found.boxes


def test_threads_share_a_model_and_a_picture(alone, encoded):
    model = PaliGemma.load(provider="cpu")
    about = model.picture(EXAMPLE)

    def ask(i):
        prompt = PROMPTS[i % 4]
        return (about.answer(prompt), model.answer(EXAMPLE, prompt), *about.answer_all([prompt] * 2))

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(ask, range(12))):
            same(found, [alone[i % 4]] * 4)
    assert model.engine._prefill is None
    assert encoded.count(1) >= 1


def test_streams(model, alone):
    pieces = []
    found = model.answer(EXAMPLE, PROMPTS[1], stream=pieces.append)
    assert "".join(pieces) == found.text == alone[1].text
    assert len(pieces) > 3
    with redirect_stdout(io.StringIO()) as printed:
        model.picture(EXAMPLE).answer(PROMPTS[1], stream=True)
    assert printed.getvalue() == alone[1].text


def test_the_reference_too(alone):
    model = api.PaliGemma(*load_numpy(None))
    same(model.picture(EXAMPLE).answer_all(PROMPTS), alone)


def test_an_album_is_bounded():
    made = []

    class Small(Engine):
        prefill = decode = reorder = None

        def __init__(self):
            from .models import CONFIGS

            super().__init__(CONFIGS["paligemma1"])

    def make(key):
        made.append(key)
        return Picture(np.zeros((1, 3, 2, 2), np.float32), 2, 2)

    album = Album(Small(), limit=0)
    assert album.most == 2
    seen = [album.get(key, lambda key=key: make(key)) for key in "abacab"]
    assert made == ["a", "b", "c", "b"]  # the one that was asked for longest ago went
    assert seen[0] is seen[2] is seen[4]
    assert [each.shared for each in seen] == [True, False, True, True, True, True]
    assert len(album.pictures) == 2


# --- the commands ------------------------------------------------------------------------------------------


def call(main, capsys, *arguments):
    capsys.readouterr()
    try:
        code = cli.run("command", main, [str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    return (code, *capsys.readouterr())


@pytest.mark.parametrize("name", MAINS)
def test_several_prompts(name, alone, capsys, tmp_path):
    """A line each, in their order, from wherever they come."""
    expected = [each.text for each in alone]
    code, out, _ = call(MAINS[name], capsys, EXAMPLE, *PROMPTS)
    assert (code, out.splitlines()) == (0, expected)
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\r\n\n{PROMPTS[2]}\n{PROMPTS[3]}")
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    code, out, _ = call(MAINS[name], capsys, EXAMPLE, f"@{tmp_path}/one.txt", "--prompts", tmp_path / "prompts.txt")
    assert (code, out.splitlines()) == (0, expected)
    code, out, _ = call(MAINS[name], capsys, EXAMPLE, "--prompts", tmp_path / "one.txt", "--json")
    assert json.loads(out)["tokens"] == alone[0].tokens


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([EXAMPLE, "a b", "c d", "--draw", "out.png"], 1, "--draw is of one answer; give one prompt"),
        ([EXAMPLE, "a b", "caption", "en"], 2, 'a prompt of several words is quoted: "caption en"'),
        ([EXAMPLE, "--prompts", "absent.txt"], 1, "absent.txt: cannot read the prompt (No such file or directory)"),
        ([EXAMPLE, "--prompts", "empty.txt"], 1, "empty.txt is empty; it has a prompt a line"),
        ([EXAMPLE, "a b", " "], 1, "the prompt is empty"),
        (["--prompts", "empty.txt"], 2, "expected IMAGE PROMPT"),
        (["absent.png", "a b", "c d"], 1, "absent.png: no such picture"),
        ([EXAMPLE, "absent.png", "a b", "c d"], 1, "absent.png: no such picture"),
    ],
    ids=str,
)
def test_what_goes_wrong_with_several(name, arguments, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    found, out, err = call(MAINS[name], capsys, *arguments)
    assert (found, out) == (code, "")
    assert words in err.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("option", ["--trace", "--heatmap=out.png"])
def test_what_the_reference_shows_is_of_one_prompt(option, capsys):
    code, out, err = call(numpy_main, capsys, EXAMPLE, "a b", "c d", option)
    assert (code, out) == (1, "")
    assert "is of one answer; give one prompt" in err


def test_more_prompts_than_a_batch(capsys, monkeypatch):
    prompts = [f"answer en how many {shape}s are there?" for shape in ("star", "ring", "cross", "circle", "square")] * 2
    code, out, _ = call(run_onnx, capsys, EXAMPLE, *prompts)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 10
    assert lines[:5] == lines[5:]


def test_a_row_each_of_a_picture_that_is_named_again(tmp_path, capsys, encoded):
    """The tower sees it once from the second row on; rows are in order, and go on where they were stopped."""
    rows = [{"image": str(EXAMPLE), "prompt": prompt} for prompt in PROMPTS for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for size in (1, 3, 8):
        encoded.clear()
        output = tmp_path / f"{size}.jsonl"
        arguments = ["--input", tmp_path / "rows.jsonl", "--output", output, "--batch-size", size, "--provider", "cpu"]
        assert call(run_onnx_batch, capsys, *arguments)[0] == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(each["row"], each["prompt"]) for each in found] == [(i, row["prompt"]) for i, row in enumerate(rows)]
        assert sum(encoded) == 1
    texts = [(tmp_path / f"{size}.jsonl").read_text() for size in (1, 3, 8)]
    first, *others = ([json.loads(line)["tokens"] for line in text.splitlines()] for text in texts)
    assert others == [first, first]


def test_rows_of_different_pictures_are_not_kept(tmp_path, capsys, encoded):
    with Image.open(EXAMPLE) as picture:
        for i in range(4):
            picture.convert("RGB").rotate(90 * i).save(tmp_path / f"{i}.png")
    output = tmp_path / "out.jsonl"
    assert call(run_onnx_batch, capsys, "--input", tmp_path, "--prompt", "caption en", "--output", output)[0] == 0
    assert encoded == []


# --- a terminal --------------------------------------------------------------------------------------------


def test_boxes_to_read():
    assert line(Box("star", 49.04, 63.4, 98.1, 112.4, score=0.926)) == "star at 49, 63, 98, 112  0.93"
    assert line(Box("", 0, 0, 1, 2, tuple(range(16)), 0.5, 0.25)) == "box at 0, 0, 1, 2  0.50  mask 0.25"
    assert line(Box("ring", 1, 2, 3, 4)) == "ring at 1, 2, 3, 4"


@pytest.mark.parametrize(
    ("pieces", "boxes", "terminal", "pipe"),
    [
        (["a ", "star"], [], "a star\n", "a star\n"),
        (["<loc0001>", "<loc0002> s"], [Box("s", 1, 2, 3, 4)], "s at 1, 2, 3, 4\n", "<loc0001><loc0002> s\n"),
        (["so: ", "<loc0001> s"], [Box("s", 1, 2, 3, 4)], "so: \ns at 1, 2, 3, 4\n", "so: <loc0001> s\n"),
        (["a <", " b"], [], "a < b\n", "a < b\n"),
        ([], [], "\n", "\n"),
    ],
)
def test_a_terminal_and_a_pipe(pieces, boxes, terminal, pipe, monkeypatch):
    class Given:
        text = "".join(pieces)

    answer = Given()
    answer.boxes = boxes
    for is_terminal, expected in ((True, terminal), (False, pipe)):
        written = []
        shown = Piecewise(written.append, is_terminal)
        for piece in pieces:
            shown.push(piece)
        shown.close(answer)
        assert "".join(written) == expected
    assert one_of_several("q", answer, False) == pipe
    assert one_of_several("q", answer, True).startswith("# q\n")


def test_line_breaks_in_one_of_several():
    class Given:
        text, boxes = "a\nb", ()

    assert one_of_several("q", Given(), False) == "a\\nb\n"
