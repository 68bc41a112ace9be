"""What a grammar lets through: every answer drawn under it parses, and what parses is let through unchanged."""

import re
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from export import bundle
from export.session import DeviceSession, HostSession, Session
from numpy_ref import checkpoint, detection
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import answers, generate
from numpy_ref.grammar import Grammar, State
from numpy_ref.image import preprocess
from numpy_ref.model.sampling import Sampling, sample
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer
from torch_impl.load import TorchEngine

SUITE = suite_of()  # what the shipped model is measured on
CONFIG = checkpoint.load_config(SHIPPED)
TOKENIZER = Tokenizer.load(SHIPPED, CONFIG)
PLACES = re.compile(r"<loc(\d{4})>")


def is_detection(text, labels=(), codes=0):
    """Whether it is boxes as `detect` and `segment` have them, and read as it was meant."""
    found = detection.parse(text, 1023, 1023)
    spelled = " ; ".join(
        "".join(f"<loc{round(side):04d}>" for side in (box.y1, box.x1, box.y2, box.x2))
        + "".join(f"<seg{code:03d}>" for code in box.codes)
        + f" {box.label}"
        for box in found
    )
    ordered = all(box.x1 <= box.x2 and box.y1 <= box.y2 and len(box.codes) == codes and box.label for box in found)
    return spelled == text and ordered and all(not labels or box.label in labels for box in found)


WELL_FORMED = {
    "detect": is_detection,
    "detect:red circle;blue star": lambda text: is_detection(text, ("red circle", "blue star")),
    "segment:star": lambda text: is_detection(text, ("star",), 16),
    "choice:yes|no|maybe not|日本": lambda text: text in ("yes", "no", "maybe not", "日本"),
    "number": lambda text: re.fullmatch(r"-?\d+(\.\d+)?", text),
    r"regex:[a-c]{2,5}( (x|yz))*": lambda text: re.fullmatch("[a-c]{2,5}( (x|yz))*", text),
}


class Small:
    """The shipped tokenizer with a few of its ids, under new numbers: as much of it as a grammar and its test need."""

    def __init__(self):
        locations = [f"<loc{i:04d}>" for i in (0, 1, 7, 99, 100, 101, 500, 511, 512, 999, 1022, 1023)]
        pieces = [*locations, *(f"<seg{i:03d}>" for i in (0, 5, 64, 127)), *"abcdxyz019-.<;", " red", " circle", " ;",
                  " blue", " star", " s", "st", "ar", " ", "日", "本", "yes", "no", "maybe", " not", "e", "r", "m"]  # fmt: skip
        ids = dict.fromkeys(token for piece in pieces for token in TOKENIZER.encode(piece))
        self.ids = [CONFIG.pad, CONFIG.eos, CONFIG.bos, *ids]
        self.config = replace(CONFIG, text=replace(CONFIG.text, vocab=len(self.ids) + 3), image_token=len(self.ids))
        self.content = {TOKENIZER.pieces[old]: new for new, old in enumerate(self.ids) if old in TOKENIZER.pieces}

    def known(self):
        return np.arange(self.config.text.vocab) < len(self.ids)

    def spellings(self):
        whole = TOKENIZER.spellings()
        return [whole[token] for token in self.ids]

    def decode(self, ids):
        return TOKENIZER.decode(self.ids[token] for token in ids)


SMALL = Small()


class Noise(Engine):
    """An engine whose logits are noise, with an end that is likelier the longer an answer gets."""

    def __init__(self, rows, seed, config=CONFIG):
        super().__init__(config)
        self.rows, self.random, self.step = rows, np.random.default_rng(seed), 0

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        return self.logits(), None

    def decode(self, input_ids, lengths, cache):
        return self.logits(), None

    def reorder(self, cache, rows):
        return cache

    def logits(self):
        self.step += 1
        logits = 3 * self.random.standard_normal((self.rows, self.config.text.vocab), np.float32)
        logits[:, self.config.eos] += self.step - 8
        return logits


def draw(spec, rows, seed, most, sampling=None, tokenizer=TOKENIZER):
    """Answers to noise, as ids."""
    grammar = Grammar(spec, tokenizer) if spec else None
    engine, pixels = Noise(rows, seed, tokenizer.config), np.zeros((rows, 3, 1, 1))
    steps = generate(engine, pixels, [[5]] * rows, tokenizer.known(), most, sampling, grammar=grammar)
    return answers(list(steps), CONFIG.ends)


