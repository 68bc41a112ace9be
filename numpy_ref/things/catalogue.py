"""What there is to be seen: pictured things, painted shapes and words, with their names in three languages.

`data/things.tsv` has a line a pictured thing: its name and plural, its kind, the one color that it clearly has in the
sheet (or none), the icon it was made from, and its German and Spanish names, each after its gender.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
#: In which pictured things are painted too; white and black ones could not be told from some as they are.
TINTS = ("red", "green", "blue", "yellow", "purple", "orange")
LANGUAGES = ("en", "de", "es")


@dataclass(frozen=True)
class Noun:
    """A name in one language; the gender is m, f or n, or "" in English."""

    one: str
    many: str
    gender: str = ""


@dataclass(frozen=True)
class Entry:
    """A pictured thing: how it is called, its kind, its own color if it has one, and its icon."""

    name: str
    kind: str
    color: str
    icon: str
    nouns: dict[str, Noun]


def _read() -> tuple[Entry, ...]:
    with (DATA / "things.tsv").open(encoding="utf-8", newline="") as stream:
        return tuple(_entry(row) for row in csv.DictReader(stream, delimiter="\t"))


def _entry(row) -> Entry:
    nouns = {"en": Noun(row["name"], row["plural"])}
    for language in LANGUAGES[1:]:
        gender, _, one = row[language].partition(" ")
        nouns[language] = Noun(one, row[f"{language} plural"], gender)
    return Entry(row["name"], row["kind"], row["color"], row["icon"], nouns)


ENTRIES = _read()
PICTURED = {entry.name: entry for entry in ENTRIES}
WORD = "word"
_SHAPES = {
    "circle": ("circles", "m Kreis", "Kreise", "m círculo", "círculos"),
    "square": ("squares", "n Quadrat", "Quadrate", "m cuadrado", "cuadrados"),
    "triangle": ("triangles", "n Dreieck", "Dreiecke", "m triángulo", "triángulos"),
    "diamond": ("diamonds", "f Raute", "Rauten", "m rombo", "rombos"),
    "star": ("stars", "m Stern", "Sterne", "f estrella", "estrellas"),
    "cross": ("crosses", "n Kreuz", "Kreuze", "f cruz", "cruces"),
    "ring": ("rings", "m Ring", "Ringe", "m anillo", "anillos"),
    "heart": ("hearts", "n Herz", "Herzen", "m corazón", "corazones"),
    "moon": ("moons", "m Mond", "Monde", "f luna", "lunas"),
    "drop": ("drops", "m Tropfen", "Tropfen", "f gota", "gotas"),
    "bolt": ("bolts", "m Blitz", "Blitze", "m rayo", "rayos"),
    "cloud": ("clouds", "f Wolke", "Wolken", "f nube", "nubes"),
}
SHAPES = tuple(_SHAPES)


def _noun(text: str, many: str) -> Noun:
    gender, _, one = text.partition(" ")
    return Noun(one, many, gender)


#: Every name there is, with its nouns by language.
NOUNS: dict[str, dict[str, Noun]] = {
    **{name: entry.nouns for name, entry in PICTURED.items()},
    **{
        name: {"en": Noun(name, many), "de": _noun(de, de_many), "es": _noun(es, es_many)}
        for name, (many, de, de_many, es, es_many) in _SHAPES.items()
    },
    WORD: {"en": Noun(WORD, "words"), "de": Noun("Wort", "Wörter", "n"), "es": Noun("palabra", "palabras", "f")},
}


def _words(name: str) -> tuple[str, ...]:
    return tuple((DATA / name).read_text(encoding="utf-8").split())


WORDS = _words("words.txt")  # that training shows, beside made-up ones
NEW_WORDS = _words("new_words.txt")  # that it never shows
