"""python -m torch_impl.train.recipe --output DIR: the model that ships, from nothing, by one command.

Stages, as in the PaliGemma paper but small: a tokenizer and a mask codec for the scenes; contrastive pretraining of
the vision tower on pictures and captions; then tower and decoder together, by prefix-LM on the suffixes of all tasks.
Most scenes are in shades of the colors, so that a shape is known by its outline alone (`scenes.random_scene`). In the
second half some names are wrong, so that a pair that was never shown is not ruled out (`questions.misname`). In the end
a short stage of mostly captions.
Killed and started again it goes on where it was, at most a minute back. With `--keep` the state stays, so that a stage
can be looked at.
"""

import io
import json
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from numpy_ref import checkpoint, cli, scenes
from numpy_ref.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from numpy_ref.errors import PaliGemmaError
from numpy_ref.files import absent, claimed, json_bytes, read_json
from numpy_ref.model import segmentation
from numpy_ref.scenes import evaluate
from numpy_ref.tokenizer import SentencePiece, Tokenizer

from ..load import ModuleEngine, to_params
from ..model.paligemma import PaliGemma
from ..model.segmentation import save as save_codec
from ..model.segmentation import train_codec
from . import data, pretrain
from . import tokenizer as tokenizer_training
from .finetune import prefix_lm_loss
from .loop import COLUMNS, Settings, fit, state_folder

PROG = "python -m torch_impl.train.recipe"
TRAINING = Settings(9000, 48, peak=2e-3, warmup=200, optimizer="muon", decay=0.5)
FINISHING = Settings(1800, 48, peak=6e-4, warmup=50, optimizer="muon")
FINISHING_SHARES = (0.6, 0.1, 0.2, 0.1)  # captions are the hardest: every name in them has to be right
SHADED, FINISHING_SHADED = 0.6, 0.4  # share of the scenes
MISNAMED_FROM = 4800 / 9000  # of the steps: first to tell things apart, then to rely on that alone
EXAMPLE_SEED = 5  # of example.png


