"""What an answer may look like: grammars over token ids, so that nothing else can be drawn.

detect[:A;B]     boxes with labels, of the given ones if there are any: <loc…>x4 label ; <loc…>x4 label; or nothing
segment[:A;B]    the same with the sixteen codes of a mask between box and label
choice:A|B|…     one of these texts
number           digits, perhaps with a sign before and a fraction behind
regex:PATTERN    what `automaton.parse` takes

Boxes are ordered: y1 <= y2 and x1 <= x2. A label that is not given is words with single blanks between, of any
characters but "<" and ";". So every answer is read by `detection.parse` as it was meant.

The grammar is an automaton over characters (`automaton.py`); a token may be drawn if it leads the automaton somewhere
(Willard and Louf 2023, "Efficient Guided Generation for Large Language Models"). So a text is allowed however the
tokenizer may cut it, and a well-formed answer stays as the model would have given it. What ends an answer may be drawn
where the automaton accepts. No other control token ever is, since none is spelled by text.

Near the end of its budget an answer is kept to what can still be finished: to tokens from whose state the fewest tokens
to an accepting state are no more than are left.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import detection
from .automaton import (
    CODE,
    DEAD,
    LOCATION,
    Automaton,
    Concatenation,
    Expression,
    Repetition,
    any_but,
    choice,
    compile_expression,
    literal,
    parse,
    sequence,
    symbol,
)
from .errors import PaliGemmaError, plural, quote
from .tokenizer import LOCATIONS, SEGMENTS, Tokenizer

HELP = "detect[:A;B], segment[:A;B], choice:A|B, number or regex:PATTERN"
LONGEST_RUN = 32  # tokens that are guessed at once
KEPT = 256  # masks of states that are remembered
GRAMMARS = 32  # that whoever answers with several remembers: one takes time to make, with a large vocabulary
FAR = np.iinfo(np.int32).max


# --- from an option to an expression -----------------------------------------------------------------------


def expression(spec: str) -> Expression:
    """What `--constrain` takes, as HELP has it -> an expression.

    Raises PaliGemmaError if there is no such grammar, or if it cannot be read.
    """
    kind, colon, argument = spec.partition(":")
    if colon and not argument.strip():
        raise PaliGemmaError(f"--constrain {spec}: nothing stands behind the colon; a grammar is {HELP}")
    if kind in ("detect", "segment"):
        labels = [label.strip() for label in argument.split(";")] if colon else []
        return boxes([_checked(spec, label) for label in labels], has_masks=kind == "segment")
    if kind == "choice" and colon:
        options = argument.split("|")
        if "" in options:
            raise PaliGemmaError(f"--constrain {spec}: one of the choices is empty; write them as choice:yes|no")
        return choice(*map(_text, options))
    if kind == "regex" and colon:
        return parse(argument)
    if spec == "number":
        return parse(r"-?\d+(\.\d+)?")
    raise PaliGemmaError(f"--constrain {quote(spec)}: no such grammar; it is {HELP}")


def _text(text) -> Expression:
    if found := re.search("|".join(LOCATIONS + SEGMENTS), text):
        raise PaliGemmaError(f"the text {quote(text)} has {found[0]} in it, which only boxes and masks have")
    return literal(text)


def _checked(spec, label) -> str:
    """A label that is read from an answer as it is."""
    box = detection.encode(0, 0, 0, 0)
    found = [box.label for box in detection.parse(f"{box} {label} ; {box} {label}", 1, 1)]
    if not label or found != [label] * 2:
        raise PaliGemmaError(
            f"--constrain {spec}: {quote(label)} cannot be a label, which is words with single blanks between, and has "
            "no location token in it"
        )
    return label


def boxes(labels: list[str], has_masks: bool) -> Expression:
    """Any number of boxes with one of these labels, or, if there are none, any."""
    word = Repetition(any_but(" <;"), 1)
    label = choice(*map(_text, labels)) if labels else sequence(word, Repetition(sequence(literal(" "), word)))
    codes = Repetition(symbol(CODE), detection.CODES, detection.CODES) if has_masks else Concatenation()
    box = sequence(Repetition(symbol(LOCATION), 4, 4), codes, literal(" "), label)
    return Repetition(sequence(box, Repetition(sequence(literal(" ; "), box))), 0, 1)


# --- over the tokens of a tokenizer ------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How far an answer has come: the automaton's state, and the locations of the box that is being written."""

    number: int = 0
    box: tuple[int, ...] = ()

    @property
    def least(self) -> int:
        """The smallest location that may follow: the second corner does not lie before the first."""
        return self.box[-2] if len(self.box) in (2, 3) else 0


