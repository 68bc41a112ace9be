"""Several tokens at once in the loop: guesses by look-up, a given start, a given answer's log-probability."""

import json
import shutil

import numpy as np
import pytest

from export import bundle
from export.cli import run_onnx
from export.session import DeviceSession, HostSession, Session
from numpy_ref import checkpoint, cli
from numpy_ref.__main__ import main
from numpy_ref.answer import answer, score
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import Timings, answers, generate, look_up
from numpy_ref.grammar import Grammar
from numpy_ref.image import open_image, preprocess
from numpy_ref.model.sampling import Sampling
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer
from torch_impl.load import TorchEngine

from .models import CONFIGS, random_batch, random_params

SUITE = suite_of()  # what the shipped model is measured on
CONFIG = checkpoint.load_config(SHIPPED)
TOKENIZER = Tokenizer.load(SHIPPED, CONFIG)
EXAMPLE = SHIPPED / "example.png"


@pytest.fixture(scope="module", params=["float32", "int4"])
def written(request, tmp_path_factory):
    """The shipped model's bundle."""
    folder = tmp_path_factory.mktemp("lookup") / request.param
    bundle.write(checkpoint.load(), folder, request.param)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A bundle as an export wrote it that had no graph for several tokens at once."""
    folder = tmp_path_factory.mktemp("older") / "bundle"
    bundle.write(checkpoint.load(), folder)
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    for name in ("extend", "constrain"):
        del description["graphs"][name], description["files"][f"{name}.onnx"]
        (folder / f"{name}.onnx").unlink()
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))
    return bundle.load(folder)


# --- what is guessed ---------------------------------------------------------------------------------------


def looked_up(prompt, text):
    guess = look_up(TOKENIZER.encode(prompt), TOKENIZER.encode(text), TOKENIZER.pieces)
    return TOKENIZER.decode(guess)


BOX, OTHER = "<loc0001><loc0002><loc0003><loc0004>", "<loc0009><loc0008><loc0017><loc0016>"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))


@pytest.mark.parametrize(
    ("prompt", "text", "guess"),
    [
        ("detect red star", f"{BOX} red star ; {OTHER}", " red star ; "),
        ("detect red star", f"{BOX} red star ; {OTHER} red star ;", " "),
        ("detect red star", f"{BOX} red star ; <loc0009><loc0008>", ""),  # a location comes next
        ("detect red star", BOX, ""),  # nothing like it before
        ("segment star ; ring", f"{BOX}{CODES} star ; {OTHER}", ""),  # a code comes next
        ("segment star ; ring", f"{BOX}{CODES} star ; {OTHER}{CODES}", " star ; "),
        ("caption en", "see a red star, a blue ring and a red", " star, a blue ring and a red"),
        ("caption en", "", ""),
    ],
)
def test_what_is_looked_up(prompt, text, guess):
    assert looked_up(prompt, text) == guess


def test_the_longest_match_counts_and_the_last_of_them():
    assert look_up([], [1, 2, 3, 9, 2, 3, 8, 7, 1, 2, 3], ()) == [9, 2, 3, 8, 7, 1, 2, 3]
    assert look_up([2, 3, 4], [5, 2, 3, 6, 7, 2, 3], ()) == [6, 7, 2, 3]
    assert look_up([3, 4], [5, 3], ()) == []


# --- the same answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    """500 held-out pictures with a prompt each, of every task."""
    tasks = {"caption": 150, "detect": 200, "answer": 50, "segment": 100}
    questions = [each for task, count in tasks.items() for each in SUITE.held_out(13, count, task)]
    return [
        (preprocess(evaluate.picture(question), CONFIG.vision.image_size), TOKENIZER.prompt(question.prefix))
        for question in questions
    ]


def ask(engine, asked, alike, sampling=None):
    """Ids of each picture alone, and how many passes and tokens that took."""
    rows, passes, tokens = [], 0, 0
    for pixels, prompt in asked:
        timings = Timings()
        steps = generate(engine, pixels, [prompt], TOKENIZER.known(), 64, sampling, timings, alike=alike)
        rows += answers(list(steps), CONFIG.ends)
        passes, tokens = passes + timings.passes, tokens + timings.decode_tokens
    return rows, passes, tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 40, 0.95, 3)], ids=["greedy", "drawn"])
def test_look_up_changes_no_token_of_500_answers(written, asked, sampling):
    engine = Session(bundle.load(written), "cpu", threads=1)
    asked = asked if sampling == Sampling() else asked[::5]
    expected, passes, tokens = ask(engine, asked, None, sampling)
    assert passes == tokens
    found, fewer, same = ask(engine, asked, TOKENIZER.pieces, sampling)
    assert found == expected
    assert same == tokens
    assert fewer < passes


@pytest.mark.parametrize("name", CONFIGS)
def test_look_up_changes_no_token_of_random_models(name, tmp_path):
    """Whose answers run in circles, where most that is guessed is right; and in batches of rows that go on apart."""
    config = CONFIGS[name]
    loaded = checkpoint.Checkpoint(tmp_path, config, random_params(config), np.dtype("f8"))
    known = np.arange(config.text.vocab) % 3 != 0
    for engine in (NumpyEngine(loaded), TorchEngine(loaded)):
        saved = 0
        for seed in range(6):
            pixels, ids, lengths = random_batch(config, seed=seed)
            prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
            found = []
            for alike in (None, {7, 8, 11}):
                timings = Timings()
                most = np.array([40, 60, 33])
                sampling = Sampling(0.7 * (seed % 2), seed=seed)
                steps = list(generate(engine, pixels, prompts, known, most, sampling, timings, alike=alike))
                found.append((np.stack(steps).tolist(), timings.passes))
            (plain, passes), (guessed, fewer) = found
            assert guessed == plain
            saved += passes - fewer
        assert saved > 30


def test_the_last_slots_of_the_longest_sequence(tmp_path):
    """Guesses do not go past the last position that there is."""
    config = CONFIGS["paligemma1"]
    loaded = checkpoint.Checkpoint(tmp_path, config, random_params(config), np.dtype("f8"))
    pixels, ids, lengths = random_batch(config)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    most = config.max_length - lengths + 1
    found = []
    for alike in (None, ()):
        steps = generate(NumpyEngine(loaded), pixels, prompts, np.ones(config.text.vocab, bool), most, alike=alike)
        found.append(np.stack(list(steps)).tolist())
    assert found[0] == found[1]


# --- a given start, and a given answer ---------------------------------------------------------------------


def engines(folder):
    loaded, opened = checkpoint.load(), bundle.load(folder)
    return [NumpyEngine(loaded), TorchEngine(loaded),
            *(kind(opened, "cpu") for kind in (Session, HostSession, DeviceSession))]  # fmt: skip


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "bundle"
    bundle.write(checkpoint.load(), folder)
    return folder


def test_an_answer_goes_on_from_its_own_beginning(float32):
    picture = open_image(EXAMPLE)
    for engine in engines(float32):
        whole = answer(engine, TOKENIZER, picture, "caption en")
        pieces = []
        start = TOKENIZER.decode(whole.tokens[:5])
        again = answer(engine, TOKENIZER, picture, "caption en", start=start, on_text=pieces.append)
        assert (again.text, again.tokens) == (whole.text, whole.tokens)
        assert "".join(pieces) == whole.text
        assert again.logprobs == pytest.approx(whole.logprobs, abs=1e-3)
        other = answer(engine, TOKENIZER, picture, "caption en", start="a blue")
        assert other.text.startswith("a blue")
        assert other.text != whole.text


def test_a_start_counts_among_the_tokens(float32):
    engine, picture = Session(bundle.load(float32), "cpu"), open_image(EXAMPLE)
    assert len(answer(engine, TOKENIZER, picture, "caption en", start="a red star", max_new_tokens=5).tokens) == 5
    assert answer(engine, TOKENIZER, picture, "caption en", start="a red star", max_new_tokens=2).text == "a red"


def test_a_start_has_to_fit_the_grammar(float32):
    engine, picture = Session(bundle.load(float32), "cpu"), open_image(EXAMPLE)
    found = answer(
        engine, TOKENIZER, picture, "detect star", start="<loc0100>", grammar=Grammar("detect:star", TOKENIZER)
    )
    assert found.text.startswith("<loc0100>")
    assert found.boxes[0].label == "star"
    with pytest.raises(PaliGemmaError, match="no such answer begins with 'a star'"):
        answer(engine, TOKENIZER, picture, "detect star", start="a star", grammar=Grammar("detect:star", TOKENIZER))
    with pytest.raises(PaliGemmaError, match="the shortest such answer has 5 tokens, and --max-new-tokens is 4"):
        answer(
            engine,
            TOKENIZER,
            picture,
            "detect star",
            start="<loc0100>",
            grammar=Grammar("detect:star", TOKENIZER),
            max_new_tokens=4,
        )


def test_the_score_of_an_answer_is_that_of_its_tokens(float32):
    """Of what is drawn, and of what never would be; its end is the last of them."""
    picture, found = open_image(EXAMPLE), []
    for engine in engines(float32):
        drawn = answer(engine, TOKENIZER, picture, "detect star")
        ids, logprobs = score(engine, TOKENIZER, picture, "detect star", drawn.text)
        assert ids == [*drawn.tokens, CONFIG.eos]
        assert logprobs[:-1] == pytest.approx(drawn.logprobs, abs=1e-4)
        found.append(
            [score(engine, TOKENIZER, picture, "detect star", text)[1] for text in (drawn.text, "日本 ; a", "")]
        )
    for each in found[1:]:
        for row, expected in zip(each, found[0], strict=True):
            assert row == pytest.approx(expected, abs=2e-3)
    assert [len(row) for row in found[0]][1:] == [len(TOKENIZER.encode("日本 ; a")) + 1, 1]
    assert sum(found[0][1]) < sum(found[0][0]) - 20


def test_scores_of_all_endings_sum_to_one():
    """The likelihoods of all single tokens, and of the end at once."""
    loaded = checkpoint.load()
    engine, question = NumpyEngine(loaded), TOKENIZER.prompt("answer en how many shapes are there?")
    pixels = preprocess(open_image(EXAMPLE), CONFIG.vision.image_size)
    count = CONFIG.text.vocab
    found, tokens = [], np.arange(count)
    steps = generate(engine, pixels, [question], TOKENIZER.known(), 1, logprobs=found, start=[int(tokens[5])])
    assert [step.tolist() for step in steps] == [[5]]
    logits, _ = engine.prefill(pixels, np.array([question]), np.array([len(question)]), len(question))
    likely = engine.log_probability(np.repeat(logits, count, 0), tokens)
    assert likely[5] == pytest.approx(float(found[0][0]))
    assert np.exp(likely.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_the_commands_print_it(capsys, float32):
    for program, command in ((lambda argv: cli.run("numpy_ref", main, argv), []), (run_onnx, [str(float32)])):
        assert not program([*command, str(EXAMPLE), "caption en", "--score", "a red star"])
        text = capsys.readouterr().out
        assert not program([*command, str(EXAMPLE), "caption en", "--score", "a red star", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["tokens"] == [*TOKENIZER.encode("a red star"), CONFIG.eos]
        assert found["logprob"] == pytest.approx(sum(found["logprobs"]), abs=1e-4)
        assert float(text) == pytest.approx(found["logprob"], abs=1e-4)
        assert not program([*command, str(EXAMPLE), "detect star", "--lookup", "--start", "<loc0288>"])
        assert capsys.readouterr().out.startswith("<loc0288>")


# --- older bundles -----------------------------------------------------------------------------------------


def test_an_older_bundle_decodes_one_by_one(older):
    picture, session = open_image(EXAMPLE), Session(older, "cpu")
    expected = answer(
        NumpyEngine(checkpoint.load()), TOKENIZER, picture, "detect star", grammar=Grammar("detect:star", TOKENIZER)
    )
    for kind in (Session, HostSession):
        session = kind(older, "cpu")
        found = answer(
            session, TOKENIZER, picture, "detect star", grammar=Grammar("detect:star", TOKENIZER), lookup=True
        )
        assert found.tokens == expected.tokens
        assert found.timings.passes >= len(found.tokens)
        assert len(score(session, TOKENIZER, picture, "detect star", "a star")[1]) == 3


def test_an_older_bundle_on_a_device_says_what_it_needs(older):
    picture, engine = open_image(EXAMPLE), DeviceSession(older, "cpu")
    assert answer(engine, TOKENIZER, picture, "detect star", lookup=True).text
    with pytest.raises(
        PaliGemmaError, match="no graph that reads several tokens at once, as newer bundles have; export"
    ):
        score(engine, TOKENIZER, picture, "detect star", "a star")
    with pytest.raises(
        PaliGemmaError, match="no graph that draws what a grammar allows, as newer bundles have; export"
    ):
        answer(engine, TOKENIZER, picture, "caption en", grammar=Grammar("choice:yes|no", TOKENIZER))


def test_the_graph_is_opened_when_it_is_needed(float32, tmp_path):
    """A bundle whose graph is damaged answers without it, and names it where it is wanted."""
    folder = shutil.copytree(float32, tmp_path / "copy")
    opened = bundle.load(folder)
    (folder / "extend.onnx").write_bytes(b"nothing")
    engine = Session(opened, "cpu")
    assert answer(engine, TOKENIZER, open_image(EXAMPLE), "detect star").text
    with pytest.raises(PaliGemmaError, match=r"extend\.onnx: ONNX Runtime cannot load or run it"):
        score(engine, TOKENIZER, open_image(EXAMPLE), "detect star", "a star")
