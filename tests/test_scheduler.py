"""Continuous batching: whatever company a request has, it is answered as if it were alone; and who waits for whom."""

import random
import threading
import time
from functools import partial

import numpy as np
import pytest

from export import bundle
from export.service import scheduler as scheduling
from export.service.scheduler import CANCELLED, FAILED, LENGTH, OVERDUE, STOP, Answering, End, Piece, Scheduler
from export.service.slots import Slots
from export.service.text import StoppingText
from export.service.worker import Constraint
from export.session import DeviceSession, Session
from numpy_ref import answer as answering
from numpy_ref.answer import Picture, look
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.errors import PaliGemmaError
from numpy_ref.grammar import Grammar
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer

PROMPTS = ("caption en", "detect star", "segment star", "answer en how many shapes are there?")
SETTINGS = (
    Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, top_p=0.9, seed=4),
    Sampling(temperature=1.5, top_k=5, seed=5),
)  # fmt: skip
EOS, VOCAB = 1, 16


class Counting:
    """A model in place of slots: after a prompt [a, b] come a + 1, a + 2, … until b, then the end."""

    def __init__(self, count=4, prefill_s=0.0, together=1):
        self.count, self.together, self.prefill_s = count, together, prefill_s
        self.rows, self.log, self.fails = [None] * count, [], lambda prompts: False

    def encode(self, picture):
        picture.features = "features"
        self.log.append("encode")

    def prefill(self, first, pictures, prompts):
        assert len(prompts) == len(pictures)
        assert all(picture.features for picture in pictures)
        if self.fails(prompts):
            raise RuntimeError("a broken kernel")
        time.sleep(self.prefill_s)
        self.log.append(f"prefill {len(prompts)}")
        for i, (_, last) in enumerate(prompts):
            self.rows[first + i] = last
        return np.stack([self._logits(prompt[0] + 1, prompt[1]) for prompt in prompts])

    def decode(self, tokens, lengths):
        self.log.append(f"decode {len(tokens)}")
        return np.stack([self._logits(token + 1, self.rows[row]) for row, token in enumerate(tokens)])

    def draw(self, logits, known, samplings, uniform, allowed, again):
        return logits.argmax(-1), np.where(np.isfinite(logits).all(-1), 0, np.nan).astype(np.float32)

    def on_host(self, logits):
        return logits

    def copy(self, source, target, length):
        self.rows[target] = self.rows[source]

    def _logits(self, token, last):
        return np.eye(VOCAB, dtype=np.float32)[token if token <= last else EOS]


def asked(first, last, most=99, pictures=1, seen=True, **fields):
    """An answer in the making, and the list that its events go to; its pictures were looked at, or not."""
    events, pixel_values = [], np.zeros((1, 3, 2, 2), np.float32)
    shown = [Picture(pixel_values, 2, 2, features="features" if seen else None) for _ in range(pictures)]
    return Answering([first, last], shown, most, events.append, **fields), events


def tokens_of(events):
    return [event.token for event in events if isinstance(event, Piece)]


def counting(**fields):
    slots = Counting(**fields)
    return slots, Scheduler(slots, np.ones(VOCAB, bool), [EOS])


def finish(scheduler, rounds=1000):
    for _ in range(rounds):
        if not scheduler.round():
            return
    raise AssertionError("it does not end")


def test_rows_of_unequal_length_come_and_go():
    slots, scheduler = counting(count=3)
    found = [(last, asked(2, last)) for last in (9, 3, 2, 12, 5, 7, 4)]
    for _, (each, _) in found:
        scheduler.submit(each)
    finish(scheduler)
    for last, (_, events) in found:
        assert tokens_of(events) == list(range(3, last + 1))
        assert events[-1] == End(STOP)
    assert max(int(line.split()[1]) for line in slots.log if line.startswith("decode")) == 3


def test_a_step_lies_between_prefills_that_take_their_time():
    """With `gap_s` over after one prefill, nobody who runs waits for more than that."""
    slots, scheduler = counting(count=4, prefill_s=0.02)
    scheduler.gap_s = 0.01
    for last in (14, 14, 14, 14):
        scheduler.submit(asked(2, last)[0])
    finish(scheduler)
    begins = [i for i, line in enumerate(slots.log) if line.startswith("prefill")]
    assert slots.log[:8] == [
        "prefill 1",
        "decode 1",
        "prefill 1",
        "decode 2",
        "prefill 1",
        "decode 3",
        "prefill 1",
        "decode 4",
    ]
    assert len(begins) == 4


