"""The walk of rows through the decoder, on which its weights are rounded one after another."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref.answer import DEFAULT_NEW_TOKENS, Picture, Question, answer_all
from numpy_ref.checkpoint import Checkpoint, flatten, parameters, unflatten
from numpy_ref.checkpoint.adapter import in_memory
from numpy_ref.checkpoint.blocks import check_finite
from numpy_ref.engine import Features, NumpyEngine
from numpy_ref.model import paligemma
from numpy_ref.model.layers import rms_norm, softcap
from numpy_ref.tokenizer import Tokenizer

from ..bundle import weights
from ..bundle.description import Calibration
from ..bundle.forms import Blocks
from ..bundle.rounded import Rounded
from ..model import quantized
from . import rows, states
from .gptq import Rounder
from .rows import Example
from .states import EXACT, ROUNDED, Batch

DAMPING, SEEN = 0.01, 5  # of Hessians at least; and of how many times as many inputs as tokens it is 1
TIED_DAMPING = 0.3  # of a table that is read as input too, where all of a row counts
CERTAIN = 0.1  # how much a state counts behind which one token is certain; 1 + CERTAIN is the mean
LOGITS = 2**22  # held at once


class Walk:
    """The batches of rows, and how far they have come."""

    def __init__(self, checkpoint: Checkpoint, precision: str, folder: Path):
        self.checkpoint, self.config, self.folder = checkpoint, checkpoint.config, folder
        self.arrays = flatten(checkpoint.params)
        self.apart = weights.stream_dtype(precision) == weights.FLOATS["float32"]
        self.forms = {
            parameter.path: form
            for parameter in parameters(self.config)
            for form in weights.forms(parameter, precision)
            if isinstance(form, Blocks)
        }
        self.batches: list[Batch] = []
        self.bar = tqdm(desc="calibrating", leave=False, disable=None, delay=1, unit="step")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def read(self, examples: list[Example]) -> None:
        """Look at the pictures, answer where a row has no answer, and embed all of it."""
        groups, digest = list(rows.in_batches(examples)), hashlib.sha256()
        self.bar.total = len(groups) * (1 + (7 + self.apart) * self.config.text.depth) + len(self.forms)
        towers = in_memory({name: self.checkpoint.params[name] for name in ("vision", "projector")})
        answer = _Answering(self.checkpoint)
        for number, group in enumerate(groups):
            pixels = [each.pixel_values(self.config.vision.image_size, self.checkpoint.resize) for each in group]
            features = paligemma.encode_image(towers, self.config, np.concatenate(pixels))
            answers = answer(group, pixels, features)
            batch = Batch(self.config, self.folder, number, [each.prompt for each in group], answers, self.apart)
            batch.put("features", features)
            batch.begin(EXACT, self._exact_rows)
            self.batches.append(batch)
            for example, picture, answered in zip(group, pixels, answers, strict=True):
                digest.update(picture.tobytes() + np.array([*example.prompt, -1, *answered, -1]).tobytes())
            self.bar.update()
        self.rounded = Rounded(self.folder, Calibration(len(examples), digest.hexdigest()))

    def pass_layer(self, layer: int) -> None:
        """Take the rows through a layer of the exact model."""
        p = unflatten(self._layer(layer))
        for batch in self.each():
            if self.apart:
                batch.advance_prompts(p, layer)
            x = states.after_attention(p, self.config.text, batch.get(EXACT), batch.around(layer))
            batch.put(EXACT, states.after_mlp(p, self.config.text, x))

    def round_head(self) -> None:
        """Round the table, or the head where there is one apart, and begin again, with both models."""
        config = self.config.text
        path = "text.embedding" if config.tied else "text.head.kernel"
        scale = self._exact("text.norm.scale")
        x = np.concatenate([rms_norm(batch.asked(), scale, config.eps) for batch in self.batches])
        if path in self.forms:
            table = self.arrays[path] if config.tied else self.arrays[path].T
            doubt = _doubt(x, table, config.final_softcap)
            x *= np.sqrt(doubt / max(doubt.mean(), np.finfo(np.float32).tiny) + CERTAIN)[:, None]
            share = TIED_DAMPING if config.tied else damping(x.shape[1], len(x))
            self.store(path, Rounder(x.T @ x, share), table)
        for batch in self.batches:
            batch.begin(EXACT, self._exact_rows)
            batch.begin(ROUNDED, self._rounded_rows)

    def round_layer(self, layer: int) -> None:
        """Round a layer's kernels in the order in which they are used, and take the rows through it."""
        exact = self._layer(layer)
        if self.apart:
            p = unflatten(exact)
            for batch in self.each():
                batch.advance_prompts(p, layer)
        work = _Layer(self, layer, exact)
        work.round(("attention.query", "attention.key", "attention.value"), states.attention_input)
        work.round(("attention.output",), states.context, is_update=True)
        work.advance(states.after_attention)
        work.round(("mlp.gate", "mlp.up"), states.mlp_input)
        work.round(("mlp.down",), states.hidden, is_update=True)
        work.advance(states.after_mlp)

    def store(self, path: str, rounder: Rounder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Round the rows of a weight, and keep what came out."""
        form = self.forms[path]
        values, scales = rounder.quantize(rows, form.bits, form.dtype.numpy())
        self.rounded.add(path, values, scales)
        self.bar.update()
        return values, scales

    def each(self) -> Iterator[Batch]:
        """The batches, with progress."""
        for batch in self.batches:
            yield batch
            self.bar.update()

    def _layer(self, layer) -> dict[str, np.ndarray]:
        """The weights of a layer in float32, flat."""
        prefix = f"text.blocks.{layer}."
        return {path.removeprefix(prefix): self._exact(path) for path in self.arrays if path.startswith(prefix)}

    def _exact(self, path) -> np.ndarray:
        array = np.asarray(self.arrays[path])
        check_finite(path, array)
        return array.astype(np.float32)

    def _exact_rows(self, ids) -> np.ndarray:
        """Rows of the embedding table: ids [n] -> [n, D]."""
        table = self.arrays["text.embedding"]
        return np.concatenate([np.asarray(table[i : i + 1], np.float32) for i in ids.tolist()])

    def _rounded_rows(self, ids) -> np.ndarray:
        """The same of the table as the bundle has it."""
        path = "text.embedding"
        if path not in self.forms:
            return self._exact_rows(ids)
        bits = self.forms[path].bits
        if path in self.rounded:
            values, scales = (part[ids] for part in self.rounded[path])
        else:
            values, scales = quantized.quantize_blocks(self._exact_rows(ids), bits)
        return quantized.dequantize_blocks(values, scales, bits)


class _Layer:
    """A layer of the exact model, and the same with the kernels that are rounded already."""

    def __init__(self, walk: Walk, number: int, exact: dict[str, np.ndarray]):
        self.walk, self.number, self.config = walk, number, walk.config.text
        self.exact, self.rounded = exact, dict(exact)

    def round(self, names: tuple[str, ...], inputs: Callable, is_update: bool = False) -> None:
        """Round kernels that read the same `inputs(p, config, x, around)`.

        What an update is added to differs in the two models by now. It makes up for that too, unless a norm follows.
        """
        kernels = [f"{name}.kernel" for name in names if f"{self._path(name)}.kernel" in self.walk.forms]
        if not kernels:
            return
        hessian, missing, count = np.zeros(()), dict.fromkeys(kernels, np.zeros(())), 0
        for batch in self.walk.each():
            around, keep = batch.around(self.number), batch.is_token
            pair = [batch.get(state) for state in (EXACT, ROUNDED)]
            x, y = (
                inputs(unflatten(flat), self.config, state, around)[keep]
                for flat, state in zip((self.exact, self.rounded), pair, strict=True)
            )
            hessian, count = hessian + y.T @ y, count + len(y)
            behind = (pair[0] - pair[1])[keep] if is_update and not self.config.post_norms else 0
            for kernel in kernels:
                missing[kernel] = missing[kernel] + y.T @ ((x - y) @ self.exact[kernel] + behind)
        rounder = Rounder(hessian, damping(len(hessian), count))
        for kernel in kernels:
            aim = self.exact[kernel] + rounder.solve(missing.pop(kernel))
            values, scales = self.walk.store(self._path(kernel), rounder, aim.T)
            bits = self.walk.forms[self._path(kernel)].bits
            self.rounded[kernel] = quantized.dequantize_blocks(values, scales.astype(np.float32), bits).T

    def advance(self, half: Callable) -> None:
        """Take both states through a half of the layer."""
        for batch in self.walk.each():
            around = batch.around(self.number)
            for state, flat in ((EXACT, self.exact), (ROUNDED, self.rounded)):
                batch.put(state, half(unflatten(flat), self.config, batch.get(state), around))

    def _path(self, name):
        return f"text.blocks.{self.number}.{name}"


def damping(inputs: int, tokens: int) -> float:
    """Of the Hessian of so many inputs over so many tokens, as a share of the mean of its diagonal.

    The fewer tokens there are for each input, the more of what was seen is chance, and of what was not may yet come.
    """
    return max(DAMPING, inputs / tokens / SEEN)


def _doubt(x, table, cap) -> np.ndarray:
    """1 - Σ p² of the distribution behind each state: x [n, D], table [V, D] -> [n].

    It is how much a small error in the logits changes the distribution: the trace of the divergence's Hessian.
    """
    once = twice = np.full(len(x), -np.inf, np.float32)  # log Σ exp(logit), and of twice the logits
    step = max(1, LOGITS // len(x))
    for start in range(0, len(table), step):
        logits = softcap(x @ np.asarray(table[start : start + step], np.float32).T, cap)
        once = np.logaddexp(once, np.logaddexp.reduce(logits, axis=1))
        twice = np.logaddexp(twice, np.logaddexp.reduce(2 * logits, axis=1))
    return 1 - np.exp(twice - 2 * once)


class _Answering:
    """The greedy answers of the reference, for rows that have none."""

    def __init__(self, checkpoint):
        self.checkpoint, self.asked = checkpoint, None

    def __call__(self, group, pixels, features) -> list[list[int]]:
        """The answers of a batch's rows: their own, or the reference's. `features` [B*N, P, D] are of all pictures."""
        config, places = self.checkpoint.config, np.cumsum([0, *map(len, pixels)])
        questions = []
        for example, pictures, place in zip(group, pixels, places, strict=False):
            if example.answer is None:
                room = min(DEFAULT_NEW_TOKENS, config.max_length - len(example.prompt) + 1)
                seen = [
                    Picture(each[None], 1, 1, True, Features(each, features[place + i]))
                    for i, each in enumerate(pictures)
                ]
                questions.append(Question(example.prompt, room, seen))
        if not questions:
            return [example.answer for example in group]
        if self.asked is None:
            self.asked = NumpyEngine(self.checkpoint), Tokenizer.load(self.checkpoint.folder, config)
        engine, tokenizer = self.asked
        answers = iter(answer_all(engine, tokenizer, questions))
        return [next(answers).tokens if each.answer is None else each.answer for each in group]