def small_config(vocab: int = tokenizer_training.VOCAB) -> PaliGemmaConfig:
    """The shipped model: PaliGemma 1 with every dimension small. `vocab` counts the tokenizer's ids."""
    return PaliGemmaConfig(
        vision=SiglipConfig(image_size=96, patch_size=12, width=128, depth=4, mlp=512, heads=4),
        text=GemmaConfig(
            vocab=-(-(vocab + 1) // 64) * 64, width=128, depth=4, mlp=512, heads=4, kv_heads=1, head_dim=32,
            query_scalar=32.0,
        ),
        image_token=vocab,
        max_length=256,
    )  # fmt: skip


def train_all(
    folder: Path, seed: int, pretraining: Settings, training: Settings, finishing: Settings
) -> tuple[PaliGemma, bytes, dict]:
    """All stages, with their state in `folder`: the model, its tokenizer, and the record of each stage."""
    pretraining, training, finishing = (replace(each, seed=seed) for each in (pretraining, training, finishing))
    folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer_model = small_config(), tokenizer_training.train_tokenizer(seed)
    tokenizer = Tokenizer(SentencePiece(tokenizer_model), config)
    record = {"mask codec": _codec(folder, seed)}
    codec = segmentation.load(folder / segmentation.FILES[0])

    towers, curve = pretrain.pretrain(config, tokenizer, pretraining, folder / "siglip")
    found = pretrain.recall(towers, tokenizer)
    record["contrastive"] = {"recall_at_1": found, "settings": asdict(pretraining), "curve": thin(curve)}
    torch.manual_seed(seed)
    model = PaliGemma(config)
    pretrain.initialise(model)
    model.vision.load_state_dict(towers.vision.state_dict())
    examples = data.Scenes(
        tokenizer, codec, config.vision.image_size, seed + 1,  # other scenes than pretraining's
        shaded=SHADED, misnamed=0.15, misnamed_from=round(MISNAMED_FROM * training.steps) * training.batch_size,
    )  # fmt: skip
    curve = fit(
        model, prefix_lm_loss, examples, partial(data.collate, pad=config.pad), training, folder / "prefix-lm",
        "all tasks", about={"config": repr(config), "shaded": SHADED, "misnamed from": MISNAMED_FROM},
    )  # fmt: skip
    record["all tasks"] = {"settings": asdict(training), "curve": thin(curve)}
    examples = data.Scenes(
        tokenizer, codec, config.vision.image_size, seed + 2, FINISHING_SHARES, FINISHING_SHADED, misnamed=0.25
    )
    curve = fit(
        model, prefix_lm_loss, examples, partial(data.collate, pad=config.pad), finishing, folder / "finish",
        "mostly captions", about={"config": repr(config), "shares": FINISHING_SHARES, "shaded": FINISHING_SHADED},
    )  # fmt: skip
    record["mostly captions"] = {"settings": asdict(finishing), "curve": thin(curve)}
    return model.eval(), tokenizer_model, record


def _codec(folder, seed) -> dict:
    """Train the mask codec into `folder` unless it is there (two minutes that a kill costs); how that went."""
    log, file = folder / "codec.json", folder / segmentation.FILES[0]
    if not log.exists():
        started = time.perf_counter()
        codec, curve = train_codec(seed)
        file.unlink(missing_ok=True)
        save_codec(file, codec)
        record = {"seed": seed, "seconds": round(time.perf_counter() - started), "curve": curve}
        temporary = log.with_suffix(".part")
        temporary.write_text(json.dumps(record))
        temporary.replace(log)
    record = read_json(log)
    if record["seed"] != seed:
        raise PaliGemmaError(f"{folder}: this run was begun with seed {record['seed']}; go on with that, or remove it")
    return record


def thin(curve: list, rows: int = 40) -> dict:
    """A curve as training.json keeps it: about so many rows, the last among them."""
    step = max(1, len(curve) // rows)
    return {"columns": COLUMNS, "rows": curve[::-1][::step][::-1]}


def example_scene() -> scenes.Scene:
    """What is on the picture that ships beside the model, and that README's first command asks about."""
    return scenes.random_scene(np.random.default_rng(EXAMPLE_SEED))


def example_picture() -> Image:
    """That picture."""
    return example_scene().draw(224)


def png(image: Image) -> bytes:
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Train the model that ships, from nothing.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--seed", type=cli.whole(0), default=0)
    options.add_argument("--scenes", type=cli.whole(1), default=500, help="held-out scenes a task for the record (500)")
    options.add_argument("--keep", action="store_true", help="leave the state of training where it is")
    arguments = options.parse_args(argv)
    absent(arguments.output, "folder")
    with claimed(state_folder(arguments.output)):
        return make(arguments)


def make(arguments: Namespace) -> int:
    """Train and save what ships, or go on with it."""
    folder = state_folder(arguments.output)
    model, tokenizer_model, stages = train_all(folder, arguments.seed, pretrain.SETTINGS, TRAINING, FINISHING)
    codec_file = folder / segmentation.FILES[0]
    masks = partial(segmentation.decode, segmentation.load(codec_file))
    tokenizer = Tokenizer(SentencePiece(tokenizer_model), model.config)
    held_out = evaluate.measure(ModuleEngine(model, masks=masks), tokenizer, 0, arguments.scenes)
    record = {"command": f"{PROG} --seed {arguments.seed}", "stages": stages,
              "held_out": {"seed": 0, "scenes": arguments.scenes, **held_out}}  # fmt: skip
    files = {
        "tokenizer.model": tokenizer_model,
        **tokenizer_training.foreign_files(tokenizer_model, model.config.vision),
        codec_file.name: codec_file.read_bytes(),
        "training.json": json_bytes(record),
        "example.png": png(example_picture()),
    }
    checkpoint.save(arguments.output, model.config, to_params(model), files)
    if not arguments.keep:
        shutil.rmtree(folder)
    print(json.dumps(held_out))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
