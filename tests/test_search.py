"""Beam search and the best of n: by hand, against every sequence there is, against big_vision, over all engines."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest

from export import bundle
from export.cli import run_onnx
from export.model import graphs
from export.session import DeviceSession, HostSession, Session
from numpy_ref import checkpoint, cli
from numpy_ref.answer import answer, answer_all
from numpy_ref.api import PaliGemma
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling, likeliest, location_spread, log_probability
from numpy_ref.scenes import evaluate
from numpy_ref.search import Beam, Candidate, advance, beam_search, best_of, cut, likeliest_first
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer
from torch_impl.__main__ import main as run_torch
from torch_impl.load import TorchEngine

from .make_beams import BEAMS, FOLDER, NEW_TOKENS, PREFIXES, small_config
from .models import CONFIGS, random_batch, random_params

SUITE = suite_of()  # what the shipped model is measured on
BUDGET = 1e-4  # of a log-probability, and of a spread relative to a thousand locations
DRAWN = Sampling(temperature=1.5, top_k=20, seed=5)
EXAMPLE = checkpoint.SHIPPED / "example.png"
KINDS = ("numpy", "torch", "session", "host graphs", "device")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(checkpoint.SHIPPED, checkpoint.load_config(checkpoint.SHIPPED))


def open_engines(loaded, folder):
    """Every engine over a checkpoint; the device's session on the CPU."""
    bundle.write(loaded, folder)
    opened = bundle.load(folder)
    return {
        "numpy": NumpyEngine(loaded), "torch": TorchEngine(loaded), "session": Session(opened, "cpu"),
        "host graphs": HostSession(opened, "cpu"), "device": DeviceSession(opened, "cpu"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return open_engines(checkpoint.load(), tmp_path_factory.mktemp("shipped") / "bundle")


def pixels_in(question):
    return np.concatenate([picture.pixel_values for picture in question.pictures])


def all_known(config):
    return np.ones(config.text.vocab, bool)


# --- statistics of logits ----------------------------------------------------------------------------------


def test_the_likeliest_by_hand():
    logits = np.log(np.array([[1, 4, 2, 1], [3, 1, 1, 3]], np.float32))
    among = np.array([True, True, False, True])
    ids, logprobs, ended = likeliest(logits, among, 2, np.array([2]))
    assert ids.tolist() == [[1, 0], [0, 3]]  # among equals the smaller first
    assert np.exp(logprobs) == pytest.approx(np.array([[4, 1], [3, 3]]) / 8)
    assert np.exp(ended) == pytest.approx(np.array([[2 / 8], [1 / 8]]))
    assert logprobs.dtype == ended.dtype == np.float32


def test_the_spread_of_locations_by_hand():
    """Half and half at 1 and 3: a standard deviation of 1; all at one place: none. Other ids do not count."""
    logits = np.full((2, 6), -1e4, np.float32)
    logits[0, [1, 3]], logits[1, 2], logits[:, 5] = 0, 0, 1e4
    found = location_spread(logits, np.array([0, 1, 2, 3]))
    assert found.dtype == np.float32
    assert found == pytest.approx([1, 0])
    even = location_spread(np.zeros((1, 1024), np.float32), np.arange(1024))
    assert even == pytest.approx(math.sqrt((1024**2 - 1) / 12))


def test_graphs_give_the_same_statistics():
    """Over a real vocabulary."""
    vocab, rng = 257_216, np.random.default_rng(0)
    logits = (4 * rng.standard_normal((3, vocab))).astype(np.float32)
    among, ends, locations = np.arange(vocab) < 257_152, np.array([1, 107]), np.arange(256_000, 257_024)
    run = partial(_run, logits=logits)
    expected = likeliest(logits, among, 7, ends)
    for a, b in zip(
        run(graphs.likeliest_model(vocab), among=among, count=np.array([7]), ends=ends), expected, strict=True
    ):
        assert a.dtype == b.dtype
        assert np.abs(a - b).max() <= BUDGET  # measured 3.1e-5: the runtime sums in float32
    (spread,) = run(graphs.spread_model(vocab, locations))
    assert spread == pytest.approx(location_spread(logits, locations), rel=1e-4)
    assert spread.min() > 100


def _run(model, **feeds):
    return onnxruntime.InferenceSession(graphs.serialize(model), providers=["CPUExecutionProvider"]).run(None, feeds)


# --- caches whose rows are reordered -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_reordered_cache_goes_on_as_its_rows(name, tmp_path):
    """Rows that come often, never, and back in another order, in every engine; and then into fewer."""
    config = replace(CONFIGS[name], eos=2**30)
    loaded = checkpoint.Checkpoint(tmp_path, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    pixels, ids, lengths = random_batch(config)
    order, fewer = np.array([2, 0, 0, 2, 1]), np.array([4, 1])
    token, after = np.array([[5], [7], [11], [13], [17]]), np.array([[19], [23]])
    for engine in open_engines(loaded, tmp_path / "bundle").values():

        def decode(tokens, lengths, cache, engine=engine):
            logits, cache = engine.decode(tokens, lengths.astype(np.int32), cache)
            return np.array(logits if isinstance(logits, np.ndarray) else logits.numpy()), cache

        _, cache = engine.prefill(pixels, ids, lengths, 20)
        wide, cache = decode(token, lengths[order], engine.reorder(cache, order))
        narrow, _ = decode(after, lengths[order][fewer] + 1, engine.reorder(cache, fewer))
        for row, place in enumerate(order):
            _, alone = engine.prefill(pixels[[place]], ids[[place]], lengths[[place]], 20)
            first, alone = decode(token[[row]], lengths[[place]], alone)
            assert first[0] == pytest.approx(wide[row], abs=2e-5)
            if row in fewer:
                then, _ = decode(after[fewer == row], lengths[[place]] + 1, alone)
                assert then[0] == pytest.approx(narrow[list(fewer).index(row)], abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_rows_have_their_logits(kind, shipped, tokenizer):
    engine = shipped[kind]
    question = evaluate.prepare(engine, tokenizer, *SUITE.held_out(0, 1, "caption"))
    ids = np.array([question.prompt])
    logits, cache = engine.prefill(pixels_in(question), ids, np.array([ids.size], np.int32), ids.size + 2)
    before = np.array(logits if isinstance(logits, np.ndarray) else logits.numpy())
    logits, _ = engine.repeat(logits, cache, 3)
    assert np.array_equal(logits if isinstance(logits, np.ndarray) else logits.numpy(), before.repeat(3, 0))


# --- beam search -------------------------------------------------------------------------------------------


def logs(*rows):
    return np.log(np.array(rows))


def test_a_step_by_hand():
    """Two live candidates: both are ended, and of their continuations the likeliest two stay."""
    one, two = Candidate((3,), (0.0,), (0.0,), math.log(0.6)), Candidate((4,), (0.0,), (0.0,), math.log(0.4))
    beam = Beam([one, two], [Candidate(logprob=math.log(0.05))])
    ids, ended = np.array([[5, 6], [7, 8]]), logs([0.1], [0.5])
    found, parents = advance(beam, ids, logs([0.5, 0.4], [0.45, 0.05]), ended, np.array([1.0, 2.0]), 2)
    assert [candidate.tokens for candidate in found.live] == [(3, 5), (3, 6)]  # 0.30 and 0.24; 0.18 is left out
    assert parents == [0, 0]
    assert [candidate.spreads for candidate in found.live] == [(0.0, 1.0), (0.0, 1.0)]
    assert np.exp([candidate.logprob for candidate in found.live]) == pytest.approx([0.3, 0.24])
    assert [candidate.tokens for candidate in found.finished] == [(4,), (3,)]  # 0.20 and 0.06; 0.05 falls off
    assert not found.is_done  # 0.3 may still become more than 0.2
    assert Beam([Candidate(logprob=-2.0)], [Candidate(logprob=-2.0)]).is_done is False  # as likely is not less
    assert Beam([Candidate(logprob=-2.1)], [Candidate(logprob=-2.0)]).is_done


def test_among_equals_the_first_wins():
    first, second = Candidate((1,), logprob=-1.0), Candidate((2,), logprob=-1.0)
    assert likeliest_first([second, first]) == [second, first]
    beam, parents = advance(
        Beam([first, second]), np.array([[5, 6], [7, 8]]), np.full((2, 2), -1.0), np.full((2, 1), -3.0), np.zeros(2), 2
    )
    assert [candidate.tokens for candidate in beam.live] == [(1, 5), (1, 6)]
    assert parents == [0, 0]
    assert [candidate.tokens for candidate in beam.finished] == [(1,), (2,)]


def everything(engine, pixels, prompt, known, most, ends):
    """Every answer of fewer than `most` tokens with its log-probability, each by a forward of its own."""
    found, tokens = {}, [int(token) for token in np.flatnonzero(known) if token not in ends]
    for size in range(most):
        sequences = [list(each) for each in itertools.product(tokens, repeat=size)]
        ids = np.array([[*prompt, *sequence] for sequence in sequences])
        logits, lengths = [], np.full(len(ids), len(prompt), np.int32)
        step, cache = engine.prefill(pixels.repeat(len(ids), 0), ids[:, : len(prompt)], lengths, len(prompt) + most)
        for i in range(size):
            logits.append(log_probability(step, ids[:, len(prompt) + i]))
            step, cache = engine.decode(ids[:, [len(prompt) + i]], lengths + np.int32(i), cache)
        for end in ends:
            total = np.sum([*logits, log_probability(step, np.full(len(ids), end))], axis=0)
            found |= {(*sequence, end): float(score) for sequence, score in zip(sequences, total, strict=True)}
    return found


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("ends", [(1,), (1, 9)])
def test_a_wide_beam_finds_what_trying_everything_does(name, ends, tmp_path):
    """Of all answers of up to three tokens among five ids; the others count in the softmax, but are never taken."""
    config = replace(CONFIGS[name], stops=ends)
    loaded = checkpoint.Checkpoint(tmp_path, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    engine = NumpyEngine(loaded)
    pixels, ids, lengths = random_batch(config, (4, 4))
    known = np.isin(np.arange(config.text.vocab), [*ends, 3, 8, 20, 31, 44])
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    found = beam_search(engine, pixels, prompts, known, 4, beams=5)
    for i, prompt in enumerate(prompts):
        scores = everything(engine, pixels[[i]], prompt, known, 4, ends)
        best = max(scores, key=scores.get)
        assert (*found[i][0].tokens, best[-1]) == best
        assert found[i][0].logprob == pytest.approx(scores[best], abs=1e-5)
        falling = [candidate.logprob for candidate in found[i]]
        assert falling == sorted(falling, reverse=True)
        for candidate in found[i]:
            own = [score for tokens, score in scores.items() if tokens[:-1] == candidate.tokens]
            assert min(abs(score - candidate.logprob) for score in own) <= 1e-5
            assert candidate.logprob < sum(candidate.logprobs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    loaded = checkpoint.load(FOLDER / "model.npz")
    assert loaded.config == small_config()
    return open_engines(loaded, tmp_path_factory.mktemp("recorded") / "bundle"), np.load(FOLDER / "beams.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_big_vision_finds_the_same(kind, recorded):
    """Its own model and search, over six prompts (`python -m tests.make_beams`)."""
    engines, golden = recorded
    engine, config = engines[kind], engines[kind].config
    prompts = [[config.image_token] * config.vision.patches + prefix for prefix in PREFIXES]
    answers = set()
    for beams in BEAMS:
        found = beam_search(engine, golden["pixel_values"], prompts, all_known(config), NEW_TOKENS, beams=beams)
        for row, (best, *_) in enumerate(found):
            tokens, logprobs = golden[f"tokens.{beams}"][row].tolist(), golden[f"logprobs.{beams}"][row]
            end = tokens.index(config.eos)
            assert list(best.tokens) == tokens[:end], (beams, row)
            assert best.logprobs == pytest.approx(logprobs[:end], abs=BUDGET)
            assert best.logprob == pytest.approx(logprobs[: end + 1].sum(), abs=BUDGET)
            answers.add((row, best.tokens))
    assert len(answers) >= 12  # they depend on the number of beams
    assert {len(tokens) for _, tokens in answers} == set(range(NEW_TOKENS))


def test_an_answer_is_searched_for_as_if_it_were_alone(shipped, tokenizer):
    """In a batch with prompts that end sooner, are longer, or may have fewer tokens."""
    engine, asked = shipped["session"], ("caption", "answer", "detect")
    questions = [evaluate.prepare(engine, tokenizer, *SUITE.held_out(6, 1, task)) for task in asked]
    questions[2] = replace(questions[2], new_tokens=7)
    search = partial(beam_search, beams=3)
    for search in (partial(beam_search, beams=3), partial(best_of, count=3, sampling=DRAWN)):
        together = answer_all(engine, tokenizer, questions, search=search)
        for question, found in zip(questions, together, strict=True):
            (alone,) = answer_all(engine, tokenizer, [question], search=search)
            assert found.tokens == alone.tokens
            assert [text for text, _ in found.candidates] == [text for text, _ in alone.candidates]
            assert found.logprobs == pytest.approx(alone.logprobs, abs=BUDGET)
            assert len(found.tokens) <= question.new_tokens


def test_the_prompt_is_read_once(tokenizer):
    """Prefill has the rows of the prompts; decode has as many for each as there are candidates."""
    seen = []

    class Counting(NumpyEngine):
        def prefill(self, pixel_values, input_ids, lengths, capacity):
            seen.append(("prefill", len(pixel_values), len(input_ids)))
            return super().prefill(pixel_values, input_ids, lengths, capacity)

        def decode(self, input_ids, lengths, cache):
            seen.append(("decode", len(input_ids), cache[0][0].shape[0]))
            return super().decode(input_ids, lengths, cache)

    engine = Counting(checkpoint.load())
    questions = [evaluate.prepare(engine, tokenizer, *SUITE.held_out(seed, 1, "answer")) for seed in (0, 1)]
    for search in (partial(beam_search, beams=3), partial(best_of, count=3, sampling=DRAWN)):
        seen.clear()
        found = answer_all(engine, tokenizer, questions, search=search)
        assert seen[0] == ("prefill", 2, 2)
        assert {*seen[1:]} == {("decode", 6, 6)}
        assert found[0].timings.decode_tokens > 0
        assert min(found[0].timings.prefill_s, found[0].timings.decode_s) > 0


def test_beams_that_cannot_be_had():
    """More than there are tokens; of a model without an end token the longest is the answer."""
    config = replace(CONFIGS["paligemma1"], stops=())
    loaded = checkpoint.Checkpoint(FOLDER, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    pixels, ids, _ = random_batch(config, (3,))
    known = np.arange(config.text.vocab) < 4
    search = partial(beam_search, NumpyEngine(loaded), pixels, ids.tolist(), known, 3)
    with pytest.raises(PaliGemmaError, match="5 beams, but only 4 tokens to choose from; take fewer beams"):
        search(beams=5)
    (found,) = search(beams=4)
    assert [len(candidate.tokens) for candidate in found] == [3] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_are_reported(kind, shipped, tokenizer, monkeypatch):
    engine = shipped[kind]
    question = evaluate.prepare(engine, tokenizer, *SUITE.held_out(0, 1, "answer"))
    usual, steps = engine.likeliest, []

    def broken(*arguments):
        ids, logprobs, ended = usual(*arguments)
        steps.append(len(ids))
        return ids, np.where(len(steps) == 2, np.nan, logprobs), ended

    monkeypatch.setattr(engine, "likeliest", broken)
    with pytest.raises(PaliGemmaError, match="the logits for token 2 of the answer are not finite numbers"):
        answer_all(engine, tokenizer, [question], search=partial(beam_search, beams=3))
    assert steps == [1, 3]


# --- the best of n -----------------------------------------------------------------------------------------


def test_a_row_is_cut_at_its_end_which_counts():
    logprobs, spreads = np.array([-1.0, -2.0, -4.0, -8.0]), np.arange(4.0)
    tokens = np.array([5, 6, 1, 0])
    assert cut(tokens, logprobs, spreads, 4, (1,)) == Candidate((5, 6), (-1.0, -2.0), (0.0, 1.0), -7.0)
    assert cut(tokens, logprobs, spreads, 2, (1,)) == Candidate((5, 6), (-1.0, -2.0), (0.0, 1.0), -3.0)  # cut off
    assert cut(tokens, logprobs, spreads, 4, ()).logprob == -15.0


def test_the_best_of_several_is_the_likeliest_of_its_draws(shipped, tokenizer):
    """Each draw is what `generate` draws with its seed."""
    engine = shipped["numpy"]
    questions = [evaluate.prepare(engine, tokenizer, *SUITE.held_out(seed, 1, "caption")) for seed in (3, 4)]
    pixels, prompts = np.concatenate([pixels_in(each) for each in questions]), [each.prompt for each in questions]
    found = best_of(
        engine, pixels, prompts, tokenizer.known(), 30, count=4, sampling=DRAWN, seeds=[[9, 0], 8]
    )  # fmt: skip
    for row, seed in enumerate(([9, 0], [8])):
        alone = []
        for i in range(4):
            logprobs = []
            steps = list(
                generate(
                    engine, pixels[[row]], [prompts[row]], tokenizer.known(), 30, DRAWN, seeds=[[*seed, i]],
                    logprobs=logprobs,
                )
            )  # fmt: skip
            tokens = np.concatenate(steps)
            ids = tuple(tokens[tokens != engine.config.eos].tolist())
            alone.append((ids, float(np.sum(logprobs, dtype=float))))
        alone.sort(key=lambda pair: -pair[1])
        assert [candidate.tokens for candidate in found[row]] == [ids for ids, _ in alone]
        assert [candidate.logprob for candidate in found[row]] == pytest.approx([sum_ for _, sum_ in alone], abs=1e-4)
        assert len({ids for ids, _ in alone}) > 1


def test_the_best_of_an_engine_that_does_not_say_how_likely(monkeypatch, shipped, tokenizer):
    engine = shipped["device"]
    usual = engine.draw
    monkeypatch.setattr(engine, "draw", lambda *arguments: (usual(*arguments)[0], None))
    with pytest.raises(PaliGemmaError, match="needs log-probabilities; export the bundle again"):
        answer(engine, tokenizer, open_image(EXAMPLE), "detect star", search=partial(best_of, count=2, sampling=DRAWN))


# --- all engines -------------------------------------------------------------------------------------------


def test_every_engine_finds_the_same(shipped, tokenizer):
    """Fifty prompts of the shipped model, by two and four beams and as the best of three."""
    tasks = {"caption": 8, "answer": 24, "detect": 12, "segment": 6}
    asked = [question for task, count in tasks.items() for question in SUITE.held_out(12, count, task)]
    prepared = [evaluate.prepare(shipped["numpy"], tokenizer, question) for question in asked]
    questions = [replace(question, new_tokens=24) for question in prepared]
    assert len(questions) == 50
    searches = [partial(beam_search, beams=2), partial(beam_search, beams=4)]
    different = 0
    for search in (*searches, partial(best_of, count=3, sampling=DRAWN)):
        reference = answer_all(shipped["numpy"], tokenizer, questions, search=search)
        different += len({found.text for found in reference})
        for kind in ("torch", "session", "device"):
            for found, expected in zip(
                answer_all(shipped[kind], tokenizer, questions, search=search), reference, strict=True
            ):
                assert found.tokens == expected.tokens, kind
                assert found.logprobs == pytest.approx(expected.logprobs, abs=BUDGET)
                for (text, logprob), (their_text, their_logprob) in zip(
                    found.candidates, expected.candidates, strict=True
                ):
                    assert text == their_text
                    assert logprob == pytest.approx(their_logprob, abs=BUDGET)
                for box, other in zip(found.boxes, expected.boxes, strict=True):
                    assert box.uncertainty == pytest.approx(other.uncertainty, rel=1e-3, abs=BUDGET)
    assert different > 60


def test_beams_find_what_is_likelier_than_greedy(shipped, tokenizer):
    """The sum of a beam's best answer is at least that of the greedy one, and now and then above it."""
    engine = shipped["session"]
    questions = [evaluate.prepare(engine, tokenizer, question) for question in SUITE.held_out(2, 20, "caption", True)]
    pixels, prompts = np.concatenate([pixels_in(each) for each in questions]), [each.prompt for each in questions]
    greedy = best_of(engine, pixels, prompts, tokenizer.known(), 48, count=1, sampling=Sampling())
    gains = [
        best.logprob - own[0].logprob
        for (best, *_), own in zip(
            beam_search(engine, pixels, prompts, tokenizer.known(), 48, beams=4), greedy, strict=True
        )
    ]
    assert min(gains) > -1e-3
    assert max(gains) > 0.1


# --- answers and the command line --------------------------------------------------------------------------


def test_an_answer_has_its_candidates(shipped, tokenizer):
    pieces = []
    found = answer(
        shipped["session"], tokenizer, open_image(EXAMPLE), "detect star", on_text=pieces.append,
        search=partial(beam_search, beams=3),
    )  # fmt: skip
    assert pieces == [found.text]
    assert found.candidates[0][0] == found.text
    assert found.candidates[0][1] < sum(found.logprobs)  # the end token counts
    plain = found.as_json()
    assert list(plain) == ["text", "tokens", "logprobs", "candidates", "boxes"]
    assert plain["candidates"] == [{"text": text, "logprob": round(score, 6)} for text, score in found.candidates]
    assert len(plain["candidates"]) == 3


MAINS = {"run-onnx": run_onnx, "python -m torch_impl": run_torch}


@pytest.mark.parametrize("prog", MAINS)
@pytest.mark.parametrize("options", [["--beams", "3"], ["--best-of", "3", "--temperature", "1.5", "--seed", "2"]])
def test_from_the_command_line(prog, options, capsys):
    from numpy_ref.__main__ import main as run_numpy

    printed = []
    for main in (run_numpy, MAINS[prog]):
        assert main([str(EXAMPLE), "caption en", *options, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    reference, found = printed
    assert found["text"] == reference["text"]
    assert len(found["candidates"]) == 3
    assert [each["text"] for each in found["candidates"]] == [each["text"] for each in reference["candidates"]]
    assert found["candidates"][0]["logprob"] == pytest.approx(reference["candidates"][0]["logprob"], abs=BUDGET)
    assert len(found["logprobs"]) == len(found["tokens"])
    assert MAINS[prog]([str(EXAMPLE), "caption en", *options]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--beams 2 --best-of 2", "--beams searches and --best-of draws; leave one of them out"),
        ("--beams 2 --temperature 1", "--beams takes the likeliest and draws nothing; leave --temperature out"),
        ("--beams 2 --top-k 3", "leave --top-k out"),
        ("--beams 2 --top-p 0.5", "leave --top-p out"),
        ("--best-of 5", "--best-of: at temperature 0 all 5 answers are the same; use --temperature 1"),
        (
            "--beams 2 --lookup",
            "--lookup is about one answer, and --beams compares several; leave one out",
        ),
        ("--best-of 2 --temperature 1 --constrain detect", "--constrain is about one answer"),
        ("--beams 2 --start red", "--start is about one answer"),
        ("--best-of 2 --score red", "--score draws no answer, so --best-of has nothing to do; leave one of them out"),
        ("--beams 2 --trace", "--trace follows one answer"),
        ("--best-of 2 --temperature 1 --trace", "--trace follows one answer"),
    ],
)
def test_options_that_contradict_each_other(options, words, capsys):
    from numpy_ref.__main__ import PROG, main

    assert cli.run(PROG, main, [str(EXAMPLE), "caption en", *options.split()]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beams": 1}, "beams is 1, and has to be from 2 to 256, or None"),
        ({"best_of": 257, "temperature": 1.0}, "best_of is 257, and has to be from 2 to 256, or None"),
        ({"beams": 2, "best_of": 2}, "beams searches and best_of draws; leave one of them out"),
        ({"beams": 2, "start": "red"}, "start is about one answer, and beams compares several; leave one out"),
        ({"best_of": 2}, "best_of: at temperature 0 all 2 answers are the same; use temperature 1"),
    ],
)
def test_from_python_too(shipped, tokenizer, options, words):
    model = PaliGemma(shipped["session"], tokenizer)
    with pytest.raises(PaliGemmaError, match=words):
        model.answer(EXAMPLE, "caption en", **options)


def test_several_prompts_about_a_picture(shipped, tokenizer):
    """Its features are read once for all of them, and each is searched for as alone."""
    model, prompts = PaliGemma(shipped["session"], tokenizer), ["detect star", "caption en", "detect circle"]
    for options in ({"beams": 3}, {"best_of": 3, "temperature": 1.5, "seed": 4}):
        found = model.picture(EXAMPLE).answer_all(prompts, **options)
        for prompt, each in zip(prompts, found, strict=True):
            alone = model.answer(EXAMPLE, prompt, **options)
            assert each.tokens == alone.tokens
            assert [text for text, _ in each.candidates] == [text for text, _ in alone.candidates]
            assert len(each.candidates) == 3


@pytest.mark.parametrize("value", ["1", "0", "-3", "257", "x"])
@pytest.mark.parametrize("option", ["--beams", "--best-of"])
def test_numbers_that_make_no_sense(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        run_onnx([str(EXAMPLE), "caption en", f"{option}={value}"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: must be a whole number from 2 to 256, not '{value}'" in line
