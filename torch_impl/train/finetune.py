"""Fine-tuning from the command line's arguments: what is loaded, trained and saved, and what `--plan` says of it."""

import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from numpy_ref import checkpoint, knows
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.safetensors import map_safetensors
from numpy_ref.engine import MaskDecoder
from numpy_ref.errors import PaliGemmaError, note
from numpy_ref.files import json_bytes
from numpy_ref.model import segmentation
from numpy_ref.tokenizer import Tokenizer

from ..load import load, to_params, to_tensor
from ..model.paligemma import PaliGemma
from . import data, distributed, lora, memory, validate
from .loop import COLUMNS, LOG, Settings, Validation, fit, state_folder

LEAST_STEPS, TURNS = 300, 3  # without --steps: three times through the data, and not fewer steps than that
SCENE_STEPS = 1000  # where the data have no end
RATES = {"adapter": 2e-4, "all": 2e-5}  # without --learning-rate


def prefix_lm_loss(model: PaliGemma, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the batch of each row's mean cross-entropy over its suffix tokens; logits of no other are made."""
    x, _ = model.hidden_states(batch["pixel_values"], batch["input_ids"], batch["lengths"], batch["prefix_lengths"])
    weights = batch["weights"][:, 1:]
    predicted = weights > 0  # the token at t + 1 is predicted at t
    logits = model.text.logits(x[:, :-1][predicted])
    losses = torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][predicted], reduction="none")
    return (losses * weights[predicted]).sum() / len(weights)


@dataclass
class Run:
    """All that a fine-tune is made of."""

    model: PaliGemma
    loaded: Checkpoint
    examples: data.JsonLines | data.Scenes | data.Things
    held_out: data.JsonLines | None  # validated on
    tests: data.JsonLines | None
    settings: Settings
    masks: MaskDecoder | None

    @property
    def collate(self) -> Callable:
        """Examples -> a batch."""
        return partial(data.collate, pad=self.loaded.config.pad)

    def measure(self, lines: data.JsonLines) -> dict[str, float]:
        """The loss and the metrics of the model as it is (`validate.measure`)."""
        with torch.no_grad():
            return validate.measure(self.model.eval(), lines, prefix_lm_loss, self.settings.batch_size, self.masks)


def prepare(arguments: Namespace) -> Run:
    """Load the model, freeze what stays, and read the data."""
    model, loaded = load(arguments.init)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    if arguments.vision:
        take_vision(model, arguments.vision)
    examples, held_out, tests = read_data(arguments, tokenizer, loaded)
    settings = settings_of(arguments, examples)
    torch.manual_seed(arguments.seed)
    if arguments.lora_rank:
        kernels = lora.target_kernels(loaded.config, arguments.lora_targets)
        memory.store_base(model, arguments.base_dtype)
        lora.adapt(model, kernels, arguments.lora_rank, alpha_of(arguments))
    if arguments.checkpointing:
        memory.recompute_blocks(model)
    model.to(distributed.device(arguments.device))
    return Run(model, loaded, examples, held_out, tests, settings, segmentation.decoder_of(loaded))


def read_data(arguments: Namespace, tokenizer: Tokenizer, loaded: Checkpoint) -> tuple:
    """What is trained on, validated on and tested on; the latter two are None if not asked for."""
    read = partial(data.JsonLines, tokenizer=tokenizer, resize=loaded.resize, seed=arguments.seed)
    wanted, held_out = arguments.validation, None
    examples: data.JsonLines | data.Scenes | data.Things
    if arguments.data:
        lines = read(arguments.data, augment=arguments.augment)
        examples, held_out = lines.split(wanted) if isinstance(wanted, float) else (lines, None)
    elif isinstance(wanted, float):
        raise PaliGemmaError("--validation takes a share of --data; give that, or a file to validate on")
    elif (file := segmentation.find(loaded.folder)) is None:
        raise PaliGemmaError(f"{loaded.folder}: no vae.npz to spell masks with; give --data FILE.jsonl instead")
    else:
        size = loaded.config.vision.image_size
        known = knows.load(loaded.folder)
        scenes = data.Things if known and known.scenes == "things" else data.Scenes
        examples = scenes(tokenizer, segmentation.load(file), size, arguments.seed)
    if isinstance(wanted, Path):
        held_out = read(wanted)
    return examples, held_out, read(arguments.test) if arguments.test else None


