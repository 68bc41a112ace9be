"""Log-probabilities of drawn tokens, against transformers and over all engines; the scores of boxes and masks."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from export import bundle
from export.model import graphs
from export.session import DeviceSession, HostSession, Session
from numpy_ref import checkpoint, detection
from numpy_ref.answer import answer
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling, log_probability
from numpy_ref.tokenizer import Tokenizer, beginnings
from torch_impl.load import TorchEngine

from . import make_goldens
from .fuzz import corpus
from .test_answer import BOX, CODES, TEXT, Fixed
from .test_golden import open_engine

BUDGET = 1e-4  # of a log-probability
NEW_TOKENS = 10
GREEDY, DRAWN = Sampling(), Sampling(temperature=2.0, top_k=50, top_p=0.9, seed=3)
EXAMPLE = checkpoint.SHIPPED / "example.png"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(checkpoint.SHIPPED, checkpoint.load_config(checkpoint.SHIPPED))


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores") / "bundle"
    bundle.write(checkpoint.load(), folder)
    return folder


@pytest.fixture(scope="module")
def old(current, tmp_path_factory):
    """The bundle as an older export wrote it."""
    return without_logprob(shutil.copytree(current, tmp_path_factory.mktemp("old") / "bundle"))


def without_logprob(folder):
    """Take the output `logprob` from a bundle's graphs."""
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    for name in ("sample", "sample_device"):
        outputs = description["graphs"][name]["outputs"]
        description["graphs"][name]["outputs"] = [value for value in outputs if value["name"] != "logprob"]
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))
    for name in ("sample", "sample_device"):
        model = onnx.load(folder / f"{name}.onnx")
        del model.graph.output[1]
        assert [value.name for value in model.graph.output] == ["token"]
        corpus.sealed(folder, f"{name}.onnx", model.SerializeToString())
    return folder


# --- log-probabilities -------------------------------------------------------------------------------------


def test_log_probability_by_hand():
    """A half, and a quarter; far from zero too."""
    logits = np.log(np.array([[1, 2, 1], [1, 2, 1]], np.float32)) + np.array([[0], [1e4]], np.float32)
    found = log_probability(logits, np.array([1, 2]))
    assert found.dtype == np.float32
    assert found == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-3)
    assert found[0] == pytest.approx(math.log(0.5), abs=1e-7)


def transition_scores(model, pixel_values, row, tokens):
    """transformers' log-probabilities of an answer of one row, which it is made to give: [steps]."""
    import torch

    ids = torch.tensor([row])
    out = model.generate(
        input_ids=ids, pixel_values=torch.from_numpy(pixel_values)[None], attention_mask=torch.ones_like(ids),
        token_type_ids=torch.zeros_like(ids), max_new_tokens=len(tokens), do_sample=False, output_logits=True,
        return_dict_in_generate=True, prefix_allowed_tokens_fn=lambda _, found: [tokens[len(found) - len(row)]],
    )  # fmt: skip
    assert out.sequences[0, len(row) :].tolist() == tokens
    return model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)[0].numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_transformers_computes_the_same(kind, tmp_path):
    """Two rows of unequal length, greedy and drawn among half of the ids, by every engine."""
    transformers = pytest.importorskip("transformers", reason="it is compared with transformers")
    make_goldens.build(kind, seed=5).save_pretrained(tmp_path / "hf")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    loaded = checkpoint.load(tmp_path / "hf")
    loaded = replace(loaded, config=replace(loaded.config, eos=2**30, stops=()))  # a random model may draw it
    pixels = make_goldens.pixels(model.config, 2)
    rows = [make_goldens.row_ids(model.config, prefix) for prefix in ([2, 5, 108], [2, 53, 59, 61, 67, 71, 108])]
    half = np.arange(loaded.config.text.vocab) % 2 == 0
    for name in ("numpy", "torch", "onnx"):
        engine = open_engine(name, loaded, tmp_path / "bundle")
        for sampling, known in ((GREEDY, np.ones_like(half)), (DRAWN, half)):
            logprobs = []
            steps = generate(engine, pixels, rows, known, NEW_TOKENS, sampling, logprobs=logprobs)
            tokens = np.stack(list(steps), 1).tolist()
            for i, row in enumerate(rows):
                expected = transition_scores(model, pixels[i], row, tokens[i])
                found = np.stack(logprobs, 1)[i]
                assert found.dtype == np.float32
                assert np.abs(found - expected).max() <= BUDGET, (name, sampling)
                assert expected.min() < -0.5  # not all of them certain