def test_a_step_lies_between_a_picture_and_its_prompt():
    """The vision tower and the prefill each hold up the others once; a picture that was seen is not looked at again."""
    slots, scheduler = counting(count=3)
    scheduler.gap_s = 0.0
    scheduler.submit(asked(2, 14)[0])
    scheduler.round()
    new, _ = asked(2, 14, seen=False)
    again, _ = asked(2, 14)
    again.pictures = new.pictures
    scheduler.submit(new)
    scheduler.submit(again)
    for _ in range(3):
        scheduler.round()
    assert slots.log[2:] == ["encode", "decode 1", "prefill 1", "decode 2", "prefill 1", "decode 3"]


def test_a_picture_that_fails_fails_its_own_request():
    slots, scheduler = counting()
    slots.encode = lambda picture: 1 / 0
    found = [asked(2, 9), asked(2, 9, seen=False), asked(2, 9)]
    for each, _ in found:
        scheduler.submit(each)
    finish(scheduler)
    assert [events[-1].reason for _, events in found] == [STOP, FAILED, STOP]


def test_prefills_that_are_quick_come_together():
    slots, scheduler = counting(count=8)
    scheduler.gap_s = 10.0
    for _ in range(8):
        scheduler.submit(asked(2, 9)[0])
    scheduler.round()
    assert slots.log == ["prefill 1"] * 8 + ["decode 8"]


def test_a_device_prefills_several_at_once():
    slots, scheduler = counting(count=8, together=4)
    scheduler.gap_s = 10.0
    for _ in range(6):
        scheduler.submit(asked(2, 9)[0])
    scheduler.round()
    assert slots.log == ["prefill 4", "prefill 2", "decode 6"]


def test_a_slot_is_free_in_the_round_in_which_its_answer_ends():
    slots, scheduler = counting(count=1)
    (first, _), (second, events) = asked(2, 5), asked(2, 4)
    scheduler.submit(first)
    scheduler.submit(second)
    while not events:
        scheduler.round()
    assert slots.log[: slots.log.index("prefill 1", 1)] == ["prefill 1", "decode 1", "decode 1", "decode 1"]


def test_the_longest_answer():
    _, scheduler = counting()
    one, events = asked(2, 12, most=1)
    five, more = asked(2, 12, most=5)
    scheduler.submit(one)
    scheduler.submit(five)
    finish(scheduler)
    assert (tokens_of(events), events[-1].reason) == ([3], LENGTH)
    assert (tokens_of(more), more[-1].reason) == ([3, 4, 5, 6, 7], LENGTH)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_what_is_cancelled_ends_within_a_step(is_waiting):
    _, scheduler = counting(count=1)
    (running, events), (waiting, others) = asked(2, 14), asked(2, 5)
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.round()
    scheduler.cancel(waiting if is_waiting else running)
    scheduler.round()
    assert (others if is_waiting else events)[-1] == End(CANCELLED)
    assert len(scheduler.live) == 1
    finish(scheduler)
    assert (events if is_waiting else others)[-1] == End(STOP)


def test_what_is_overdue_ends():
    _, scheduler = counting(count=1)
    (running, events), (waiting, others) = asked(2, 14, deadline=time.monotonic() + 0.05), asked(2, 4)
    waiting.deadline = time.monotonic() + 0.02
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.round()
    time.sleep(0.06)
    scheduler.round()
    assert (events[-1], others) == (End(OVERDUE), [End(OVERDUE)])
    assert not scheduler.live


def test_a_prefill_that_fails_takes_nobody_along():
    slots, scheduler = counting(count=8, together=4)
    slots.fails = lambda prompts: any(first == 7 for first, _ in prompts)
    found = [asked(first, 12) for first in (2, 7, 3, 4)]
    for each, _ in found:
        scheduler.submit(each)
    finish(scheduler)
    assert [events[-1].reason for _, events in found] == [STOP, FAILED, STOP, STOP]
    assert "a broken kernel" in found[1][1][-1].error


