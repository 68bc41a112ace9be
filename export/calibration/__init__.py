"""Calibration: four-bit weights that answer a user's own rows best, instead of each being closest to what it was.

The decoder's kernels are rounded layer by layer, each by the inputs that come to it through the layers that are rounded
already (gptq.py). The embedding table, or the head, is rounded last, by the states from which tokens are drawn: those
count most behind which several are likely, since only there can a small error change what is drawn. In memory there are
one layer in float32, the Hessian of one of its inputs, and a batch of rows; all else lies in files of a folder.
"""

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref.answer import DEFAULT_NEW_TOKENS, Picture, Question, answer_all
from numpy_ref.checkpoint import Checkpoint, flatten, parameters, unflatten
from numpy_ref.checkpoint.adapter import in_memory
from numpy_ref.checkpoint.blocks import check_finite
from numpy_ref.engine import Features, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import paligemma
from numpy_ref.model.layers import merge_heads, rms_norm, softcap
from numpy_ref.tokenizer import Tokenizer

from ..bundle import weights
from ..bundle.description import Calibration
from ..bundle.forms import Blocks
from ..bundle.rounded import Rounded
from ..model import quantized
from . import rows, states
from .gptq import Rounder
from .rows import Example
from .states import Batch

DAMPING = 0.01
TIED_DAMPING = 1.0  # of a table that is read as input too, where all of a row counts
CERTAIN = 0.1  # how much a state counts behind which one token is certain; 1 + CERTAIN is the mean
VOCAB_STEP = 8192  # rows of the table whose logits are held at once
STAGES = 7  # passes over the batches in a layer


def check(precision: str) -> None:
    """Raise PaliGemmaError unless weights of a precision can be calibrated."""
    if not precision.startswith("int4"):
        four = ", ".join(each for each in weights.PRECISIONS if each.startswith("int4"))
        raise PaliGemmaError(f"--calibrate: it is for weights in four bits ({four}), not for {precision}; leave it out")


def calibrate(checkpoint: Checkpoint, examples: list[Example], precision: str, folder: Path) -> Rounded:
    """Round a checkpoint's weights of four bits by examples (`rows.read`); what is made lies in an empty folder.

    Raises PaliGemmaError that names a picture that cannot be read, or a weight that is not finite.
    """
    work = _Walk(checkpoint, precision, folder)
    work.read(examples)
    for layer in range(checkpoint.config.text.depth):
        work.round_layer(layer)
    work.round_head()
    work.bar.close()
    return work.rounded