def test_graphs_give_what_numpy_does():
    """Over a real vocabulary, with ids that are never drawn and the likeliest among them."""
    vocab = 257_216
    known = np.arange(vocab) < 257_152
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((3, vocab))).astype(np.float32)
    logits[:, -1] = 25
    uniform = rng.random(3, np.float32)
    for on_device, count in ((False, {"top_k": np.array(40)}), (True, {"count": np.array([40])})):
        model = graphs.serialize(graphs.sample_model(known, on_device))
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_outputs()] == ["token", "logprob"]
        feeds = {"logits": logits, "temperature": np.float32(1.5), "top_p": np.float32(0.9), "uniform": uniform}
        token, logprob = session.run(None, {name: np.asarray(value) for name, value in (feeds | count).items()})
        assert logprob.dtype == np.float32
        assert np.abs(logprob - log_probability(logits, token)).max() <= 2e-5
        assert logprob.max() < -5  # the likeliest takes nearly all


# --- answers -----------------------------------------------------------------------------------------------


def test_every_engine_says_the_same(current, tokenizer):
    """Of the shipped model; the device's session on the CPU too."""
    opened = bundle.load(current)
    engines = [TorchEngine(checkpoint.load()), *(kind(opened, "cpu") for kind in (Session, HostSession, DeviceSession))]
    reference = open_engine("numpy", checkpoint.load(), None)
    for prompt, sampling in (("segment star", GREEDY), ("detect star", DRAWN)):
        asked = {"max_new_tokens": 40, "sampling": sampling}
        expected = answer(reference, tokenizer, open_image(EXAMPLE), prompt, **asked)
        assert expected.boxes
        assert len(expected.logprobs) == len(expected.tokens)
        for engine in engines:
            found = answer(engine, tokenizer, open_image(EXAMPLE), prompt, **asked)
            assert found.tokens == expected.tokens, engine
            assert np.abs(np.subtract(found.logprobs, expected.logprobs)).max() <= BUDGET, engine
            assert [box.score for box in found.boxes] == pytest.approx(
                [box.score for box in expected.boxes], abs=BUDGET
            )
            for box, other in zip(found.boxes, expected.boxes, strict=True):
                assert box.uncertainty == pytest.approx(other.uncertainty, rel=1e-3, abs=BUDGET)
            masks = [[box.mask_score for box in each.boxes if box.codes] for each in (found, expected)]
            assert masks[0] == pytest.approx(masks[1], abs=BUDGET)
            assert masks[0] if prompt == "segment star" else not masks[0]


def test_an_older_bundle_answers_as_before(old, current, tokenizer):
    """The host's sampling computes what its graph does not give; where logits stay on the device there is none."""
    image = open_image(EXAMPLE)
    expected = answer(HostSession(bundle.load(current), "cpu"), tokenizer, image, "detect star")
    found = answer(HostSession(bundle.load(old), "cpu"), tokenizer, image, "detect star")
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    found = answer(DeviceSession(bundle.load(old), "cpu"), tokenizer, image, "detect star")
    assert found.tokens == expected.tokens
    assert found.logprobs is None
    assert list(found.as_json()) == ["text", "tokens", "boxes"]
    assert [list(box) for box in found.as_json()["boxes"]] == [["label", "x1", "y1", "x2", "y2", "uncertainty"]] * len(
        found.boxes
    )


def test_logits_that_stay_on_a_device_are_noticed_if_they_are_not_finite(current, tokenizer, monkeypatch):
    engine = DeviceSession(bundle.load(current), "cpu")
    draw = engine.draw

    def broken(logits, *arguments):
        logits.update_inplace(np.full(logits.shape(), np.nan, np.float32))
        return draw(logits, *arguments)

    monkeypatch.setattr(engine, "draw", broken)
    with pytest.raises(PaliGemmaError, match="the logits for token 1 of the answer are not finite numbers"):
        answer(engine, tokenizer, open_image(EXAMPLE), "caption en")


