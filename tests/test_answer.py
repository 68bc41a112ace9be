"""From picture and prompt to an answer, on engines that give the tokens that a test wants."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from export import session
from numpy_ref import checkpoint
from numpy_ref.answer import DEFAULT_NEW_TOKENS, Answer, answer, answer_all, ask, fit
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.tokenizer import Tokenizer
from torch_impl.load import ModuleEngine, TorchEngine

CONFIG = checkpoint.load_config(checkpoint.SHIPPED)
CODES = tuple(range(16))
BOX = "<loc0000><loc0000><loc0512><loc1023>" + "".join(f"<seg{code:03d}>" for code in CODES)
TEXT = f"{BOX} star ; <loc0512><loc0000><loc1023><loc1023> ring"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(checkpoint.SHIPPED, CONFIG)


class Fixed(Engine):
    """An engine that answers each row with the tokens given for it, and then with eos."""

    name = "fixed"

    def __init__(self, *rows, masks=None, max_length=None):
        super().__init__(CONFIG, masks=masks, max_length=max_length)
        self.rows = rows

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        self.pixel_values = pixel_values
        return self.logits(0), 1

    def decode(self, input_ids, lengths, step):
        return self.logits(step), step + 1

    def reorder(self, step, rows):
        self.rows = [self.rows[row] for row in rows]
        return step

    def logits(self, step):
        logits = np.zeros((len(self.rows), CONFIG.text.vocab), np.float32)
        for row, tokens in zip(logits, self.rows, strict=True):
            row[tokens[step] if step < len(tokens) else CONFIG.eos] = 1
        return logits


def picture(width=40, height=20):
    return Image.new("RGB", (width, height), "teal")


def test_the_engines_are_engines():
    for kind in (NumpyEngine, ModuleEngine, TorchEngine, session.Session, session.DeviceSession, session.HostSession):
        assert issubclass(kind, Engine)
    with pytest.raises(TypeError, match="abstract"):
        Engine(CONFIG)


def test_what_an_engine_need_not_say():
    """Its own limit is the model's, its pictures are those of `image.preprocess`, its draws those of `sampling`."""
    engine = Fixed([5])
    assert (engine.max_length, engine.resize, engine.masks) == (CONFIG.max_length, "bicubic", None)
    assert engine.preprocess(picture()).shape == (1, 3, CONFIG.vision.image_size, CONFIG.vision.image_size)
    assert engine.sample(engine.logits(0), np.ones(CONFIG.text.vocab, bool)).tolist() == [5]
    assert engine.first_not_finite(None, None, None, None) is None
    assert Fixed([5], max_length=90).max_length == 90


def test_an_answer_has_text_boxes_and_masks(tokenizer):
    asked = []

    def decode(codes):
        asked.append(codes.tolist())
        return np.ones((1, 64, 64), np.float32)

    engine, ids = Fixed(tokenizer.encode(TEXT), masks=decode), tokenizer.encode(TEXT)
    found = answer(engine, tokenizer, picture(), "segment star")
    assert (found.text, found.tokens) == (TEXT, ids)
    assert [box.label for box in found.boxes] == ["star", "ring"]
    assert found.boxes[0].corners == pytest.approx((0, 0, 40, 10), abs=0.02)
    assert found.timings.decode_tokens == len(ids)
    assert asked == []  # masks are painted when somebody looks at them
    mask, nothing = found.masks
    assert asked == [[list(CODES)]]
    assert nothing is None
    assert mask.shape == (20, 40)
    assert mask[:10].all()
    assert not mask[11:].any()
    boxes = [box.as_json() for box in found.boxes]
    assert {**found.as_json(), "logprobs": None} == {"text": TEXT, "tokens": ids, "logprobs": None, "boxes": boxes}


def test_an_answer_about_the_picture_in_another_size():
    found = Answer(TEXT, [], 1, 1, decode_masks=lambda codes: np.ones((1, 64, 64)))
    larger = replace(found, width=400, height=200)
    assert larger.boxes[1].corners == pytest.approx((0, 100, 400, 200), abs=0.2)
    assert larger.masks[0].shape == (200, 400)
    assert Answer(TEXT, [], 1, 1).masks == [None, None]


def test_other_locations_by_another_convention(tokenizer):
    engine = Fixed(tokenizer.encode(TEXT))
    found = answer(engine, tokenizer, picture(1024, 1024), "detect star", boxes="huggingface")
    assert found.boxes[0].corners == (0, 0, 1023, 512)


