"""The generation loop, over any engine.

Each pass feeds the engine a row's last token, and perhaps some that are guessed to follow. Behind each of them a token
is drawn; a guess counts if it is what was drawn before it. So the answer is the one that comes without guesses, as a
token is drawn by a number that belongs to its place (Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding"). A grammar guesses the text about which it leaves no choice, `look_up` what stood there before.
"""

import itertools
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .config import PaliGemmaConfig
from .engine import Engine, Pictures, pixels_of
from .errors import PaliGemmaError, plural
from .grammar import Grammar, State
from .model.sampling import Sampling

MOST_AT_ONCE = 32  # tokens that are fed
LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens by which `look_up` knows a place again


@dataclass
class Timings:
    """Seconds spent in prefill and decode, filled in while generating."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    passes: int = 0  # that gave them: decodes and extends

    def add_wait(self, step: int, seconds: float) -> None:
        """Seconds waited for the logits of a step, which prefill gave, or decode."""
        if step:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids of unequal length -> input_ids [B, T] int64, padded on the right, and lengths [B] int32."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    input_ids = np.full((len(prompts), lengths.max()), pad, np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return input_ids, lengths


def pictures_in(config: PaliGemmaConfig, prompt: Sequence[int]) -> int:
    """How many pictures a prompt has places for; one, if it has none."""
    return max(1, list(prompt).count(config.image_token) // config.vision.patches)


def choose_capacity(engine: Engine, lengths: np.ndarray, max_new_tokens: int | np.ndarray, pictures: int = 1) -> int:
    """Cache slots for the longest prompt and answer (the last token is never fed back); lengths [B].

    `max_new_tokens` is one number, or [B]; `pictures` is how many each prompt has. Raises PaliGemmaError if that is
    more than the engine has positions for.
    """
    patches, new_tokens = pictures * engine.config.vision.patches, np.broadcast_to(max_new_tokens, lengths.shape)
    longest = int((lengths + new_tokens).argmax())
    needed = int(lengths[longest] + new_tokens[longest]) - 1
    if needed > engine.max_length:
        raise PaliGemmaError(
            f"the prompt has {lengths[longest]} tokens ({patches} of them the picture{'s' * (pictures > 1)}), which "
            f"with {plural(new_tokens[longest], 'new one')} exceeds the capacity of {engine.max_length}; "
            f"{'give fewer pictures, ' * (pictures > 1)}shorten the prompt or lower --max-new-tokens"
        )
    return needed


@dataclass
class _Row:
    """An answer as it grows, and what is guessed to come next."""

    prompt: Sequence[int]
    most: int  # tokens
    start: Sequence[int]  # what the answer is given to begin with
    state: State | None  # of the grammar, if there is one
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def given(self) -> Sequence[int]:
        """What is left of the start."""
        return self.start[len(self.ids) :]

    def append(self, token: int, logprob: float, spread: float, ends: Sequence[int], grammar: Grammar | None) -> None:
        """One more token; and what ends the answer behind it, where the grammar leaves nothing else."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.spreads.append(spread)
        self.ended = token in ends or len(self.ids) == self.most
        if grammar is None or self.state is None or self.ended:
            return
        self.state = grammar.advance(self.state, token)
        if self.state is not None and grammar.is_complete(self.state):
            self.ended = True
            self.ids += grammar.ends[:1]
            self.logprobs += [math.nan] * len(grammar.ends[:1])  # which the model was not asked for
            self.spreads += [math.nan] * len(grammar.ends[:1])

    def states(self, grammar: Grammar) -> Iterator[tuple[State, int]]:
        """The state behind the last token, and behind each that is guessed; and how many tokens are left there."""
        state = self.state
        for i, token in enumerate([*self.guess, -1]):
            if state is not None:
                yield state, self.most - len(self.ids) - i
                state = grammar.advance(state, token)


