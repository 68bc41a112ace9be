"""python -m numpy_ref.checkpoint.synthetic VARIANT DIR: a random checkpoint of a released model's size.

For measuring what a real one costs where none can be had. The weights are drawn a block at a time as they are
written, so this too runs in little memory; the same variant and seed give the same files.
"""

import json
import math
import sys
from dataclasses import dataclass, replace

import numpy as np

from .. import cli
from ..config import VARIANTS, PaliGemmaConfig
from ..errors import one_line
from ..files import new_directory
from .blocks import dtypes
from .hugging_face import to_hf
from .layouts import Parameter, parameters, saved_name
from .safetensors import write_safetensors

PROG = "python -m numpy_ref.checkpoint.synthetic"


@dataclass(frozen=True)
class RandomArray:
    """Normally distributed values that exist only while a slice of rows is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    seed: tuple[int, ...]
    scale: float

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        rng = np.random.Generator(np.random.SFC64([*self.seed, start]))
        values = rng.standard_normal((stop - start, *self.shape[1:]), np.float32)
        return (values * np.float32(self.scale)).astype(self.dtype)


def random_tensors(config: PaliGemmaConfig, dtype: np.dtype, seed: int = 0) -> dict[str, RandomArray]:
    """Hugging Face names to random tensors, scaled so that activations keep their size through the layers."""
    return {
        saved_name(p.hf.name): RandomArray(p.hf.shape, dtype, (seed, i), scale_of(p))
        for i, p in enumerate(parameters(config))
    }


def scale_of(parameter: Parameter) -> float:
    """The standard deviation with which a parameter is drawn."""
    if len(parameter.shape) == 1:
        return 0.1
    return 0.02 if parameter.path == "text.embedding" else parameter.shape[0] ** -0.5


def shallower(config: PaliGemmaConfig, layers: int | None) -> PaliGemmaConfig:
    """The same with only so many layers of each tower, if they are given."""
    if layers is None:
        return config
    text = replace(config.text, depth=layers, windows=config.text.windows[:layers])
    return replace(config, vision=replace(config.vision, depth=layers), text=text)


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Write a random checkpoint of a released model's size.")
    options.add_argument("variant", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    options.add_argument("output", metavar="DIR", help="the new directory to write")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each tower")
    options.add_argument("--seed", type=cli.whole(0), default=0)
    arguments = options.parse_args(argv)
    from tqdm import tqdm

    config = shallower(VARIANTS[arguments.variant], arguments.layers)
    dtype = {str(known): known for known in dtypes().values()}[arguments.dtype]
    tensors = random_tensors(config, dtype, arguments.seed)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(arguments.output) as folder:
        with tqdm(total=total, desc="random weights", unit="B", unit_scale=True, disable=None, delay=1) as bar:
            write_safetensors(folder, tensors, bar.update)
        (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n")
    print(one_line(f"wrote {arguments.output}, {total / 1e9:.2f} GB"))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