def test_a_step_that_fails_fails_those_that_run_and_no_more():
    slots, scheduler = counting(count=2)
    decode, found = slots.decode, [asked(2, 9) for _ in range(3)]
    for each, _ in found:
        scheduler.submit(each)
    slots.decode = lambda *arguments: 1 / 0
    scheduler.round()
    slots.decode = decode
    finish(scheduler)
    assert [events[-1].reason for _, events in found] == [FAILED, FAILED, STOP]


def test_logits_that_are_not_finite_fail_their_row_alone():
    slots, scheduler = counting()
    decode = slots.decode

    def broken(tokens, lengths):
        logits = decode(tokens, lengths)
        logits[1] = np.nan
        return logits

    slots.decode = broken
    found = [asked(2, 9) for _ in range(3)]
    for each, _ in found:
        scheduler.submit(each)
    scheduler.round()
    slots.decode = decode
    finish(scheduler)
    assert [events[-1].reason for _, events in found] == [STOP, FAILED, STOP]
    assert found[1][1][-1].error == scheduling.NOT_FINITE


def test_a_constraint_that_fails_fails_its_row_alone():
    class Refusing:
        def allowed(self):
            return np.ones(VOCAB, bool)

        def accept(self, token):
            raise PaliGemmaError("not in the grammar")

    _, scheduler = counting()
    found = [asked(2, 9), asked(2, 9, constraint=Refusing())]
    for each, _ in found:
        scheduler.submit(each)
    finish(scheduler)
    assert [events[-1].reason for _, events in found] == [STOP, FAILED]


def test_it_sleeps_until_something_comes_and_ends_when_it_is_closed():
    _, scheduler = counting()
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    time.sleep(0.05)
    each, events = asked(2, 9)
    scheduler.submit(each)
    waited = time.monotonic() + 10
    while not (events and isinstance(events[-1], End)):
        assert time.monotonic() < waited
        time.sleep(0.001)
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_likeliest():
    logits = np.array([0.0, 3.0, 1.0, 3.0, -np.inf], np.float32)
    found = scheduling.likeliest(logits, 3)
    assert [token for token, _ in found] == [1, 3, 2]
    assert np.isclose(np.exp([logprob for _, logprob in scheduling.likeliest(logits, 20)]).sum(), 1)


# --- with a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[Session, DeviceSession], ids=["logits on the host", "logits on the device"])
def model(request):
    """An engine of the shipped model, its tokenizer and its answers to each question alone."""
    shipped = bundle.shipped()
    engine = request.param(shipped, "cpu")
    tokenizer = Tokenizer.load(shipped.path, shipped.config)
    image = open_image(SHIPPED / "example.png")
    alone = {
        (prompt, sampling): answering.answer(engine, tokenizer, image, prompt, sampling=sampling)
        for prompt in PROMPTS
        for sampling in SETTINGS
    }
    picture = look(engine, image)
    (picture.features,) = engine.encode(picture.pixel_values)
    return engine, tokenizer, [picture], alone


def test_answers_in_company_are_those_alone(model):
    """Two hundred requests in random order, which come while others run, on eight slots."""
    engine, tokenizer, pictures, alone = model
    scheduler = Scheduler(Slots(engine, 8, engine.max_length), tokenizer.known(), engine.config.ends)
    choose, found = random.Random(0), []
    for _ in range(200):
        prompt, sampling, events = choose.choice(PROMPTS), choose.choice(SETTINGS), []
        ids = tokenizer.prompt(prompt)
        scheduler.submit(Answering(ids, pictures, 64, events.append, sampling, sampling.seed))
        found.append((alone[prompt, sampling], events))
        for _ in range(choose.randrange(3)):
            scheduler.round()
    finish(scheduler, 10_000)
    for answer, events in found:
        assert events[-1] == End(STOP)
        assert tokens_of(events) == answer.tokens
        logprobs = [event.logprob for event in events[:-1]]
        assert np.allclose(logprobs, answer.logprobs, rtol=0, atol=1e-4)


