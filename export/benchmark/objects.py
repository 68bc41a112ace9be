"""Answers with boxes, token by token and with guesses: what several tokens at once are worth.

A random model finds nothing, so its answers are given: the graphs run, and a token is drawn, as ever, but the next one
of a script is taken for it. The script has so many boxes, all with one label of two tokens; a guess is right where it
is what the script has next, as with a model that finds one kind of thing.
"""

import time
from typing import Any

import numpy as np

from numpy_ref import detection
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.engine import Engine, Pictures
from numpy_ref.generate import Timings, generate
from numpy_ref.grammar import Grammar
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer

OBJECTS = (1, 4, 10)
LABEL = "red circle"
PLAIN, LOOKUP, CONSTRAINED = WAYS = ("one by one", "--lookup", f"--constrain detect:{LABEL}")


class Scripted(Engine):
    """An engine whose one row answers what a script says, whatever it draws."""

    name = "scripted"

    def __init__(self, engine: Engine, script: list[int]):
        super().__init__(engine.config, engine.resize, engine.masks, engine.max_length)
        self.engine, self.script, self.extends_at_once = engine, np.array(script), engine.extends_at_once
        self.prompt = self.place = 0

    def prefill(self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[Any, Any]:
        self.prompt, self.place = int(lengths[0]), 0
        return self.engine.prefill(pictures, input_ids, lengths, capacity)

    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: Any) -> tuple[Any, Any]:
        self.place = int(lengths[0]) - self.prompt + 1
        return self.engine.decode(input_ids, lengths, cache)

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: Any) -> tuple[Any, Any]:
        self.place = int(lengths[0]) - self.prompt + 1
        return self.engine.extend(input_ids, lengths, cache)

    def reorder(self, cache: Any, rows: np.ndarray) -> Any:
        return self.engine.reorder(cache, rows)

    def draw(
        self, logits: Any, known: np.ndarray, sampling: Sampling, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw, and take the tokens of the script from the place of the first on instead."""
        drawn, logprob = self.engine.draw(logits, known, sampling, uniform)
        places = np.minimum(self.place + np.arange(len(drawn)), len(self.script) - 1)
        return self.script[places], logprob


def measure(engine: Engine, rounds: int) -> dict[str, list[dict]]:
    """For each number of OBJECTS and each of WAYS: tokens, passes behind the prompt, and medians of seconds.

    The ways take turns, since the machine's speed drifts.
    """
    tokenizer = Tokenizer.load(SHIPPED, engine.config)  # the synthetic checkpoint has none, and any will do
    prompt, known = tokenizer.prompt(f"detect {LABEL}"), tokenizer.known()
    size = engine.config.vision.image_size
    pixels, grammar = np.zeros((1, 3, size, size), np.float32), Grammar(f"detect:{LABEL}", tokenizer)
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {},
        LOOKUP: {"alike": tokenizer.pieces},
        CONSTRAINED: {"grammar": grammar, "alike": tokenizer.pieces},
    }
    found = {}
    for count in OBJECTS:
        box = [f"{detection.encode(0.01 * i, 0.02 * i, 0.5, 0.7)} {LABEL}" for i in range(count)]
        script = [*tokenizer.encode(" ; ".join(box)), engine.config.ends[0]]
        scripted, runs = Scripted(engine, script), {way: [] for way in WAYS}
        for i in range(rounds + 1):  # the first opens graphs and makes buffers
            for way in WAYS:
                timings = Timings()
                started = time.perf_counter()
                steps = generate(scripted, pixels, [prompt], known, len(script), timings=timings, **ways[way])
                ids = [int(step[0]) for step in steps]
                assert ids == script
                if i:
                    runs[way].append((time.perf_counter() - started, timings.decode_s, timings.passes))
        found[str(count)] = [
            {"way": way, "tokens": len(script), "passes": passes, "answer_s": whole, "behind_the_prompt_s": behind}
            for way in WAYS
            for whole, behind, passes in [np.median(runs[way], axis=0).round(4).tolist()]
        ]
    return found


def table(found: dict[str, list[dict]]) -> str:
    """The figures as text."""
    lines = [f"{'objects':<9}{'':<30}{'tokens':>7}{'passes':>8}{'answers/s':>11}{'ratio':>7}{'behind the prompt':>19}"]
    for count, ways in found.items():
        for each in ways:
            ratio = ways[0]["answer_s"] / each["answer_s"]
            behind = ways[0]["behind_the_prompt_s"] / each["behind_the_prompt_s"]
            lines.append(
                f"{count:<9}{each['way']:<30}{each['tokens']:>7}{each['passes']:>8.0f}{1 / each['answer_s']:>11.3f}"
                f"{ratio:>7.2f}{each['behind_the_prompt_s']:>9.3f} s{behind:>8.2f}"
            )
    return "\n".join(lines)