# --- scores ------------------------------------------------------------------------------------------------


class Wavering(Fixed):
    """An engine that gives the n-th token a probability of 0.9 - n / 100, and the rest to another."""

    def logits(self, step):
        logits = super().logits(step)
        share = 0.9 - step / 100
        best, other = logits.argmax(-1), np.full(len(logits), 11)
        logits[:] = -np.inf
        rows = np.arange(len(logits))
        logits[rows, other], logits[rows, best] = np.log(1 - share), np.log(share)
        return np.maximum(logits, np.float32(-1e4))


def test_scores_by_hand(tokenizer):
    """exp of the mean over location tokens and label, and over codes: neither separators nor what ends the answer."""
    ids = tokenizer.encode(TEXT)
    found = answer(Wavering(ids), tokenizer, Image.new("RGB", (40, 20)), "segment star")
    assert (found.text, found.tokens) == (TEXT, ids)
    logs = [math.log(0.9 - i / 100) for i in range(len(ids))]
    assert found.logprobs == pytest.approx(logs, abs=1e-6)
    # The tokenizer of the shipped model spells " star", " ;" and " ring" in one token each.
    assert [tokenizer.decode([token]) for token in ids[20:22]] == [" star", " ;"]
    second = len(ids) - 5
    assert tokenizer.decode(ids[second + 4 :]) == " ring"

    def mean(numbers):
        return math.exp(sum(numbers) / len(numbers))

    star, ring = found.boxes
    assert star.score == pytest.approx(mean([*logs[:4], logs[20]]), abs=1e-6)
    assert star.mask_score == pytest.approx(mean(logs[4:20]), abs=1e-6)
    assert ring.score == pytest.approx(mean(logs[second:]), abs=1e-6)
    assert ring.mask_score is None
    plain = found.as_json()
    assert list(plain) == ["text", "tokens", "logprobs", "boxes"]
    assert list(plain["boxes"][0]) == [
        "label", "x1", "y1", "x2", "y2", "codes", "score", "mask_score", "uncertainty",
    ]  # fmt: skip
    assert list(plain["boxes"][1]) == ["label", "x1", "y1", "x2", "y2", "score", "uncertainty"]
    assert plain["logprobs"] == [round(each, 6) for each in found.logprobs]
    assert replace(found, width=400).boxes[0].score == star.score


PLACE, OTHER = "<loc0001>" * 4, "<loc0002>" * 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BOX, [([0, 1, 2, 3], range(4, 20))]),  # no label
        (f"{PLACE} {OTHER} star;x", [([0, 1, 2, 3], []), ([5, 6, 7, 8, 9, 10, 11], [])]),  # a blank is no label
        (f"{PLACE}{'<seg001>' * 15} star", [([0, 1, 2, 3, 19], [])]),  # fifteen codes are no mask
        (f"{PLACE}{'<seg001>' * 17} star", [([0, 1, 2, 3, 21], range(4, 20))]),
        (f"{PLACE} é🙂 star ; circle", [([*range(12)], [])]),  # characters of several tokens
        (f"a red {PLACE} blue star\n; {OTHER}", [([3, 4, 5, 6, 7, 8], []), ([12, 13, 14, 15], [])]),
        (f"star {PLACE[:-9]} of", []),
    ],
)
def test_tokens_count_in_the_part_that_they_begin_in(tokenizer, text, parts):
    ids = tokenizer.encode(text)
    begins = beginnings(tokenizer, ids)
    logs = [-((i + 1) ** 2) / 100 for i in range(len(ids))]
    boxes = detection.parse(text, 100, 100, logprobs=list(zip(begins, logs, strict=True)))
    assert len(boxes) == len(parts)
    for box, (of_box, of_mask) in zip(boxes, parts, strict=True):
        assert box.score == pytest.approx(math.exp(np.mean([logs[i] for i in of_box])))
        assert (box.mask_score is None) == (not box.codes)
        if box.codes:
            assert box.mask_score == pytest.approx(math.exp(np.mean([logs[i] for i in of_mask])))