def test_the_same_question_is_read_at_once(model, monkeypatch):
    engine, tokenizer, pictures, _ = model
    slots = Slots(engine, 4, engine.max_length)
    scheduler, reads = Scheduler(slots, tokenizer.known(), engine.config.ends), []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *arguments: reads.append(len(arguments[1])) or prefill(*arguments))
    ids, found = tokenizer.prompt("caption en"), [[] for _ in range(3)]
    for seed, events in enumerate(found):
        scheduler.submit(Answering(ids, pictures, 64, events.append, Sampling(1.0), seed))
    finish(scheduler)
    assert reads == [1 if slots.together == 1 else 3]
    image = open_image(SHIPPED / "example.png")
    for seed, events in enumerate(found):
        answer = answering.answer(engine, tokenizer, image, "caption en", sampling=Sampling(1.0, seed=seed))
        assert tokens_of(events) == answer.tokens


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("spec", ["detect:star", "choice:red|a yellow star|12", "number"])
def test_grammars_are_kept_row_by_row(model, sampling, spec):
    """A constrained answer is the one alone, and its neighbours do not notice."""
    engine, tokenizer, pictures, alone = model
    image = open_image(SHIPPED / "example.png")
    expected = answering.answer(
        engine, tokenizer, image, "caption en", sampling=sampling, grammar=Grammar(spec, tokenizer)
    )
    scheduler = Scheduler(Slots(engine, 4, engine.max_length), tokenizer.known(), engine.config.ends)
    events, others = [], []
    constraint, ids = Constraint(Grammar(spec, tokenizer), 64), tokenizer.prompt("caption en")
    make = partial(Answering, sampling=sampling, seed=sampling.seed)
    scheduler.submit(make(list(ids), pictures, 64, events.append, constraint=constraint))
    scheduler.submit(make(list(ids), pictures, 64, others.append))
    finish(scheduler)
    assert tokens_of(events) == expected.tokens
    assert constraint.grammar.accepts(tokens_of(events))
    assert tokens_of(others) == alone["caption en", sampling].tokens


def test_stale_rows_are_not_read(model):
    """What an answer leaves in its slot changes nothing for the next one in it."""
    engine, tokenizer, pictures, alone = model
    slots = Slots(engine, 2, engine.max_length)
    for value in slots.whole.buffers.values():
        value.numpy()[:] = 1e4
    scheduler, found = Scheduler(slots, tokenizer.known(), engine.config.ends), []
    for prompt in (*PROMPTS, *PROMPTS):
        events = []
        scheduler.submit(Answering(tokenizer.prompt(prompt), pictures, 64, events.append))
        found.append((alone[prompt, Sampling()].tokens, events))
    finish(scheduler)
    assert all(tokens_of(events) == tokens for tokens, events in found)


# --- text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    shipped = bundle.shipped()
    return Tokenizer.load(shipped.path, shipped.config)


TEXT = "a yellow star, a red circle, a purple star"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [((), TEXT), ((", a red",), "a yellow star"), (("circle", "red"), "a yellow star, a "), (("nowhere",), TEXT),
     (("a yellow star, a red circle, a purple stars",), TEXT), (("a",), ""), ((TEXT,), ""), (("star, a p", "star"), "a yellow ")],
)  # fmt: skip
def test_stop_strings(tokenizer, stops, expected):
    """Nothing of a stop string, or of what may become one, is ever given out before it is known."""
    text, given = StoppingText(tokenizer, stops), ""
    for token in tokenizer.encode(TEXT):
        given += text.push(token)
        assert expected.startswith(given)
        if text.stopped:
            break
    given += text.close()
    assert given == expected
    assert text.stopped == (expected != TEXT)


def test_stops_end_a_row(model):
    engine, tokenizer, pictures, alone = model
    scheduler = Scheduler(Slots(engine, 2, engine.max_length), tokenizer.known(), engine.config.ends)
    whole, events = alone["caption en", Sampling()].text, []
    first = whole.split(",")[0]
    make = partial(Answering, tokenizer.prompt("caption en"), pictures, 64, events.append)
    scheduler.submit(make(text=StoppingText(tokenizer, [","])))
    finish(scheduler)
    assert "".join(event.text for event in events) == first
    assert events[-1].reason == STOP
    assert len(tokens_of(events)) < len(alone["caption en", Sampling()].tokens)