@pytest.mark.parametrize("spec", WELL_FORMED)
def test_ten_thousand_answers_to_noise_all_parse(spec):
    """Greedy and drawn, hot and cut, and with budgets that cut off what would have gone on."""
    lengths, count = set(), 0
    least = int(Grammar(spec, SMALL).distances[0])
    for i, most in enumerate([max(1, least), least + 1, least + 2, least + 5, 24, 24, 24, 24, 24, 30]):
        sampling = [Sampling(), Sampling(1.0, seed=i), Sampling(3.0, 40, 0.95, i), Sampling(0.5, 5, 0.5, i)][i % 4]
        for ids in draw(spec, 1000, i, most, sampling, SMALL):
            text = SMALL.decode(ids)
            assert WELL_FORMED[spec](text), (text, ids, most)
            assert len(ids) <= most
            lengths.add(len(ids))
            count += 1
    assert count == 10_000
    assert len(lengths) > 1


def test_noise_alone_parses_never():
    """Or what is checked above would be nothing."""
    texts = [SMALL.decode(ids) for ids in draw("", 500, 0, 12, tokenizer=SMALL)]
    long = [text for text in texts if len(text) > 3]
    assert len(long) > 300
    assert not any(is_well_formed(text) for text in long for is_well_formed in WELL_FORMED.values())


# --- by hand -----------------------------------------------------------------------------------------------

TWO = "<loc0001><loc0002><loc0003><loc0004> red circle ; <loc0005><loc0006><loc0005><loc0006> blue star"


def allowed(spec, text, left=64):
    """The pieces that may follow a text."""
    grammar, state = Grammar(spec, TOKENIZER), State()
    for token in TOKENIZER.encode(text):
        state = grammar.advance(state, token)
    control = {CONFIG.eos: "<eos>"}
    return {control.get(token) or TOKENIZER.decode([token]) for token in np.flatnonzero(grammar.allowed(state, left))}


def test_boxes_are_ordered():
    assert allowed("detect", "<loc0100><loc0200>") == {f"<loc{i:04d}>" for i in range(100, 1024)}
    assert allowed("detect", "<loc0100><loc0200><loc0900>") == {f"<loc{i:04d}>" for i in range(200, 1024)}
    assert len(allowed("detect", "<loc0100>")) == 1024
    assert len(allowed("detect", TWO + " ; <loc0009><loc0009>")) == 1015


def test_a_label_may_be_cut_in_any_way():
    grammar = Grammar("detect:red circle", TOKENIZER)
    box = TOKENIZER.encode("<loc0001><loc0002><loc0003><loc0004>")
    cut = [token for letter in " red circle" for token in TOKENIZER.encode(letter)]
    assert len(cut) > len(TOKENIZER.encode(" red circle"))
    assert grammar.accepts([*box, *cut])
    assert grammar.accepts([*box, *TOKENIZER.encode(" red circle")])
    assert not grammar.accepts([*box, *cut[:-1]])
    assert not grammar.accepts(TOKENIZER.encode("<loc0001><loc0002><loc0003><loc0004> red  circle"))


def test_what_may_follow_a_label_that_another_begins_with():
    found = allowed("detect:red;red star", "<loc0001><loc0002><loc0003><loc0004> red")
    assert {"<eos>", " ;", " star", " s", " "} <= found
    assert not any("<loc" in piece for piece in found)


def test_nothing_found_is_an_answer():
    assert "<eos>" in allowed("detect:star", "")
    assert "<eos>" not in allowed("detect:star", "<loc0001>")


def test_a_budget_leaves_what_can_be_finished():
    """Of a number as long as one likes; of boxes, no other where there is no room for it."""
    assert allowed("number", "-1", 1) >= {"<eos>", "7"}
    assert "." in allowed("number", "-1", 2)
    assert "." not in allowed("number", "-1", 1)
    assert " ;" in allowed("detect:star", "<loc0001><loc0002><loc0003><loc0004> star", 7)
    assert " ;" not in allowed("detect:star", "<loc0001><loc0002><loc0003><loc0004> star", 6)