class _Words:
    """What tokens spell, as symbols in one array: `ids` [A] are those that may be drawn and spell something."""

    def __init__(self, spellings: list[bytes], known: np.ndarray, tokens: dict[int, Collection[int | None]]):
        self.ids = np.array([token for token, spelled in enumerate(spellings) if spelled and known[token]], np.int64)
        self.places = {token: place for place, token in enumerate(self.ids.tolist())}
        kinds = {self.places[token]: kind for kind in tokens for token in tokens[kind] if token in self.places}
        spelled = [bytes(1) if place in kinds else spellings[token] for token, place in self.places.items()]
        self.sizes = np.array([*map(len, spelled)], np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.symbols = np.frombuffer(b"".join(spelled), np.uint8).astype(np.int32)
        for place, kind in kinds.items():
            self.symbols[self.offsets[place]] = kind

    def spelled(self, token: int) -> np.ndarray:
        """The symbols of a token; none if it may not be drawn, or spells nothing."""
        if token not in self.places:
            return self.symbols[:0]
        first = self.offsets[self.places[token]]
        return self.symbols[first : first + self.sizes[self.places[token]]]


class Grammar:
    """The answers of a tokenizer that an automaton takes.

    Raises PaliGemmaError if the tokenizer can write none.
    """

    def __init__(self, spec: str, tokenizer: Tokenizer):
        self.spec, self.tokenizer = spec, tokenizer
        self.automaton: Automaton = compile_expression(expression(spec))
        known, content = tokenizer.known(), tokenizer.content
        self.vocab, self.ends = len(known), [end for end in tokenizer.config.ends if end < len(known) and known[end]]
        self.locations = {content[piece]: i for i, piece in enumerate(LOCATIONS) if piece in content}
        codes = {content[piece] for piece in SEGMENTS if piece in content}
        self.words = _Words(tokenizer.spellings(), known, {LOCATION: self.locations, CODE: codes})
        self._mask = lru_cache(KEPT)(self._build_mask)
        reached = [np.unique(self._following(number)[1]) for number in range(len(self.automaton.table))]
        self.is_last = self.automaton.accepts & np.array([not len(ends) for ends in reached])
        self.distances = self._distances(reached)
        self.farthest = int(self.distances[self.distances != FAR].max(initial=0))
        if self.distances[0] == FAR:
            raise PaliGemmaError(f"--constrain {spec}: this model's tokenizer cannot write any such answer")

    def _following(self, number) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that lead somewhere from a state of the automaton, and where: ids [A] and states [A]."""
        words, position = self.words, 0
        at, states = np.arange(len(words.ids)), np.full(len(words.ids), number, np.int32)
        ids, ends = [words.ids[:0]], [states[:0]]
        while at.size:
            states = self.automaton.table[states, words.symbols[words.offsets[at] + position]]
            at, states = at[states != DEAD], states[states != DEAD]
            position += 1
            whole = words.sizes[at] == position
            ids.append(words.ids[at[whole]])
            ends.append(states[whole])
            at, states = at[~whole], states[~whole]
        return np.concatenate(ids), np.concatenate(ends)

    def _distances(self, reached) -> np.ndarray:
        """The fewest tokens from each state to one that accepts, int32 [states]; FAR if there is no way."""
        distances = np.where(self.automaton.accepts, 0, FAR).astype(np.int32)
        while True:
            nearest = np.array([distances[ends].min(initial=FAR) for ends in reached], np.int32)
            shorter = np.minimum(distances, nearest + (nearest != FAR))
            if np.array_equal(shorter, distances):
                return distances
            distances = shorter

    def shortest(self, state: State) -> int:
        """The fewest tokens that finish an answer, its end not counted."""
        return int(self.distances[state.number])

    def allowed(self, state: State, left: int) -> np.ndarray:
        """Which ids may come next if so many tokens are left, this one included: bool [V]. Not to be written to."""
        return self._mask(state.number, state.least, min(left, self.farthest + 1))

    def _build_mask(self, number, least, left) -> np.ndarray:
        mask = np.zeros(self.vocab, bool)
        ids, ends = self._following(number)
        mask[ids[self.distances[ends] < left]] = True
        if least:
            mask[[token for token, location in self.locations.items() if location < least]] = False
        if self.automaton.accepts[number]:
            mask[self.ends] = True
        mask.setflags(write=False)
        return mask

    def advance(self, state: State, token: int) -> State | None:
        """The state behind a token; None if it may not come there."""
        number, spelled = state.number, self.words.spelled(token)
        for each in spelled:
            number = int(self.automaton.table[number, each])
            if number == DEAD:
                return None
        if not len(spelled):
            return None
        if token not in self.locations:
            return State(number)
        location = self.locations[token]
        return State(number, (*state.box[-3:], location)) if location >= state.least else None

    def is_complete(self, state: State) -> bool:
        """Whether an answer is finished and can only end."""
        return bool(self.is_last[state.number])

    def accepts(self, ids: list[int]) -> bool:
        """Whether the tokens of an answer, without what ends it, are one of the grammar's."""
        state: State | None = State()
        for token in ids:
            state = None if state is None else self.advance(state, token)
        return state is not None and bool(self.automaton.accepts[state.number])

    def check_start(self, ids: Sequence[int], most: int) -> None:
        """Raise PaliGemmaError unless an answer of at most so many tokens can begin with these ids."""
        state = State()
        for token in ids:
            following = self.advance(state, token)
            if following is None:
                raise PaliGemmaError(
                    f"--constrain {self.spec}: no such answer begins with {quote(self.tokenizer.decode(ids))}"
                )
            state = following
        if (needed := len(ids) + self.shortest(state)) > most:
            raise PaliGemmaError(
                f"--constrain {self.spec}: the shortest such answer has {plural(needed, 'token')}, and "
                f"--max-new-tokens is {most}"
            )

    def guess(self, state: State) -> list[int]:
        """The tokens of the text that has to come next, as the tokenizer would cut it; [] where there is a choice.

        A guess, since the same text may be cut in other ways. A word that is not forced to its end is left out.
        """
        table, accepts, number = self.automaton.table, self.automaton.accepts, state.number
        text = bytearray()
        while not accepts[number] and (options := np.flatnonzero(table[number] != DEAD)).size == 1:
            (only,) = options
            if only >= LOCATION:
                break
            text.append(only)
            number = int(table[number, only])
            if len(text) > 8 * LONGEST_RUN:
                break
        following = np.flatnonzero(table[number, :LOCATION] != DEAD)
        if any(each != ord(" ") for each in following):
            del text[max(text.rfind(b" "), 0) :]
        return self.tokenizer.encode(text.decode(errors="ignore"))[:LONGEST_RUN]