def check_finite(engine: Engine, finite: np.ndarray, rows: Sequence[_Row], pictures: Pictures, copies: int = 1) -> None:
    """Raise PaliGemmaError if logits that are looked at are not finite, and say where they arose.

    `finite` [B, T] says it of those behind each row's last token and its guesses. So many `copies` of a row share its
    pictures.
    """
    for number, row in enumerate(rows):
        looked_at = finite[number, : 1 + len(row.guess)]
        if not (row.ended or looked_at.all()):
            own = np.split(pixels_of(pictures), len(rows) // copies)[number // copies]
            raise not_finite(engine, own, row.prompt, [*row.ids, *row.guess[: int(looked_at.argmin())]])


def not_finite(
    engine: Engine, pixel_values: np.ndarray, prompt: Sequence[int], answered: Sequence[int]
) -> PaliGemmaError:
    """The error for logits that are not finite behind what was answered to a prompt about pixel_values [N, 3, S, S].

    An engine that has taps runs that once more with one, to say where they arose.
    """
    input_ids, lengths = pad_prompts([[*prompt, *answered]], engine.config.pad)
    tap = engine.first_not_finite(pixel_values, input_ids, lengths, np.array([len(prompt)], np.int32))
    reason = f"the first value that is not is {tap}" if tap else "export-onnx --verify says in which layer they arise"
    return PaliGemmaError(f"the logits for token {len(answered) + 1} of the answer are not finite numbers; {reason}")


def spreads_of(engine: Engine, logits: Any, ids: np.ndarray, locations: np.ndarray | None) -> np.ndarray:
    """`Engine.location_spread` of logits [B, V], if any of the ids [B, ...] is a location; else NaN: float32 [B]."""
    if locations is None or not np.isin(ids, locations).any():
        return np.full(len(ids), np.nan, np.float32)
    return engine.location_spread(logits, locations)


def generate(
    engine: Engine,
    pictures: Pictures,
    prompts: Sequence[Sequence[int]],
    known: np.ndarray,
    max_new_tokens: int | np.ndarray = 64,
    sampling: Sampling | None = None,
    timings: Timings | None = None,
    seeds: Sequence | None = None,
    logprobs: list[np.ndarray | None] | None = None,
    grammar: Grammar | None = None,
    start: Sequence[int] = (),
    alike: Collection[int] | None = None,
    spreads: list[np.ndarray] | None = None,
    locations: np.ndarray | None = None,
    copies: int = 1,
) -> Iterator[np.ndarray]:
    """Yield one token a row [B] at a time until every row has ended or has max_new_tokens, one number or one a row.

    `pictures` are the N of each of B prompts, as `Engine.prefill` takes them; the ids of a prompt begin with their
    places.
    A row that has ended (its eos or its last token was yielded) yields pad from then on. With `seeds`, one a row in
    place of the sampling's own, a row draws the same in any company. `logprobs` gets what `Engine.draw` says of each
    step's tokens, [B] or None, before they are yielded; NaN where nothing was drawn.

    Of a `grammar` only what it allows is drawn. An answer begins with the ids of `start`, which count among its own.
    Where `alike` are given, tokens are guessed by `look_up`. `spreads` gets of each step what `spreads_of` says, [B].
    Prompts that stand there `copies` times in a row are read once, and their pictures are given once. Raises
    PaliGemmaError if the engine has too few positions, if its logits are not finite, or if no answer of the grammar
    begins with the start or is as short.
    """
    config, sampling, timings = engine.config, sampling or Sampling(), timings or Timings()
    input_ids, lengths = pad_prompts(prompts, config.pad)
    count = pictures_in(config, prompts[0])
    capacity = choose_capacity(engine, lengths, max_new_tokens, count)
    rows = []
    for prompt, most in zip(prompts, np.broadcast_to(max_new_tokens, len(prompts)), strict=True):
        if grammar:
            grammar.check_start(start, int(most))
        rows.append(_Row(prompt, int(most), start[: int(most)], State() if grammar else None))
    numbers, yielded = [_Numbers(len(rows), sampling.seed, seeds, again) for again in (False, True)], 0

    started = time.perf_counter()
    logits, cache = engine.prefill(pictures, input_ids[::copies], lengths[::copies], capacity)
    if copies > 1:
        logits, cache = engine.repeat(logits, cache, copies)
    timings.prefill_s = time.perf_counter() - started
    for step in itertools.count():
        on_host = isinstance(logits, np.ndarray)
        if on_host:
            finite = np.isfinite(logits).all(-1).reshape(len(rows), -1)
            check_finite(engine, finite, rows, pictures, copies)
        started = time.perf_counter()
        tokens, found = _draw_behind(engine, logits, known, sampling, rows, grammar, numbers)
        spread = spreads_of(engine, logits, tokens.reshape(-1), locations).reshape(tokens.shape)
        if not on_host:  # a device was still at work on them, and this the wait for it
            timings.add_wait(step, time.perf_counter() - started)
            if found is not None:  # all that comes to the host of them; to look at the others were one more wait
                check_finite(engine, np.isfinite(found), rows, pictures, copies)
        for number, row in enumerate(rows):
            own = None if found is None else found[number]
            taken = _take(row, tokens[number], own, spread[number], config.ends, grammar)
            if step:
                lengths[number] += taken
                timings.decode_tokens += taken
        alive = [row for row in rows if not row.ended]
        until = min(len(row.ids) for row in alive) if alive else max(len(row.ids) for row in rows)
        for place in range(yielded, until):
            if logprobs is not None:
                each = [row.logprobs[place] if place < len(row.ids) else math.nan for row in rows]
                logprobs.append(None if found is None else np.array(each, np.float32))
            if spreads is not None:
                spreads.append(np.array([row.spreads[place] if place < len(row.ids) else math.nan for row in rows]))
            yield np.array([row.ids[place] if place < len(row.ids) else config.pad for row in rows])
        yielded = until
        if not alive:
            return
        size = _guess(
            engine,
            rows,
            capacity - int(max(lengths[i] for i, row in enumerate(rows) if not row.ended)),
            grammar,
            alike,
            count * config.vision.patches,
        )
        # A row that has ended stays where it is, or on the last slots, and overwrites what nobody reads.
        lengths = np.minimum(lengths, capacity - size).astype(np.int32)
        fed = np.full((len(rows), size), config.pad, np.int64)
        for given, row in zip(fed, rows, strict=True):
            if not row.ended:
                given[: 1 + len(row.guess)] = [row.ids[-1], *row.guess]
        started = time.perf_counter()
        logits, cache = (engine.decode if size == 1 else engine.extend)(fed, lengths, cache)
        timings.decode_s += time.perf_counter() - started
        timings.passes += 1


def _take(row, tokens, logprobs, spreads, ends, grammar) -> int:
    """Take in what was drawn behind a row's last token and its guesses [T], up to the first that was not guessed.

    How many tokens that is.
    """
    before = len(row.ids)
    for token, logprob, spread, guess in zip(
        tokens.tolist(), itertools.repeat(math.nan) if logprobs is None else logprobs.tolist(), spreads.tolist(),
        [*row.guess, None], strict=False,
    ):  # fmt: skip
        if row.ended:
            break
        row.append(token, logprob, spread, ends, grammar)
        if token != guess:
            break
    return len(row.ids) - before


def _draw_behind(engine, logits, known, sampling, rows, grammar, numbers) -> tuple[np.ndarray, np.ndarray | None]:
    """A token behind each row's last and each of its guesses, and their log-probabilities: two [B, T].

    A token that the grammar does not allow is drawn again among those that it does, with a number of its own. So what
    it allows is as likely as in the distribution without what it does not, and an answer that it allows is not changed.
    """
    size = 1 + max(len(row.guess) for row in rows)
    uniform, again = (
        [each.at(i, len(row.ids) + j) for i, row in enumerate(rows) for j in range(size)] for each in numbers
    )
    token, logprob = engine.draw(logits, known, sampling, np.array(uniform, np.float32))
    token, mask, refused = token.copy(), None, []
    for i, row in enumerate(rows):
        for j, (state, left) in enumerate(row.states(grammar) if grammar and not row.ended else ()):
            allowed = grammar.allowed(state, left)
            if j >= len(row.given) and not allowed[token[size * i + j]]:
                mask = np.tile(known, (len(token), 1)) if mask is None else mask
                mask[size * i + j] = allowed
                refused.append(size * i + j)
    if mask is not None:
        drawn, likely = engine.draw(logits, mask, sampling, np.array(again, np.float32))
        token[refused] = drawn[refused]
        if logprob is not None and likely is not None:
            logprob = logprob.copy()
            logprob[refused] = likely[refused]
    given = np.array([[*row.given[:size], *[-1] * (size - len(row.given))] for row in rows]).reshape(-1)
    if (given >= 0).any():
        token = np.where(given >= 0, given, token)
        logprob = engine.log_probability(logits, token)
    return token.reshape(len(rows), size), None if logprob is None else logprob.reshape(len(rows), size)


def _guess(engine, rows, room, grammar, alike, patches) -> int:
    """Guess what follows each row's last token, if the engine reads several at once; how many tokens to feed."""
    for row in rows:
        row.guess = []
        if row.ended:
            continue
        if row.given:
            row.guess = [*row.given]
        elif engine.extends_at_once:
            forced = grammar.guess(row.state) if grammar else []
            row.guess = [] if alike is None else look_up(row.prompt[patches:], row.ids, alike)
            if grammar:
                row.guess = row.guess[: len([*row.states(grammar)]) - 1]  # what it does not allow is not worth a guess
            row.guess = max(forced, row.guess, key=len)
        row.guess = row.guess[: min(room - 1, row.most - len(row.ids) - 1, MOST_AT_ONCE - 1)]
    return 1 + max(len(row.guess) for row in rows)


def look_up(prompt: Sequence[int], ids: Sequence[int], alike: Collection[int]) -> list[int]:
    """What followed the last tokens of an answer where they stood before, in the prompt or the answer.

    Empty if they did not, or not enough of them. Tokens `alike`, of locations and codes, match each other by their
    place in a row of such, and are not guessed: behind a box comes the label that the last one had, and what parted
    them. (Prompt lookup decoding: Saxena 2023.)
    """
    seen, run = [], 0
    for token in (*prompt, *ids):
        run = run + 1 if token in alike else 0
        seen.append(-run if run else token)
    for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for begin in range(len(seen) - size - 1, -1, -1):
            if seen[begin : begin + size] == seen[-size:]:
                following = seen[begin + size : begin + size + MOST_AT_ONCE]
                return list(itertools.takewhile(lambda token: token >= 0, following))
    return []


class _Numbers:
    """A uniform number in [0, 1) for each token of each row: from one generator, or each row's from one of its own.

    With `again`, others, for what is drawn a second time.
    """

    def __init__(self, rows: int, seed: int, seeds: Sequence | None, again: bool):
        self.rows, self.numbers, self.is_shared = rows, [], seeds is None
        generators = [np.random.default_rng(each) for each in ([seed] if seeds is None else seeds)]
        self.generators = [each.spawn(1)[0] for each in generators] if again else generators

    def at(self, row: int, place: int) -> float:
        """The number of a row's token."""
        while len(self.numbers) <= place:
            if self.is_shared:
                self.numbers.append(self.generators[0].random(self.rows, np.float32))
            else:
                self.numbers.append([generator.random(dtype=np.float32) for generator in self.generators])
        return self.numbers[place][row]


def answers(tokens: Sequence[np.ndarray], ends: int | Sequence[int]) -> list[list[int]]:
    """Stacked yields [steps, B] -> one list of ids a row, cut before the first of `ends`, an id or several."""
    rows = np.stack(tokens, axis=1)
    return [row[: np.append(np.flatnonzero(np.isin(row, ends)), len(row))[0]].tolist() for row in rows]
