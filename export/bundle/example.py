"""example.json: a question about a small picture with the bundle's own answer, for a host to check itself by."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from numpy_ref import cli, memory
from numpy_ref.answer import answer
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.engine import Engine, pixels_of
from numpy_ref.errors import PaliGemmaError, explained
from numpy_ref.things import Scene, Thing
from numpy_ref.tokenizer import Tokenizer

from ..runtime import check_path, run_options, session_options
from . import weights
from .description import Description

FILE = "example.json"
SIZE = 96  # pixels a side of its picture
NEW_TOKENS = 32
#: Of things that the shipped model knows; any other model says of it what it says.
SCENE = Scene(
    (Thing("circle", 9, 21, 12, color="red"), Thing("star", 23, 11, 13, color="blue")),
    "plain", ((150, 160, 150), (150, 160, 150)), 0.0, 0,
)  # fmt: skip
CAPTION, SEGMENT = "caption en", "segment blue star"


def question(config: PaliGemmaConfig, tokenizer: Tokenizer | None, has_masks: bool) -> dict:
    """The file before it is answered; with a mask codec it asks for a mask, so that a host can check that too.

    Without a tokenizer it has no prompt, and its ids end at bos.
    """
    picture = SCENE.draw(SIZE)
    png = io.BytesIO()
    picture.save(png, "png")
    prompt = SEGMENT if has_masks else CAPTION
    image = [config.image_token] * config.vision.patches
    return {
        "image": {
            "width": SIZE,
            "height": SIZE,
            "rgb": base64.b64encode(np.asarray(picture).tobytes()).decode(),
            "png": base64.b64encode(png.getvalue()).decode(),
        },
        "prompt": prompt if tokenizer else None,
        "input_ids": tokenizer.prompt(prompt) if tokenizer else [*image, config.bos],
        "answer": None,
    }


def as_json(example: Mapping) -> bytes:
    """The file's contents."""
    return (json.dumps(example) + "\n").encode()


def answered(example: Mapping, folder: Path, description: Description, tokenizer: Tokenizer | None) -> dict:
    """The file with the greedy answer of the bundle whose files, all but its description, are in `folder`.

    It is what `run-onnx --json` prints and hosts in other languages too: without timings and the uncertainty of boxes.
    Raises PaliGemmaError that says why if this machine cannot run the bundle.
    """
    check_path(folder)
    if tokenizer is None:
        raise PaliGemmaError("there is no tokenizer")
    if description.precision.endswith("bfloat16"):
        raise PaliGemmaError(f"the CPU has no kernels for {description.precision}")
    size = description.files[weights.FILE].bytes
    memory.check(0 if description.precision == "float32" else 2 * size, "running the bundle")
    try:
        host = _Host(folder, description)
        room = host.max_length - len(example["input_ids"]) + 1
        most = max(1, min(NEW_TOKENS, room))
        found = answer(host, tokenizer, SCENE.draw(SIZE), example["prompt"], max_new_tokens=most)
        printed = cli.as_json(found, load_s=0)
    except Exception as error:  # the runtime's exceptions have no common class
        raise explained(error) from None
    del printed["timings"]
    for box in [*printed["boxes"], *printed["masks"]]:
        box.pop("uncertainty", None)
    return {**example, "answer": printed}


class _Host(Engine):
    """The graphs of a bundle on the CPU, one open at a time, since an export may have no room for more.

    Floats stay where they are mapped, in the file's order of the weights, which is slower and takes no memory.
    """

    name = "example"

    def __init__(self, folder: Path, description: Description):
        masks = self._paint if "masks" in description.graphs else None
        super().__init__(description.config, description.image.resize, masks, description.max_length)
        self.folder, self.description = folder, description
        self.opened: dict[str, onnxruntime.InferenceSession] = {}

    def prefill(self, pictures, input_ids, lengths, capacity):
        feeds = {"pixel_values": pixels_of(pictures), "input_ids": input_ids, "lengths": lengths}
        return self._step("prefill", {**feeds, "capacity": np.int64(capacity)})

    def decode(self, input_ids, lengths, cache):
        past = {name.replace("present", "past_key_values"): array for name, array in cache.items()}
        return self._step("decode", {"input_ids": input_ids, "lengths": lengths, **past})

    def reorder(self, cache, rows):
        return {name: array[rows] for name, array in cache.items()}

    def _step(self, graph, feeds):
        found = self._run(graph, feeds)
        return found.pop("logits"), found

    def _paint(self, codes):
        return self._run("masks", {"codes": codes})["masks"]

    def _run(self, graph, feeds):
        if graph not in self.opened:
            self.opened.clear()  # before the next is opened
            mapped = {"session.disable_prepacking": "1"} if self.description.precision in weights.FLOATS else {}
            file = str(self.folder / self.description.graphs[graph].file)
            options = session_options(mapped)
            self.opened[graph] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in self.opened[graph].get_outputs()]
        feeds = {name: np.asarray(array) for name, array in feeds.items()}
        return dict(zip(names, self.opened[graph].run(names, feeds, run_options()), strict=True))
