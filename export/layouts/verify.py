"""Proof that a layout is the model, as `export/verify.py` has it for bundles: part by part, and end to end.

The three graphs are compared one after the other with the reference, in prefill, whose cache is empty, and in a decode
step behind it. To put the features among the embeddings is the client's work in transformers.js, and a graph's for
onnxruntime-genai.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.adapter import in_memory
from numpy_ref.model import paligemma

from .. import verify as verification
from ..verify import DIVERGENCES, STEPS, Comparison, Example, Part, Reference, Row, both_caches, compared_row, cut
from . import GENAI, Graph, Layout
from .session import LayoutSession, in_bytes


def verify(layout: Layout, folder: Path, checkpoint: Checkpoint) -> list[dict]:
    """Compare one precision of a layout with the checkpoint it was made from. Prints the table and returns its rows.

    Raises PaliGemmaError if a budget is exceeded or a tap is absent.
    """
    checkpoint = replace(checkpoint, params=in_memory(checkpoint.params))
    stored = verification.as_stored(checkpoint, layout.precision)
    inputs = pictures_in_bytes(verification.example(layout.config))
    compared, reference = compare_parts(stored, layout, folder, inputs)
    session = LayoutSession(layout, folder)
    compared += compare_stages(stored, session, inputs, reference)
    results = verification.judge(compared, layout.precision)
    if layout.precision in DIVERGENCES:
        results.append(verification.judge_drift(session, checkpoint, layout.precision))
    return results


def pictures_in_bytes(inputs: Example) -> Example:
    """The same with pictures that bytes can hold."""
    return replace(inputs, pixel_values=(in_bytes(inputs.pixel_values).astype(np.float64) / 255 - 0.5) / 0.5)


def compare_parts(checkpoint: Checkpoint, layout: Layout, folder: Path, inputs: Example) -> tuple[list[Row], Reference]:
    """One row a part of prefill and of a decode step; and what the reference made of prefill.

    The decode step is that of the longest row, behind whose prompt there is no padding: there what is appended to the
    cache lies where the reference writes it.
    """
    config, patches, size = checkpoint.config, checkpoint.config.vision.patches, inputs.input_ids.shape[1]
    mask = (np.arange(size) < inputs.lengths[:, None]).astype(np.int64)
    fed = {"lengths": inputs.lengths, "pixel_values": in_bytes(inputs.pixel_values), "input_ids": inputs.input_ids}
    fed |= {"text_ids": inputs.input_ids[:, patches:], "attention_mask": mask}
    empty = np.zeros((len(mask), config.text.kv_heads, 0, config.text.head_dim))
    layers = [f"past_key_values.{i}.{kind}" for i in range(config.text.depth) for kind in ("key", "value")]
    run = partial(verification.run_unoptimised, directory=(folder / layout.decoder.file).parent)
    prefill = Comparison("prefill", _prefill_parts(layout), layout.operators, run, fed | dict.fromkeys(layers, empty))
    longest = slice(int(inputs.lengths.argmax()), int(inputs.lengths.argmax()) + 1)
    ids, lengths = inputs.steps[0][longest], inputs.lengths[longest]
    fed = {"lengths": lengths, "input_ids": ids, "attention_mask": np.ones((1, size + 1), np.int64)}
    fed["none"] = np.zeros((1, 0, config.text.width))
    decode = Comparison("decode", _decode_parts(layout), layout.operators, run, fed)
    with tqdm(
        total=len(prefill.parts) + len(decode.parts), desc="verifying", leave=False, disable=None, delay=1
    ) as bar:
        prefill.progress = decode.progress = bar.update
        apart = "embed" if layout.name == GENAI else "embed_prefix"  # what no graph has as an output of its own

        def tap(name, value):
            if name != apart:
                return prefill(name, value)
            prefill.values[name] = value
            return value

        features = paligemma.encode_image(checkpoint.params, config, inputs.pixel_values.astype(np.float64), tap)
        first = paligemma.prefill(checkpoint.params, config, features, *inputs.prompts, tap)
        cache = [(key[longest, :, : size + 1], value[longest, :, : size + 1]) for key, value in first[1]]
        for name, array in zip(layers, (array for layer in cache for array in layer), strict=True):
            decode.values[name] = array[:, :, :size]
        _, cache = paligemma.decode(checkpoint.params, config, ids, lengths, cache, decode)
    return [*prefill.finish(first[1], inputs.lengths), *decode.finish(cache, lengths + 1)], Reference(features, [first])


def _prefill_parts(layout) -> list[Part]:
    embedding = {"image_features": "projector"} if layout.name == GENAI else {"input_ids": "text_ids"}
    return [
        *_parts(layout.vision), *_parts(layout.embedding, embedding),
        *_parts(layout.decoder, {"inputs_embeds": "embed_prefix"}),
    ]  # fmt: skip


def _decode_parts(layout) -> list[Part]:
    (embedding,) = _parts(layout.embedding, {"image_features": "none"})
    embedding.model.graph.outputs[0].name = "tap.embed"  # without features it is no prefix
    embedding = replace(embedding, name="embed", taps=["embed"])
    return [embedding, *_parts(layout.decoder, {"inputs_embeds": "embed"})]


def _parts(graph: Graph, instead: dict[str, str] | None = None) -> list[Part]:
    """A graph in parts, whose inputs are what `instead` says, or have their own names."""
    instead = instead or {}

    def named(part):
        return replace(part, inputs={name: instead.get(value, value) for name, value in part.inputs.items()})

    return [named(part) for part in cut(graph.model(taps=True))]


def compare_stages(checkpoint: Checkpoint, session: LayoutSession, inputs: Example, reference: Reference) -> list[Row]:
    """Logits and cache of the graphs, run as a client runs them. `reference` is what `compare_parts` gave."""

    def row(part, *values):
        return compared_row("end to end", part, session.layout.operators, *values)

    (expected, cache), *steps = verification.complete(checkpoint, inputs, reference).steps
    logits, grown = session.prefill(*inputs.prefill(np.float32))
    rows = [row("prefill logits", {"logits": expected}, {"logits": logits})]
    rows.append(row("prefill cache", *both_caches(cache, grown.numpy(), inputs.lengths)))
    for step, (expected, _) in enumerate(steps):
        logits, grown = session.decode(inputs.steps[step], inputs.lengths + step, grown)
        rows.append(row(f"decode {step + 1} logits", {"logits": expected}, {"logits": logits}))
    rows.append(row(f"decode {STEPS} cache", *both_caches(steps[-1][1], grown.numpy(), inputs.lengths + STEPS)))
    return rows
