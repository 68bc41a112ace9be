"""Regular expressions over bytes and two kinds of token, and the deterministic automata that read them.

An expression is built by hand or parsed from a pattern (`parse`). `compile_expression` makes an automaton of it by
Thompson's construction and the subset construction (Aho, Sethi and Ullman 1986, sections 3.7 and 3.6).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .errors import PaliGemmaError, quote

LOCATION, CODE = 256, 257  # symbols: after the 256 bytes, a token <loc....>, and a token <seg...>
SYMBOLS = 258
DEAD = -1  # the state behind what no word begins with
MOST_STATES, MOST_EDGES = 2000, 20_000
MOST_REPEATS, MOST_NESTED = 1000, 40


@dataclass(frozen=True)
class OneOf:
    """A single symbol of a set."""

    symbols: frozenset[int]


@dataclass(frozen=True)
class Concatenation:
    """Parts one after another; of no parts, the empty word."""

    parts: tuple["Expression", ...] = ()


@dataclass(frozen=True)
class Alternation:
    """Any one of several."""

    options: tuple["Expression", ...]


@dataclass(frozen=True)
class Repetition:
    """A part from `least` to `most` times; None is without end."""

    part: "Expression"
    least: int = 0
    most: int | None = None


Expression = OneOf | Concatenation | Alternation | Repetition


@dataclass(frozen=True)
class Automaton:
    """Where each symbol leads: table int32 [states, SYMBOLS] with DEAD for nowhere, accepts bool [states]; 0 begins.

    From every state in the table a word can be finished.
    """

    table: np.ndarray
    accepts: np.ndarray


# --- expressions -------------------------------------------------------------------------------------------


def literal(text: str) -> Concatenation:
    """A text as it is, by its UTF-8 bytes. Raises PaliGemmaError if it is not Unicode."""
    try:
        return Concatenation(tuple(OneOf(frozenset({byte})) for byte in text.encode()))
    except UnicodeEncodeError:
        raise PaliGemmaError(f"the text {text!r} is not valid Unicode; pass it as UTF-8") from None


def sequence(*parts: Expression) -> Concatenation:
    return Concatenation(parts)


def choice(*options: Expression) -> Alternation:
    return Alternation(options)


def symbol(number: int) -> OneOf:
    return OneOf(frozenset({number}))


def _bytes(first, last) -> OneOf:
    return OneOf(frozenset(range(first, last + 1)))


_LATER = _bytes(0x80, 0xBF)
#: Any character past ASCII, well formed (RFC 3629, section 4).
PAST_ASCII = choice(
    sequence(_bytes(0xC2, 0xDF), _LATER),
    sequence(_bytes(0xE0, 0xE0), _bytes(0xA0, 0xBF), _LATER),
    sequence(OneOf(frozenset({*range(0xE1, 0xED), 0xEE, 0xEF})), _LATER, _LATER),
    sequence(_bytes(0xED, 0xED), _bytes(0x80, 0x9F), _LATER),
    sequence(_bytes(0xF0, 0xF0), _bytes(0x90, 0xBF), _LATER, _LATER),
    sequence(_bytes(0xF1, 0xF3), _LATER, _LATER, _LATER),
    sequence(_bytes(0xF4, 0xF4), _bytes(0x80, 0x8F), _LATER, _LATER),
)


def any_but(letters: str) -> Alternation:
    """Any printable character but those of ASCII that are given; a blank is one."""
    return choice(OneOf(frozenset(range(0x20, 0x7F)) - frozenset(letters.encode())), PAST_ASCII)


# --- patterns ----------------------------------------------------------------------------------------------

_DIGITS = frozenset(b"0123456789")
_WORD = _DIGITS | frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": frozenset(b" ")}
_SPECIAL = "\\|()[]{}*+?."


def parse(pattern: str) -> Expression:
    r"""A pattern -> the expression that matches the whole of a text.

    A pattern may have, much as in Python's `re`: characters; `.` for any printable one; classes such as `[a-z_]` and
    `[^0-9]`, of ASCII; `\d`, `\w` and `\s`, of ASCII and the last a blank alone; `\` before a special character; `( )`
    and `|`; and behind any of these `*`, `+`, `?`, `{n}`, `{n,}` or `{n,m}`. Raises PaliGemmaError for anything else.
    """
    return _Parser(pattern).parse()


class _Parser:
    """Recursive descent over a pattern; `at` is the next character."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth = pattern, 0, 0

    def parse(self) -> Expression:
        found = self._choice()
        if self.at < len(self.pattern):
            self._refuse("a ) without its (")
        return found

    def _choice(self) -> Expression:
        self.depth += 1
        if self.depth > MOST_NESTED:
            self._refuse(f"more than {MOST_NESTED} ( inside one another")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _sequence(self) -> Expression:
        parts = []
        while self.at < len(self.pattern) and self._next() not in "|)":
            parts.append(self._repeated())
        return parts[0] if len(parts) == 1 else Concatenation(tuple(parts))

    def _repeated(self) -> Expression:
        part = self._atom()
        for mark, least, most in (("*", 0, None), ("+", 1, None), ("?", 0, 1)):
            if self._take(mark):
                return self._single(Repetition(part, least, most))
        if self._take("{"):
            least = self._number()
            most = least
            if self._take(","):
                most = None if self._next() == "}" else self._number()
            self._expect("}")
            if most is not None and most < least:
                self._refuse(f"{{{least},{most}}} counts down")
            return self._single(Repetition(part, least, most))
        return part

    def _single(self, repeated) -> Expression:
        if self.at < len(self.pattern) and self._next() in "*+?{":
            self._refuse(f"{self._next()} behind another count")
        return repeated

    def _atom(self) -> Expression:
        letter = self._next()
        self.at += 1
        if letter == "(":
            if self._take("?"):
                self._refuse("(? is not supported")
            inner = self._choice()
            self._expect(")")
            return inner
        if letter == "[":
            return self._class()
        if letter == ".":
            return any_but("")
        if letter == "\\":
            return self._escape()
        if letter in _SPECIAL:
            self._refuse(f"{letter} where a character is expected")
        if letter in "^$":
            self._refuse(f"{letter} is not needed, since the whole answer has to match; write \\{letter} for the sign")
        return literal(letter)

    def _escape(self) -> Expression:
        letter = self._next()
        self.at += 1
        if letter in _CLASSES:
            return OneOf(_CLASSES[letter])
        if letter.isalnum():
            self._refuse(f"\\{letter} is not supported")
        return literal(letter)

    def _class(self) -> Expression:
        negated, found = self._take("^"), set()
        while not self._take("]"):
            first = self._member()
            if isinstance(first, frozenset):
                found |= first
            elif self._next() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self._member()
                if isinstance(last, frozenset) or last < first:
                    self._refuse("a range in [ ] that does not go up")
                found |= set(range(first, last + 1))
            else:
                found.add(first)
        if negated:
            return any_but(bytes(found).decode())
        if not found:
            self._refuse("[ ] without characters")
        return OneOf(frozenset(found))

    def _member(self) -> int | frozenset[int]:
        letter = self._next()
        self.at += 1
        if letter == "\\":
            letter = self._next()
            self.at += 1
            if letter in _CLASSES:
                return _CLASSES[letter]
            if letter.isalnum():
                self._refuse(f"\\{letter} is not supported")
        if not letter.isascii():
            self._refuse(f"{letter} in [ ], which takes ASCII alone; use ( | )")
        return ord(letter)

    def _number(self) -> int:
        begin = self.at
        while self.pattern[self.at : self.at + 1].isdecimal():
            self.at += 1
        digits = self.pattern[begin : self.at]
        if not digits.isascii() or not digits:
            self._refuse("{ without a number")
        if len(digits) > 4 or int(digits) > MOST_REPEATS:
            self._refuse(f"a count above {MOST_REPEATS}")
        return int(digits)

    def _next(self) -> str:
        if self.at >= len(self.pattern):
            self._refuse("it ends too early")
        return self.pattern[self.at]

    def _take(self, letter: str) -> bool:
        found = self.pattern[self.at : self.at + 1] == letter
        self.at += found
        return found

    def _expect(self, letter: str) -> None:
        if not self._take(letter):
            self._refuse(f"{letter} is missing")

    def _refuse(self, reason: str) -> NoReturn:
        raise PaliGemmaError(f"the pattern {quote(self.pattern)} cannot be read at character {self.at + 1}: {reason}")


# --- automata ----------------------------------------------------------------------------------------------


def compile_expression(expression: Expression) -> Automaton:
    """The automaton that reads an expression. Raises PaliGemmaError if it would have too many states."""
    nondeterministic = _Thompson()
    end = nondeterministic.state()
    begin = nondeterministic.add(expression, end)
    return Automaton(*_subsets(nondeterministic, begin, end))


class _Thompson:
    """States with at most one edge that takes a symbol, and any number that take none."""

    def __init__(self):
        self.edges: list[tuple[frozenset[int], int] | None] = []
        self.free: list[list[int]] = []

    def state(self, edge=None, free=()) -> int:
        if len(self.edges) >= MOST_EDGES:
            raise PaliGemmaError("the grammar is too large; count less in it, or give fewer choices")
        self.edges.append(edge)
        self.free.append([*free])
        return len(self.edges) - 1

    def add(self, expression: Expression, end: int) -> int:
        """The state from which an expression leads to `end`."""
        match expression:
            case OneOf(symbols):
                return self.state((symbols, end))
            case Concatenation(parts):
                for part in reversed(parts):
                    end = self.add(part, end)
                return end
            case Alternation(options):
                return self.state(free=[self.add(option, end) for option in options])
            case Repetition(part, least, most):
                begin = end
                if most is None:
                    begin = self.state(free=[end])
                    self.free[begin].append(self.add(part, begin))
                for _ in range((most or least) - least):
                    begin = self.state(free=[end, self.add(part, begin)])
                for _ in range(least):
                    begin = self.add(part, begin)
                return begin

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """All states that are reached without a symbol."""
        found, waiting = set(states), [*states]
        while waiting:
            new = set(self.free[waiting.pop()]) - found
            found |= new
            waiting += new
        return frozenset(found)


def _subsets(source: _Thompson, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The subset construction: table [states, SYMBOLS] and accepts [states]."""
    first = source.closure([begin])
    numbers, rows, waiting = {first: 0}, [], [first]
    for states in waiting:  # which grows
        targets = defaultdict(set)
        for state in states:
            if edge := source.edges[state]:
                for each in edge[0]:
                    targets[each].add(edge[1])
        row, closures = np.full(SYMBOLS, DEAD, np.int32), {}
        for each, reached in targets.items():
            key = frozenset(reached)
            if key not in closures:
                closures[key] = source.closure(key)
            following = closures[key]
            if following not in numbers:
                if len(numbers) >= MOST_STATES:
                    raise PaliGemmaError("the grammar has too many states; count less in it, or give fewer choices")
                numbers[following] = len(numbers)
                waiting.append(following)
            row[each] = numbers[following]
        rows.append(row)
    return np.stack(rows), np.array([end in states for states in waiting])