def settings_of(arguments: Namespace, examples: data.JsonLines | data.Scenes | data.Things) -> Settings:
    """The command line's settings, with what follows from the number of examples where it leaves something out."""
    steps = arguments.steps
    if steps is None:
        steps = SCENE_STEPS
        if isinstance(examples, data.JsonLines):
            seen = arguments.batch_size * arguments.accumulate
            steps = max(LEAST_STEPS, math.ceil(TURNS * len(examples.rows) / seen))
    rate = arguments.learning_rate
    if rate is None:
        rate = RATES["adapter" if arguments.lora_rank else "all"]
    return Settings(
        steps, arguments.batch_size, rate, arguments.seed, arguments.accumulate, arguments.warmup,
        weight_decay=arguments.weight_decay, optimizer=arguments.optimizer, bfloat16=not arguments.float32,
        freeze=tuple(arguments.freeze),
    )  # fmt: skip


def alpha_of(arguments: Namespace) -> float:
    """LoRA's alpha, twice the rank if it is left out."""
    return 2.0 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha


def train(arguments: Namespace, run: Run) -> list:
    """Train, and save the result in the first process; the curve."""
    folder, settings = state_folder(arguments.output), run.settings
    validation = None
    if run.held_out:
        every = max(1, settings.steps // 10)
        validation = validate.validation(run.held_out, prefix_lm_loss, settings.batch_size, run.masks, every)
    sources = [arguments.init, arguments.vision, arguments.data, *files_of(arguments)]
    about: dict[str, object] = {
        "from": [fingerprint(path) for path in sources],
        "validation": str(arguments.validation),
    }
    if arguments.lora_rank:
        about["adapter"] = [arguments.lora_rank, alpha_of(arguments), arguments.lora_targets, arguments.base_dtype]
    curve = fit(
        run.model, prefix_lm_loss, run.examples, run.collate, settings, folder, save_every=60 * arguments.save_every,
        about=about, validation=validation,
    )  # fmt: skip
    if distributed.is_first():
        save(arguments, run, curve, validation, run.measure(run.tests) if run.tests else None)
        shutil.rmtree(folder, ignore_errors=True)  # the result is there: what stays behind does no harm
    distributed.wait()
    return curve


def files_of(arguments: Namespace) -> list[Path]:
    """The files that are measured on the way."""
    return [arguments.validation] if isinstance(arguments.validation, Path) else []


def save(arguments: Namespace, run: Run, curve: list, validation: Validation | None, tested: dict | None) -> None:
    """Write a checkpoint, or an adapter, with the record of its training beside it."""
    written = record(arguments, run, curve, validation, tested)
    files = {
        "training.json": json_bytes(written),
        LOG: (state_folder(arguments.output) / LOG).read_bytes(),
    }
    for name, row in [("best validation", validation and validation.best()), ("test", tested)]:
        if row:
            note(f"{name}: {validate.in_words(row)}")
    if arguments.lora_rank:
        lora.save(arguments.output, run.model.cpu(), alpha_of(arguments), arguments.base, files)
        return
    dtype = torch.float32 if arguments.save_dtype == "float32" else torch.bfloat16
    files = checkpoint.companions(run.loaded) | files
    checkpoint.save(arguments.output, run.loaded.config, to_params(run.model.cpu(), dtype), files)


def record(arguments: Namespace, run: Run, curve: list, validation: Validation | None, tested: dict | None) -> dict:
    """What was done, for training.json."""
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    fields |= {"steps": run.settings.steps, "learning_rate": run.settings.peak}
    return {
        "command": "python -m torch_impl.train",
        "arguments": fields,
        "curve": {"columns": COLUMNS, "rows": curve},
        "validation": validation.rows if validation else [],
        "test": tested,
    }


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