def test_control_tokens_are_never_drawn():
    """Nor an id past the tokenizer's, whatever the pattern."""
    mask = Grammar("regex:.*", TOKENIZER).allowed(State(), 64)
    control = {CONFIG.pad, CONFIG.bos, CONFIG.image_token}
    assert not mask[[*control, *range(TOKENIZER.size, CONFIG.text.vocab)]].any()
    assert not mask[list(TOKENIZER.pieces)].any()
    assert mask[CONFIG.eos]


def test_of_several_ends_each_may_end_an_answer():
    tokenizer = Tokenizer.load(SHIPPED, replace(CONFIG, stops=(1, 1568)))
    mask = Grammar("choice:a", tokenizer).allowed(State(), 9)
    assert not mask[[1, 1568]].any()
    grammar = Grammar("choice:a", tokenizer)
    assert grammar.is_complete(grammar.advance(State(), TOKENIZER.encode("a")[0]))
    grammar = Grammar("regex:a+", tokenizer)
    after = grammar.allowed(grammar.advance(State(), TOKENIZER.encode("a")[0]), 9)
    assert after[[1, 1568]].all()


@pytest.mark.parametrize(
    ("spec", "text", "guessed"),
    [
        ("choice:red circle", "", "red circle"),
        ("choice:red circle|red cross", "", "red"),
        ("choice:yes|no", "", ""),
        ("detect:red circle", "<loc0001><loc0002><loc0003><loc0004>", " red circle"),
        ("detect:red circle;red star", "<loc0001><loc0002><loc0003><loc0004>", " red"),
        ("detect", "<loc0001><loc0002><loc0003><loc0004>", ""),
        ("detect", "<loc0001><loc0002><loc0003><loc0004> star ;", " "),
        ("detect", "<loc0001>", ""),
    ],
)
def test_text_without_a_choice_is_guessed(spec, text, guessed):
    grammar, state = Grammar(spec, TOKENIZER), State()
    for token in TOKENIZER.encode(text):
        state = grammar.advance(state, token)
    assert TOKENIZER.decode(grammar.guess(state)) == guessed


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("boxes", "no such grammar; it is detect"),
        ("detect:", "nothing stands behind the colon"),
        ("detect:a;;b", "'' cannot be a label"),
        ("detect:a<loc0001>", "cannot be a label"),
        ("detect:a  b", "cannot be a label"),
        ("segment:a\nb", "cannot be a label"),
        ("choice", "no such grammar"),
        ("choice:a||b", "one of the choices is empty"),
        ("choice:<loc0001>", "has <loc0001> in it"),
        ("choice:\udcff", "not valid Unicode"),
        ("number:3", "no such grammar"),
        ("regex:(", "cannot be read"),
    ],
)
def test_what_is_no_grammar_is_refused(spec, words):
    with pytest.raises(PaliGemmaError, match=words) as error:
        Grammar(spec, TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_locations_cannot_write_boxes():
    class Without(Tokenizer):
        def spellings(self):
            return [b"" if token in self.pieces else spelled for token, spelled in enumerate(super().spellings())]

    tokenizer = Without.load(SHIPPED, CONFIG)
    assert Grammar("choice:yes", tokenizer).accepts(TOKENIZER.encode("yes"))
    grammar = Grammar("detect", tokenizer)  # which leaves the answer that there is nothing
    assert grammar.allowed(State(), 64).sum() == 1


def test_what_cannot_be_written_is_refused():
    class OneLetter(Tokenizer):
        def spellings(self):
            return [spelled if spelled == b"a" else b"" for spelled in super().spellings()]

    with pytest.raises(PaliGemmaError, match="tokenizer cannot write any such answer"):
        Grammar("choice:ab", OneLetter.load(SHIPPED, CONFIG))
    mask = Grammar("choice:ab|aa", OneLetter.load(SHIPPED, CONFIG)).allowed(State(), 9)
    assert set(TOKENIZER.decode(np.flatnonzero(mask))) == {"a"}  # a letter, and a byte


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(PaliGemmaError, match=r"the shortest such answer has 4 tokens, and --max-new-tokens is 3"):
        draw("choice:zzzz", 1, 0, 3, Sampling())
    assert draw("choice:zzzz", 1, 0, 4, Sampling()) == [TOKENIZER.encode("zzzz")]


# --- the distribution --------------------------------------------------------------------------------------


class Fixed(Engine):
    """An engine that always has the same logits."""

    def __init__(self, logits, rows):
        super().__init__(SMALL.config)
        self.given = np.tile(logits, (rows, 1))

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        return self.given, None

    def decode(self, input_ids, lengths, cache):
        return self.given, None

    def reorder(self, cache, rows):
        return cache


def test_a_token_is_as_likely_as_among_what_is_allowed():
    """The renormalised distribution, whether the first draw is allowed or not."""
    count, grammar = 40_000, Grammar("regex:[a-e]", SMALL)
    logits = np.random.default_rng(3).standard_normal(SMALL.config.text.vocab).astype(np.float32)
    mask = grammar.allowed(State(), 1)
    logits[mask] += 2  # about half of the first draws are
    engine = Fixed(logits, count)
    (tokens,) = generate(
        engine, np.zeros((count, 3, 1, 1)), [[5]] * count, SMALL.known(), 1, Sampling(1.0, seed=8), grammar=grammar
    )
    weights = np.where(mask, np.exp(logits.astype(np.float64)), 0)
    observed = np.bincount(tokens, minlength=len(mask)) / count
    assert mask.sum() >= 5
    assert np.abs(observed - weights / weights.sum()).max() < 4.5 * np.sqrt(0.25 / count)
    known = np.exp(logits[SMALL.known()].astype(np.float64)).sum()
    assert 0.2 < weights.sum() / known < 0.8


# --- on the shipped model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model's bundle."""
    folder = tmp_path_factory.mktemp("grammar") / "bundle"
    bundle.write(checkpoint.load(), folder)
    return bundle.load(folder)


@pytest.fixture(scope="module")
def asked():
    """Held-out pictures with a prompt each, of the tasks that have a grammar."""
    return [*SUITE.held_out(11, 150, "detect"), *SUITE.held_out(11, 60, "segment")]


def ask(engine, questions, **options):
    """The ids of each answer; pictures go in batches of thirty, and rows draw by numbers of their own."""
    rows = []
    for first in range(0, len(questions), 30):
        batch = questions[first : first + 30]
        pixels = np.concatenate([preprocess(evaluate.picture(each), CONFIG.vision.image_size) for each in batch])
        prompts = [TOKENIZER.prompt(question.prefix) for question in batch]
        seeds = [first + i for i in range(len(batch))]
        steps = generate(engine, pixels, prompts, TOKENIZER.known(), 64, seeds=seeds, **options)
        rows += answers(list(steps), CONFIG.ends)
    return rows


def by_task(questions):
    return [("detect", [each for each in questions if each.task == "detect"]),
            ("segment", [each for each in questions if each.task == "segment"])]  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3)], ids=["greedy", "drawn"])