def test_beginnings_of_characters_of_several_tokens(tokenizer):
    ids = tokenizer.encode("é🙂 star")
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces == ["\N{REPLACEMENT CHARACTER}"] * 6 + [" star"]
    assert beginnings(tokenizer, ids) == [0, 0, 1, 1, 1, 1, 2]


# --- uncertainty -------------------------------------------------------------------------------------------


class Hesitant(Fixed):
    """An engine whose n-th token is as likely as the next but n + 1 location tokens above and below."""

    def logits(self, step):
        logits = super().logits(step)
        (best,) = logits.argmax(-1)
        logits[:] = -1e4
        away = step + 1
        logits[0, [best - away, best, best + away]] = [0, 1e-3, 0]  # the middle one is drawn
        return logits


def test_uncertainty_by_hand(tokenizer):
    """Three places, equally likely and d apart: a standard deviation of d sqrt(2/3) locations."""
    ids = tokenizer.encode("<loc0100><loc0200><loc0300><loc0400>")
    found = answer(Hesitant(ids), tokenizer, Image.new("RGB", (2046, 1023)), "detect star")
    assert found.text == "<loc0100><loc0200><loc0300><loc0400>"
    unit = math.sqrt(2 / 3)
    assert found.spreads == pytest.approx([unit, 2 * unit, 3 * unit, 4 * unit], rel=1e-3)
    (box,) = found.boxes  # y1, x1, y2, x2 in the text; two pixels a location across, and one down
    assert box.uncertainty == pytest.approx((4 * unit, unit, 8 * unit, 3 * unit), rel=1e-3)
    assert box.as_json()["uncertainty"] == box.uncertainty
    (larger,) = replace(found, width=4092).boxes
    assert larger.uncertainty == pytest.approx((8 * unit, unit, 16 * unit, 3 * unit), rel=1e-3)
    (other,) = replace(found, convention="huggingface").boxes
    assert other.uncertainty[1] == pytest.approx(box.uncertainty[1] * 1023 / 1024)


def test_a_box_is_uncertain_where_all_four_spreads_are_known():
    text = f"a {PLACE} star ; {OTHER}"
    first, second = 2, text.index(OTHER)
    spreads = {place + 9 * i: float(i + 1) for place in (first, second) for i in range(4)}
    boxes = detection.parse(text, 1023, 1023, spreads=spreads)
    assert [box.uncertainty for box in boxes] == [(2.0, 1.0, 4.0, 3.0)] * 2
    for missing in ({}, {**spreads, second: math.nan}):
        assert detection.parse(text, 1023, 1023, spreads=missing)[1].uncertainty is None
    del spreads[first]
    assert [box.uncertainty is None for box in detection.parse(text, 9, 9, spreads=spreads)] == [True, False]


def test_a_tokenizer_knows_its_locations(tokenizer):
    ids = tokenizer.locations()
    assert [tokenizer.decode([ids[i]]) for i in (0, 7, 1023)] == ["<loc0000>", "<loc0007>", "<loc1023>"]
    assert len(ids) == 1024


def test_boxes_of_a_text_alone_have_no_scores():
    (box, _) = detection.parse(TEXT, 40, 20)
    assert (box.codes, box.score, box.mask_score) == (CODES, None, None)
    assert list(box.as_json()) == ["label", "x1", "y1", "x2", "y2", "codes"]


def test_beginnings_behind_half_a_character(tokenizer):
    """What is never completed is a character of its own: what comes behind it begins behind it."""
    first, second = tokenizer.encode("é")
    (place,) = tokenizer.encode("<loc0001>")
    assert beginnings(tokenizer, [first, place, first, second, place]) == [0, 1, 10, 10, 11]
    text = tokenizer.decode([first, *[place] * 4])
    (box,) = detection.parse(text, 100, 100, logprobs=[(0, -9.0), *((begin, -0.5) for begin in (1, 10, 19, 28))])
    assert box.score == pytest.approx(math.exp(-0.5))