def test_text_comes_in_pieces(tokenizer):
    """Joined they are the text; half a character is not among them until the end."""
    smiley = tokenizer.encode("a 🙂 star")
    for ids in (smiley, smiley[:-2], tokenizer.encode("red star"), []):
        pieces = []
        found = answer(Fixed(ids), tokenizer, picture(), "caption en", on_text=pieces.append)
        assert "".join(pieces) == found.text == tokenizer.decode(ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])


def test_a_batch_answers_as_its_rows(tokenizer):
    texts, sizes = ["star", TEXT, ""], [(40, 20), (10, 30), (7, 7)]
    rows = [tokenizer.encode(text) for text in texts]
    engine = Fixed(*rows)
    questions = [
        ask(engine, picture(*size), *fit(engine, tokenizer, prompt, most))
        for size, prompt, most in zip(sizes, ["caption en", "detect star ; ring", "x"], [None, 4, 5], strict=True)
    ]
    found = answer_all(engine, tokenizer, questions)
    assert [each.tokens for each in found] == [rows[0], rows[1][:4], []]
    assert [(each.width, each.height) for each in found] == sizes
    assert len(engine.pixel_values) == 3


def test_an_answer_about_several_pictures(tokenizer):
    """The ids have places for all, in order; boxes and masks are in pixels of the first."""
    engine = Fixed(tokenizer.encode(TEXT), masks=lambda codes: np.ones((1, 64, 64), np.float32))
    engine.ids = None

    def prefill(pixel_values, input_ids, lengths, capacity):
        engine.pixel_values, engine.ids = pixel_values, input_ids[0].tolist()
        return engine.logits(0), 1

    engine.prefill = prefill
    shown = [picture(40, 20), Image.new("RGB", (9, 90), "red")]
    found = answer(engine, tokenizer, shown, "segment star")
    assert engine.ids == tokenizer.prompt("segment star", 2)
    assert engine.ids.count(CONFIG.image_token) == 2 * CONFIG.vision.patches
    assert np.array_equal(engine.pixel_values, np.concatenate([engine.preprocess(each) for each in shown]))
    assert (found.width, found.height) == (40, 20)
    assert found.boxes[0].corners == pytest.approx((0, 0, 40, 10), abs=0.02)
    assert found.masks[0].shape == (20, 40)
    one = answer(engine, tokenizer, shown[:1], "segment star")
    assert engine.ids == tokenizer.prompt("segment star")
    assert one.text == TEXT
    with pytest.raises(PaliGemmaError, match="a list of no pictures; a prompt needs at least one"):
        answer(engine, tokenizer, [], "segment star")


def test_several_pictures_take_room(tokenizer):
    patches = CONFIG.vision.patches
    size = len(tokenizer.prompt("caption en", 2))
    assert size == 2 * patches + len(tokenizer.prompt("caption en")) - patches
    assert fit(Fixed(), tokenizer, "caption en", pictures=2)[0] == tokenizer.prompt("caption en", 2)
    for limit in (size - 1, 2 * patches):
        with pytest.raises(PaliGemmaError, match=f"{2 * patches} of them the pictures.* {limit}; give fewer pictures"):
            fit(Fixed(max_length=limit), tokenizer, "caption en", pictures=2)
    with pytest.raises(PaliGemmaError, match=f"{10**6} pictures take {patches * 10**6} positions, more than the"):
        fit(Fixed(), tokenizer, "caption en", pictures=10**6)


def test_how_long_an_answer_may_be(tokenizer):
    """As long as asked for; else the default, or what room there is. What does not fit is refused."""
    prompt = "caption en"
    size = len(tokenizer.prompt(prompt))
    assert fit(Fixed(), tokenizer, prompt) == (tokenizer.prompt(prompt), DEFAULT_NEW_TOKENS)
    assert fit(Fixed(), tokenizer, prompt, 7)[1] == 7
    for room in (1, 5):
        assert fit(Fixed(max_length=size + room - 1), tokenizer, prompt)[1] == room
    for most, limit in ((None, size - 1), (6, size + 4)):
        with pytest.raises(PaliGemmaError, match=f"{size} tokens .* exceeds the capacity of {limit}"):
            fit(Fixed(max_length=limit), tokenizer, prompt, most)
