"""python -m tests.make_beams CHECKOUT: record what big_vision's beam search answers with a small random model.

CHECKOUT is a clone of google-research/big_vision. Its own model and search run, so jax, flax, einops, ml_collections and
orbax-checkpoint have to be installed; that the answers are right is seen without them. The model, the pictures and the
answers are committed together.
"""

import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np

from numpy_ref.checkpoint import save_npz
from numpy_ref.cli import Parser

from .models import CONFIGS, random_params

FOLDER = Path(__file__).parent / "golden" / "big_vision"
BEAMS = (1, 2, 3, 4, 6)
NEW_TOKENS = 7
PREFIXES = ([2, 5, 17], [2, 31, 7, 11, 40], [2, 9], [2, 23, 24, 25, 26, 27, 28], [2, 50, 3, 3], [2, 14])


def small_config():
    """As an npz can say it: pictures that patches fill, a tied head, no caps and no windows."""
    config = CONFIGS["paligemma1"]
    text = replace(config.text, vocab=52, rope_base=10000.0)
    return replace(config, vision=replace(config.vision, image_size=21), text=text, max_length=8192)


def params_of(config, seed=1):
    """Random weights with which answers are of all lengths, and often others with other numbers of beams."""
    params = random_params(config, seed, np.float32)
    params["text"]["embedding"] *= np.float32(3)
    for block in params["text"]["blocks"]:  # or the last token would decide the next
        block["attention"]["output"]["kernel"] *= np.float32(4)
        block["mlp"]["down"]["kernel"] *= np.float32(4)
    return params


def big_vision_model(config, checkout):
    """big_vision's model of a config, and its prediction functions."""
    sys.path.insert(0, str(checkout))
    # It needs TensorFlow, and nothing of it is used.
    sys.modules["big_vision.utils"] = types.ModuleType("big_vision.utils")
    gemma = importlib.import_module("big_vision.models.ppp.gemma")
    functions = importlib.import_module("big_vision.trainers.proj.paligemma.predict_fns")
    paligemma = importlib.import_module("big_vision.models.proj.paligemma.paligemma")
    t, v = config.text, config.vision
    sizes = {
        "variant": "small", "width": t.width, "depth": t.depth, "mlp_dim": t.mlp, "num_heads": t.heads,
        "num_kv_heads": t.kv_heads, "head_dim": t.head_dim, "norm_eps": t.eps, "vocab_size": t.vocab, "scan": True,
        "remat_policy": "nothing_saveable",
    }  # fmt: skip
    config_dict = importlib.import_module("ml_collections").ConfigDict
    gemma.get_config = lambda variant: config_dict(sizes)
    image = {
        "patch_size": (v.patch_size, v.patch_size), "width": v.width, "depth": v.depth, "mlp_dim": v.mlp,
        "num_heads": v.heads, "pool_type": "none", "scan": True, "head_zeroinit": False,
    }  # fmt: skip
    frozen = importlib.import_module("flax.core").FrozenDict  # a model has to be hashable
    return paligemma.Model(img=frozen(image), llm=frozen(cache_dtype="float32")), functions


def tree_of(file):
    """The arrays of a npz by the parts of their names."""
    tree = {}
    for name, array in np.load(file).items():
        *path, last = name.removeprefix("params/").split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    return tree


def record(checkout: Path) -> None:
    """Write the model and the answers."""
    import jax

    config = small_config()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "model.npz").unlink(missing_ok=True)
    save_npz(FOLDER / "model.npz", config, params_of(config))
    model, functions = big_vision_model(config, checkout)
    functions._beam_make_output = lambda state: (state[0][:, 0], state[1][:, 0])  # the log-probabilities too
    size = config.vision.image_size
    pixels = np.random.default_rng(1).uniform(-1, 1, (len(PREFIXES), 3, size, size)).astype(np.float32)
    longest = max(map(len, PREFIXES))
    text = np.array([[*prefix, *[0] * (longest - len(prefix))] for prefix in PREFIXES], np.int32)
    batch = {
        "image": pixels.transpose(0, 2, 3, 1), "text": text, "mask_ar": np.zeros_like(text),
        "mask_input": np.arange(longest) < np.array([[len(prefix)] for prefix in PREFIXES]),
        "_mask": np.ones(len(PREFIXES), bool),
    }  # fmt: skip
    found = {"pixel_values": pixels}
    for beams in BEAMS:
        tokens, logprobs = functions._beam_decode(
            {"params": tree_of(FOLDER / "model.npz")}, batch, model=model, devices=jax.devices(),
            max_decode_len=NEW_TOKENS, eos_token=config.eos, beam_size=beams,
        )  # fmt: skip
        found |= {f"tokens.{beams}": np.asarray(tokens), f"logprobs.{beams}": np.asarray(logprobs)}
        print(beams, np.asarray(tokens).tolist(), sep="\n")
    np.savez(FOLDER / "beams.npz", **found)


def main(argv=None):
    options = Parser(prog="python -m tests.make_beams", description="Record what big_vision's beam search answers.")
    options.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a clone of google-research/big_vision")
    record(options.parse_args(argv).checkout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