def test_a_well_formed_answer_is_not_changed(shipped, asked, sampling):
    """And one that is not is the same up to where it leaves the grammar."""
    engine, kept, changed = Session(shipped, "cpu"), 0, 0
    for spec, questions in by_task(asked):
        grammar = Grammar(spec, TOKENIZER)
        free = ask(engine, questions, sampling=sampling)
        held = ask(engine, questions, sampling=sampling, grammar=grammar)
        assert all(grammar.accepts(ids) for ids in held)
        for ids, ours in zip(free, held, strict=True):
            if grammar.accepts(ids):
                kept += 1
                assert ours == ids
            else:
                changed += 1
                assert ours != ids
    assert kept > 100
    assert bool(changed) == (sampling.temperature > 0)  # greedily it answers well


def test_labels_are_of_the_list(shipped, asked):
    """Of another list than the prompt's."""
    questions = [question for question in asked if question.task == "detect"][:40]
    grammar = Grammar("detect:purple ring;cross", TOKENIZER)
    texts = [TOKENIZER.decode(ids) for ids in ask(Session(shipped, "cpu"), questions, grammar=grammar)]
    found = {box.label for text in texts for box in detection.parse(text, 1, 1)}
    assert found == {"purple ring", "cross"}


class OneByOne(Session):
    """As of an older bundle."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.extends_at_once = False


@pytest.mark.parametrize("spec", ["detect:star;circle;red square", "choice:a red star and|a red circle or two|blue"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, 50, 0.9)], ids=["greedy", "drawn"])
def test_guesses_change_nothing_but_the_passes(shipped, asked, spec, sampling):
    grammar = Grammar(spec, TOKENIZER)
    expected = ask(OneByOne(shipped, "cpu"), asked[:60], sampling=sampling, grammar=grammar)
    engine = Session(shipped, "cpu")
    decoded = []
    extend = engine.extend
    engine.extend = lambda ids, *rest: decoded.append(ids.shape[1]) or extend(ids, *rest)
    assert ask(engine, asked[:60], sampling=sampling, grammar=grammar) == expected
    assert max(decoded) > 1


def test_every_engine_draws_the_same(shipped, asked):
    loaded = checkpoint.load()
    engines = [NumpyEngine(loaded), TorchEngine(loaded), Session(shipped, "cpu"), HostSession(shipped, "cpu"),
               DeviceSession(shipped, "cpu")]  # fmt: skip
    grammar = Grammar("detect:purple ring;cross", TOKENIZER)
    questions = [question for question in asked if question.task == "detect"][:6]
    for sampling in (Sampling(), Sampling(1.0, 40, 0.95)):
        found = [ask(engine, questions, sampling=sampling, grammar=grammar) for engine in engines]
        assert found[0] != ask(engines[0], questions, sampling=sampling)
        assert all(rows == found[0] for rows in found[1:])


def test_log_probabilities_are_of_the_raw_logits(shipped, asked):
    """Of a token that was drawn a second time too, on every engine; and in passes of several."""
    grammar, found = Grammar("detect:purple ring;cross", TOKENIZER), []
    for kind in (Session, HostSession, DeviceSession, OneByOne):
        logprobs = []
        ask(kind(shipped, "cpu"), asked[:3], grammar=grammar, logprobs=logprobs)
        found.append(np.array(logprobs))
    for each in found[1:]:
        assert np.allclose(found[0], each, atol=2e-4, equal_nan=True)
    assert np.nanmin(found[0]) < -3  # what it would not have said


def test_rows_end_apart_under_a_grammar(shipped):
    """A batch gives what its rows give alone, though each is passed other guesses."""
    questions = [*SUITE.held_out(5, 12, "detect")]
    grammar, engine = Grammar("detect", TOKENIZER), Session(shipped, "cpu")
    together = ask(engine, questions, grammar=grammar)
    alone = [ask(engine, [question], grammar=grammar)[0] for question in questions]
    assert together == alone
    assert len({len(ids) for ids in together}) > 3


# --- graphs and commands -----------------------------------------------------------------------------------


def test_the_graph_draws_what_numpy_does(shipped):
    session = DeviceSession(shipped, "cpu")
    random = np.random.default_rng(4)
    logits = (3 * random.standard_normal((4, CONFIG.text.vocab))).astype(np.float32)
    mask, uniform = random.random(logits.shape) < 0.02, random.random(4, np.float32)
    for sampling in (Sampling(), Sampling(1.5, 20, 0.9)):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        token, logprob = session.draw(value, mask, sampling, uniform)
        expected = sample(logits, mask, sampling.temperature, sampling.top_k, sampling.top_p, uniform)
        assert token.tolist() == expected.tolist()
        assert np.allclose(logprob, session.log_probability(value, token), atol=1e-5)


def test_the_command_says_what_is_wrong_before_it_loads(capsys):
    from numpy_ref.__main__ import main

    picture = str(SHIPPED / "example.png")
    for option, words in ((["--constrain", "boxes"], "no such grammar"), (["--score", "a", "--constrain", "number"],
                          "leave one of them out")):  # fmt: skip
        assert run("numpy_ref", main, ["missing.npz", picture, "caption en", *option]) == 1
        assert words in capsys.readouterr().err


def test_the_command_keeps_to_the_grammar(capsys):
    from numpy_ref.__main__ import main

    picture = str(SHIPPED / "example.png")
    assert run("numpy_ref", main, [picture, "caption en", "--constrain", "choice:yes|no"]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")


def test_a_model_that_knows_no_end_stops_where_nothing_may_follow():
    tokenizer = Tokenizer.load(SHIPPED, replace(CONFIG, stops=()))
    grammar = Grammar("choice:yes|no", tokenizer)
    steps = generate(
        Noise(3, 0, tokenizer.config), np.zeros((3, 3, 1, 1)), [[5]] * 3, TOKENIZER.known(), 9, grammar=grammar
    )
    rows = answers(list(steps), CONFIG.pad)
    assert {TOKENIZER.decode(ids) for ids in rows} <= {"yes", "no"}
