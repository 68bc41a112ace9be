"""python -m torch_impl.train --output DIR: teach a checkpoint from pictures with a prefix and a suffix.

The loss is big_vision's (`trainers/proj/paligemma/train.py`): cross-entropy of the suffix tokens and the eos,
averaged over the tokens of an example, then over the batch. The prefix and the picture are attended to in both
directions and are not predicted.

`--data FILE.jsonl` fine-tunes on your own; without it, the drawn scenes are the data. How the model that ships was
made from nothing is in recipe.py.
"""

import json
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint import hub
from numpy_ref.checkpoint.safetensors import map_safetensors
from numpy_ref.errors import PaliGemmaError, note, one_line, plural
from numpy_ref.files import absent, claimed
from numpy_ref.model import segmentation
from numpy_ref.tokenizer import Tokenizer

from ..load import load, to_params, to_tensor
from ..model.paligemma import PaliGemma
from . import data
from .loop import COLUMNS, LOG, STATE, Settings, fit, state_folder

PROG = "python -m torch_impl.train"
PARTS = ("vision", "projector", "text")


def prefix_lm_loss(model: PaliGemma, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the batch of each row's mean cross-entropy over its suffix tokens; logits of no other are made."""
    x, _ = model.hidden_states(batch["pixel_values"], batch["input_ids"], batch["lengths"], batch["prefix_lengths"])
    weights = batch["weights"][:, 1:]
    predicted = weights > 0  # the token at t + 1 is predicted at t
    logits = model.text.logits(x[:, :-1][predicted])
    losses = torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][predicted], reduction="none")
    return (losses * weights[predicted]).sum() / len(weights)


def fine_tune(arguments: Namespace) -> list:
    """Train a checkpoint on from the command line's arguments, and save it; the curve."""
    model, loaded = load(arguments.init)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    if arguments.vision:
        take_vision(model, arguments.vision)
    examples: data.JsonLines | data.Scenes
    if arguments.data:
        examples = data.JsonLines(arguments.data, tokenizer, loaded.resize, arguments.seed)
    else:
        if (file := segmentation.find(loaded.folder)) is None:
            raise PaliGemmaError(f"{loaded.folder}: no vae.npz to spell masks with; give --data FILE.jsonl instead")
        examples = data.Scenes(tokenizer, segmentation.load(file), loaded.config.vision.image_size, arguments.seed)
    settings = Settings(
        arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed, arguments.accumulate,
        arguments.warmup, weight_decay=arguments.weight_decay, optimizer=arguments.optimizer,
        bfloat16=not arguments.float32, freeze=tuple(arguments.freeze),
    )  # fmt: skip
    folder = state_folder(arguments.output)
    sources = [arguments.init, arguments.vision, arguments.data]
    curve = fit(
        model.to(arguments.device), prefix_lm_loss, examples, partial(data.collate, pad=loaded.config.pad), settings,
        folder, save_every=60 * arguments.save_every, about={"from": [fingerprint(path) for path in sources]},
    )  # fmt: skip
    dtype = torch.float32 if arguments.save_dtype == "float32" else torch.bfloat16
    files = checkpoint.companions(loaded) | {
        "training.json": (json.dumps(record(arguments, curve), indent=1) + "\n").encode(),
        LOG: (folder / LOG).read_bytes(),
    }
    checkpoint.save(arguments.output, loaded.config, to_params(model.cpu(), dtype), files)
    shutil.rmtree(folder, ignore_errors=True)  # the result is there: what stays behind does no harm
    return curve


def take_vision(model: PaliGemma, folder: Path) -> None:
    """Put the vision tower that `torch_impl.train.pretrain` wrote into a model."""
    stored = map_safetensors(folder)
    tower = {name.removeprefix("vision."): array for name, array in stored.items() if name.startswith("vision.")}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.vision.state_dict().items()}
    if wanted != {name: array.shape for name, array in tower.items()}:
        raise PaliGemmaError(f"{folder}: its vision tower is not of this model's sizes")
    model.vision.load_state_dict({name: to_tensor(array) for name, array in tower.items()})


def fingerprint(path: Path | None) -> str:
    """What tells whether a file, or the files of a folder, are still those that a run was begun with."""
    if path is None:
        return ""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return " ".join([str(path), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)])


def record(arguments: Namespace, curve: list) -> dict:
    """What was done, for training.json."""
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return {"command": PROG, "arguments": fields, "curve": {"columns": COLUMNS, "rows": curve}}


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Fine-tune a checkpoint.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument(
        "--init", type=Path, default=checkpoint.SHIPPED, metavar="CHECKPOINT", help="what to train (the shipped model)"
    )
    options.add_argument(
        "--vision", type=Path, metavar="DIR", help="a vision tower from torch_impl.train.pretrain, to begin with"
    )
    options.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="lines of image (a path, or a list), prefix and suffix"
    )
    options.add_argument("--steps", type=cli.whole(1), default=1000, help="of the optimizer (1000)")
    options.add_argument("--batch-size", type=cli.whole(1), default=16, help="examples at once (16)")
    options.add_argument("--accumulate", type=cli.whole(1), default=1, metavar="N", help="batches before each step (1)")
    options.add_argument("--learning-rate", type=cli.real(0, 1), default=2e-5, help="at its peak (2e-5)")
    options.add_argument("--warmup", type=cli.whole(0), default=100, help="steps (100)")
    options.add_argument("--weight-decay", type=cli.real(0, 10), default=0.0, help="of kernels (0)")
    options.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options.add_argument("--freeze", nargs="+", default=[], choices=PARTS, help="parts that stay as they are")
    options.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    options.add_argument("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the result")
    options.add_argument(
        "--save-every", type=cli.real(0, 1e6), default=1.0, metavar="MINUTES", help="what a kill may cost (1)"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    options.add_argument("--seed", type=cli.whole(0), default=0, help="of the order, or of the scenes (0)")
    arguments = options.parse_args(argv)
    absent(arguments.output, "folder")
    arguments.init = hub.directory(arguments.init)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise PaliGemmaError("--device cuda: this build of torch finds no CUDA device")
    if (state_folder(arguments.output) / STATE).exists():
        note(f"going on from {state_folder(arguments.output)}")
    with claimed(state_folder(arguments.output)):
        curve = fine_tune(arguments)
    print(one_line(f"wrote {arguments.output}, loss {curve[-1][2]} after {plural(curve[-1][0], 'step')}"))
    return 0