class _Walk:
    """The batches, and how far they have come."""

    def __init__(self, checkpoint, precision, folder):
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

    def read(self, examples: list[Example]) -> None:
        """Look at the pictures, answer where a row has no answer, and embed all of it."""
        groups, digest = list(rows.in_batches(examples)), hashlib.sha256()
        total = len(groups) * (1 + STAGES * self.config.text.depth) + len(self.forms)
        self.bar = tqdm(total=total, desc="calibrating", leave=False, disable=None, delay=1, unit="step")
        towers = in_memory({name: self.checkpoint.params[name] for name in ("vision", "projector")})
        answer = _Answering(self.checkpoint)
        text = {"text": {"embedding": self.arrays["text.embedding"]}}
        for number, group in enumerate(groups):
            pixels = [each.pixel_values(self.config.vision.image_size, self.checkpoint.resize) for each in group]
            features = paligemma.encode_image(towers, self.config, np.concatenate(pixels))
            answers = answer(group, pixels, features)
            batch = Batch(self.config, self.folder, number, [each.prompt for each in group], answers, self.apart)
            batch.begin(text, features)
            self.batches.append(batch)
            for example, picture, answered in zip(group, pixels, answers, strict=True):
                digest.update(picture.tobytes() + np.array([*example.prompt, -1, *answered, -1]).tobytes())
            self.bar.update()
        self.rounded = Rounded(self.folder, Calibration(len(examples), digest.hexdigest()))

    def round_layer(self, layer: int) -> None:
        """Round a layer's kernels in the order in which they are used, and take the batches through it."""
        path, config = f"text.blocks.{layer}", self.config.text
        exact = {
            name.removeprefix(f"{path}."): self._exact(name) for name in self.arrays if name.startswith(f"{path}.")
        }
        if self.apart:
            for batch in self._each():
                batch.advance_prompts(unflatten(exact), layer)
        flat = dict(exact)

        def rounded(names, inputs):
            self._round(path, flat, names, inputs)

        rounded(
            ("attention.query", "attention.key", "attention.value"),
            lambda p, batch: rms_norm(batch.get("tokens"), **p["attention_norm"], eps=config.eps),
        )
        rounded(("attention.output",), lambda p, batch: _context(p, batch, layer))
        p = unflatten(flat)
        for batch in self._each():
            batch.put("tokens", states.after_attention(p, config, batch.get("tokens"), batch.around(layer)))
        rounded(
            ("mlp.gate", "mlp.up"), lambda p, batch: rms_norm(batch.get("tokens"), **p["mlp_norm"], eps=config.eps)
        )
        rounded(
            ("mlp.down",),
            lambda p, batch: states.hidden(
                p["mlp"], rms_norm(batch.get("tokens"), **p["mlp_norm"], eps=config.eps)
            ),
        )
        p = unflatten(flat)
        for batch in self._each():
            batch.put("tokens", states.after_mlp(p, config, batch.get("tokens")))

    def round_head(self) -> None:
        """Round the table, or the head where there is one apart."""
        config = self.config.text
        path = "text.embedding" if config.tied else "text.head.kernel"
        scale = self._exact("text.norm.scale")
        x = np.concatenate([rms_norm(batch.asked(), scale, config.eps) for batch in self.batches])
        if path in self.forms:
            table = self.arrays[path] if config.tied else self.arrays[path].T
            doubt = _doubt(x, table, config.final_softcap)
            x *= np.sqrt(doubt / max(doubt.mean(), np.finfo(np.float32).tiny) + CERTAIN)[:, None]
            self._store(path, Rounder(x.T @ x, TIED_DAMPING if config.tied else DAMPING), table)

    def _round(self, path, flat, names, inputs) -> None:
        """Round kernels of a layer that read the same inputs, `inputs(p, batch)` [B, A, in], and put them in place."""
        names = [name for name in names if f"{path}.{name}.kernel" in self.forms]
        p, hessian = unflatten(flat), None
        for batch in self._each():
            if names:
                x = inputs(p, batch)[batch.is_token]
                hessian = x.T @ x if hessian is None else np.add(hessian, x.T @ x, out=hessian)
        if names:
            rounder = Rounder(hessian, DAMPING)
            for name in names:
                kernel = f"{name}.kernel"
                values, scales = self._store(f"{path}.{kernel}", rounder, flat[kernel].T)
                flat[kernel] = quantized.dequantize_blocks(values, scales.astype(np.float32), 4).T

    def _store(self, path, rounder, rows):
        form = self.forms[path]
        values, scales = rounder.quantize(rows, form.bits, form.dtype.numpy())
        self.rounded.add(path, values, scales)
        self.bar.update()
        return values, scales

    def _exact(self, path) -> np.ndarray:
        array = np.asarray(self.arrays[path])
        check_finite(path, array)
        return array.astype(np.float32)

    def _each(self):
        for batch in self.batches:
            yield batch
            self.bar.update()


def _context(p, batch, layer):
    """What the last kernel of attention reads: [B, A, N*H]."""
    found = {}

    def tap(name, value):
        found[name] = value
        return value

    states.after_attention(p, batch.config.text, batch.get("tokens"), batch.around(layer), tap)
    return merge_heads(found["context"])


def _doubt(x, table, cap) -> np.ndarray:
    """1 - Σ p² of the distribution behind each state: x [n, D], table [V, D] -> [n].

    It is how much a small error in the logits changes the distribution: the trace of the divergence's Hessian.
    """
    once = twice = np.full(len(x), -np.inf, np.float32)  # log Σ exp(logit), and of twice the logits
    for start in range(0, len(table), VOCAB_STEP):
        logits = softcap(x @ np.asarray(table[start : start + VOCAB_STEP], np.float32).T, cap)
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
        answers = iter(answer_all(*self.asked, questions))
        return [next(answers).tokens if each.answer is None else each.answer for each in group]
