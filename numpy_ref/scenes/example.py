"""python -m numpy_ref.scenes.example --output DIR: pictures of a thing that the shipped model does not know.

An arrow among the shapes of the other scenes, once to train on and once to test on, each as COCO has it: a JSON file
with boxes and outlines, and a folder of pictures. It is what torch_impl/README.md fine-tunes on.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import scenes
from ..cli import Parser, run, whole
from ..errors import one_line
from ..files import new_directory
from . import NOVEL, Scene, Thing

PROG = "python -m numpy_ref.scenes.example"
PARTS = ("train", "test")
SIZE = 224  # pixels a side
MOST = 3  # things in a scene


def novel_scene(rng: np.random.Generator, shape: str) -> Scene:
    """A random scene in which one thing has the new shape."""
    scene = scenes.random_scene(rng, most=MOST, shaded=0.5)
    things = list(scene.things)
    chosen = int(rng.integers(len(things)))
    things[chosen] = replace(things[chosen], shape=shape)
    return replace(scene, things=tuple(things))


def annotation(thing: Thing, number: int, image: int) -> dict:
    """A thing as COCO annotates it: [x, y, width, height] and the corners of its outline, in pixels."""
    unit = SIZE / scenes.GRID
    corners = (NOVEL[thing.shape] * thing.side + [thing.x, thing.y]) * unit
    return {
        "id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "area": (thing.side * unit) ** 2,
        "bbox": [thing.x * unit, thing.y * unit, thing.side * unit, thing.side * unit],
        "segmentation": [corners.ravel().tolist()],
    }  # fmt: skip


def write(folder: Path, part: str, count: int, seed: int, shape: str) -> None:
    """Write so many pictures of a part into a folder, and their annotations beside it."""
    rng, images, annotations = np.random.default_rng([seed, PARTS.index(part)]), [], []
    (folder / part).mkdir()
    for i in range(count):
        scene, name = novel_scene(rng, shape), f"{i:03d}.png"
        scene.draw(SIZE).save(folder / part / name)
        images.append({"id": i, "file_name": name, "width": SIZE, "height": SIZE})
        for thing in scene.things:
            if thing.shape == shape:
                annotations.append(annotation(thing, len(annotations), i))
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": shape}]}
    (folder / f"{part}.json").write_text(json.dumps(found) + "\n")


def main(argv=None):
    options = Parser(prog=PROG, description="Draw pictures of a new thing, annotated as COCO's are.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--pictures", type=whole(1), default=20, help="to train on, and as many to test on (20)")
    options.add_argument("--seed", type=whole(0), default=0, help="of the scenes (0)")
    arguments = options.parse_args(argv)
    (shape,) = NOVEL
    with new_directory(arguments.output) as folder:
        for part in PARTS:
            write(folder, part, arguments.pictures, arguments.seed, shape)
    print(one_line(f"wrote {arguments.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(run(PROG, main))
