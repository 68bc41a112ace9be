"""Patterns and automata, against Python's own `re`."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numpy_ref.automaton import DEAD, MOST_NESTED, compile_expression, literal, parse
from numpy_ref.errors import PaliGemmaError

PATTERNS = [
    "", "a", "abc", "a|b|", "(ab|a)(c|bcd)", "a*", "(a|b)*abb", "a+b?c", "x{3}", "x{2,4}", "x{0,2}y", "x{2,}",
    "(ab){1,2}c", "[a-c]+", "[^a-c]", r"\d+(\.\d+)?", r"[\d_-]+", r"\w+ \w+", r"a\sb", r"\.\*\\", ".b.", "[]]", "é|日本",
    "(日|b)+", "[a.*]", "((a)|(b|(c)))d", r"[\]\-x]", "a{12}", "()a()",
]  # fmt: skip
#: What Python has otherwise: an empty class there takes in "]", and a blank is the only space here.
OTHERWISE = {"[]]"}
LETTERS = "abcdxy_. 0159-*\\]é日"


def matches(automaton, text: str) -> bool:
    state = 0
    for byte in text.encode():
        state = int(automaton.table[state, byte])
        if state == DEAD:
            return False
    return bool(automaton.accepts[state])


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern not in OTHERWISE])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_text_matches_as_in_python(pattern, data):
    automaton, expected = compile_expression(parse(pattern)), re.compile(pattern, re.ASCII)
    texts = st.text(st.sampled_from(LETTERS), max_size=7) | st.from_regex(expected, fullmatch=True)
    text = data.draw(texts)
    if any(not letter.isprintable() or (letter.isspace() and letter != " ") for letter in text):
        return  # of Python's, which matches them with \\s and .
    assert matches(automaton, text) == (expected.fullmatch(text) is not None)


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern not in OTHERWISE])
def test_every_state_can_still_end(pattern):
    """So whoever keeps to the table comes to an accepted text."""
    automaton = compile_expression(parse(pattern))
    alive = automaton.accepts.copy()
    for _ in range(len(alive)):
        reached = np.where(automaton.table == DEAD, False, alive[automaton.table]).any(1)
        alive |= reached
    assert alive.all()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a(b", r"at character 4: \) is missing"),
        ("a)", r"at character 2: a \) without"),
        ("[abc", "at character 5: it ends too early"),
        ("[]", "without characters"),
        ("*a", r"\* where a character"),
        ("a**", r"\* behind another count"),
        ("a{2,1}", "counts down"),
        ("a{,2}", "without a number"),
        ("a{1001}", "a count above 1000"),
        ("(?:a)", r"\(\? is not supported"),
        ("^a$", r"\^ is not needed"),
        (r"\bword", r"\\b is not supported"),
        ("[é]", "takes ASCII alone"),
        ("[c-a]", "does not go up"),
        ("a\udcb1", "not valid Unicode"),
        ("(" * (MOST_NESTED + 1) + ")" * (MOST_NESTED + 1), "inside one another"),
        ("a{\N{ARABIC-INDIC DIGIT TWO}}", "without a number"),
    ],
)
def test_what_is_no_pattern_is_named(pattern, words):
    with pytest.raises(PaliGemmaError, match=words):
        parse(pattern)


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "(a|b)*a(a|b){15}", ".{900}"])
def test_what_is_too_large_is_refused(pattern):
    with pytest.raises(PaliGemmaError, match=r"too large|too many states"):
        compile_expression(parse(pattern))


@given(st.text(max_size=9))
def test_a_literal_is_itself_alone(text):
    automaton = compile_expression(literal(text))
    assert matches(automaton, text)
    assert not matches(automaton, text + "a")
    assert automaton.accepts.sum() == 1
