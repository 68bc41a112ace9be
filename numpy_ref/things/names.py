"""Captions in three languages: `caption en`, `caption de` and `caption es` list a scene from left to right.

caption en    two dogs, a red star and a word on grass
caption de    zwei Hunde, ein roter Stern und ein Wort auf Gras
caption es    dos perros, una estrella roja y una palabra sobre hierba
"""

from collections.abc import Sequence

from . import Scene, Thing, grounds
from .catalogue import LANGUAGES, NOUNS, Noun

NUMBERS = {
    "en": ("two", "three", "four", "five"),
    "de": ("zwei", "drei", "vier", "fünf"),
    "es": ("dos", "tres", "cuatro", "cinco"),
}
AND = {"en": "and", "de": "und", "es": "y"}
ON = {"en": "on", "de": "auf", "es": "sobre"}
#: In German without its ending; in Spanish for m and f, of one and of many.
COLORS_DE = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett", "orange": "orangefarben",
    "white": "weiß", "black": "schwarz",
}  # fmt: skip
COLORS_ES = {
    "red": ("rojo", "roja", "rojos", "rojas"), "green": ("verde", "verde", "verdes", "verdes"),
    "blue": ("azul", "azul", "azules", "azules"), "yellow": ("amarillo", "amarilla", "amarillos", "amarillas"),
    "purple": ("morado", "morada", "morados", "moradas"), "orange": ("naranja", "naranja", "naranjas", "naranjas"),
    "white": ("blanco", "blanca", "blancos", "blancas"), "black": ("negro", "negra", "negros", "negras"),
}  # fmt: skip
STRESSED = ("hacha", "ancla")  # feminine nouns before which Spanish says "un"


def groups(things: Sequence[Thing]) -> list[tuple[Thing, int]]:
    """What is to be named, each once with its number, by the first of it from the left."""
    first: dict[str, Thing] = {}
    for thing in things:
        first.setdefault(thing.label, thing)
    return [(thing, sum(other.label == label for other in things)) for label, thing in first.items()]


def article(name: str) -> str:
    """a or an."""
    return "an" if name[0] in "aeio" or name.startswith("um") else "a"


def phrase(name: str, color: str, number: int, language: str) -> str:
    """So many things of a name: "a red star", "zwei Hunde"."""
    return _PHRASES[language](NOUNS[name][language], color, number)


def _english(noun: Noun, color, number):
    called = " ".join(part for part in (color, noun.one if number == 1 else noun.many) if part)
    return f"{article(called) if number == 1 else NUMBERS['en'][number - 2]} {called}"


def _german(noun: Noun, color, number):
    one = number == 1
    ending = {"m": "er", "f": "e", "n": "es"}[noun.gender] if one else "e"
    count = ("eine" if noun.gender == "f" else "ein") if one else NUMBERS["de"][number - 2]
    return " ".join(
        part for part in (count, color and COLORS_DE[color] + ending, noun.one if one else noun.many) if part
    )


def _spanish(noun: Noun, color, number):
    one, is_feminine = number == 1, noun.gender == "f"
    count = ("una" if is_feminine and noun.one not in STRESSED else "un") if one else NUMBERS["es"][number - 2]
    adjective = color and COLORS_ES[color][is_feminine + 2 * (not one)]
    return " ".join(part for part in (count, noun.one if one else noun.many, adjective) if part)


_PHRASES = {"en": _english, "de": _german, "es": _spanish}


def caption(scene: Scene, language: str = "en") -> str:
    """The one caption of a scene in a language."""
    named = [phrase(thing.name, thing.color, number, language) for thing, number in groups(scene.things)]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} {AND[language]} {named[-1]}"
    return f"{listed} {ON[language]} {grounds.NAMES[scene.ground][LANGUAGES.index(language)]}"
