"""python -m torch_impl.train.things --output DIR: a small model of everyday things, from nothing, by one command.

Stages: a tokenizer and a mask codec for scenes of things; contrastive pretraining of the vision tower on pictures and
captions; tower and decoder together on all tasks; in the end a short stage with more captions and words. Scenes begin
with one thing and grow, so that things have names before they stand in a crowd. In the second half some colors and
shapes are named wrong, so that a pair that was never shown is not ruled out.

The same command goes on where it was killed, at most a minute back, and works alike on a GPU (--device cuda). --plan
times a few steps of each stage here and says how long all of it takes.
"""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from numpy_ref import checkpoint, cli, things
from numpy_ref.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from numpy_ref.errors import PaliGemmaError, note
from numpy_ref.files import absent, claimed, json_bytes, read_json
from numpy_ref.model import segmentation
from numpy_ref.scenes import evaluate
from numpy_ref.things import demo, questions
from numpy_ref.things.evaluate import THINGS
from numpy_ref.things.stamps import LETTERS
from numpy_ref.tokenizer import SentencePiece, Tokenizer

from ..load import ModuleEngine, to_params
from ..model.paligemma import PaliGemma
from ..model.segmentation import random_masks, train_codec
from ..model.segmentation import save as save_codec
from . import data, distributed, pretrain, recipe
from . import tokenizer as tokenizer_training
from .data import Course
from .finetune import prefix_lm_loss
from .loop import (
    Examples,
    Objective,
    Settings,
    fit,
    learning_rate,
    loader,
    optimizers_for,
    state_folder,
    take_step,
)

PROG = "python -m torch_impl.train.things"
VOCAB = 2500
PRETRAINING = Settings(1200, 128, peak=2e-3, warmup=100, optimizer="muon")
TRAINING = Settings(9600, 48, peak=2e-3, warmup=200, optimizer="muon", decay=0.5)
FINISHING = Settings(1600, 48, peak=6e-4, warmup=50, optimizer="muon")
FINISHING_SHARES = (0.44, 0.16, 0.14, 0.1, 0.16)  # of `questions.TASKS`; in a caption every name has to be right
GROWING = 0.2  # share of a stage in which scenes grow
MISNAMED, MISNAMED_FROM = 0.15, 0.5  # of the names, from this share of the steps on
CODEC_STEPS, CODEC_MASKS = 2500, 12000
TIMED, UNTIMED = 12, 10  # steps of a stage that --plan times, after those that only fill the queue of examples


@dataclass(frozen=True)
class Plan:
    """The length of everything; `scaled` makes a trial of it."""

    pretraining: Settings = PRETRAINING
    training: Settings = TRAINING
    finishing: Settings = FINISHING
    codec_steps: int = CODEC_STEPS

    def scaled(self, share: float, seed: int) -> "Plan":
        """The same with a share of the steps."""

        def scale(stage):
            return replace(stage, steps=max(1, round(stage.steps * share)), seed=seed)

        codec_steps = max(20, round(self.codec_steps * min(1, 4 * share)))
        return Plan(scale(self.pretraining), scale(self.training), scale(self.finishing), codec_steps)


def small_config(vocab: int = VOCAB) -> PaliGemmaConfig:
    """The model: PaliGemma 1 with every dimension small. `vocab` counts the tokenizer's ids."""
    return PaliGemmaConfig(
        vision=SiglipConfig(image_size=112, patch_size=14, width=160, depth=5, mlp=640, heads=5),
        text=GemmaConfig(
            vocab=-(-(vocab + 1) // 64) * 64, width=160, depth=4, mlp=512, heads=5, kv_heads=1, head_dim=32,
            query_scalar=32.0,
        ),
        image_token=vocab,
        max_length=256,
    )  # fmt: skip


def text(seed: int) -> Iterable[str]:
    """What the tokenizer's pieces are found in: prompts and answers, and letters one by one, as words are read."""
    rng = np.random.default_rng(seed)
    for _ in range(4000):
        for task in ("caption", "answer", "detect", "segment", "absent"):
            question = questions.random_question(rng, lambda mask, box: "", task)
            yield question.prefix
            if task in ("caption", "answer"):
                yield question.suffix
    for _ in range(200):
        yield from (*LETTERS, "ocr", questions.NONE)
    for _ in range(30):
        yield tokenizer_training.WORDS


def courses(plan: Plan) -> dict[str, Course]:
    """What is shown in each stage."""
    examples = {stage: settings.steps * settings.batch_size for stage, settings in stages_of(plan).items()}
    return {
        "contrastive": Course(growing=round(GROWING * examples["contrastive"])),
        "all tasks": Course(
            growing=round(GROWING * examples["all tasks"]),
            misnamed=MISNAMED,
            misnamed_from=round(MISNAMED_FROM * examples["all tasks"]),
        ),
        "finishing": Course(FINISHING_SHARES, shaded=0.4, misnamed=MISNAMED),
    }


def stages_of(plan: Plan) -> dict[str, Settings]:
    """The stages that are trained by `loop.fit`, by name."""
    return {"contrastive": plan.pretraining, "all tasks": plan.training, "finishing": plan.finishing}


class Run:
    """What the stages share: the tokenizer, the model's configuration, where state is kept, and the device."""

    def __init__(self, folder: Path, seed: int, plan: Plan, device: str):
        self.folder, self.seed, self.plan, self.device = folder, seed, plan, device
        self.config = small_config()
        self.tokenizer_model = tokenizer_training.train_tokenizer(seed, VOCAB, text)
        self.tokenizer = Tokenizer(SentencePiece(self.tokenizer_model), self.config)
        self.courses, self.stages = courses(plan), stages_of(plan)

    def examples(self, stage: str, codec: dict) -> Examples:
        """What a stage learns from; each has scenes of its own."""
        number, size = list(self.stages).index(stage), self.config.vision.image_size
        if stage == "contrastive":
            return data.ThingCaptions(
                self.tokenizer, size, pretrain.CAPTION_LENGTH, self.seed + number, self.courses[stage]
            )
        return data.Things(self.tokenizer, codec, size, self.seed + number, self.courses[stage])

    def new_model(self) -> PaliGemma:
        """The model before it has learned anything."""
        torch.manual_seed(self.seed)
        model = PaliGemma(self.config)
        pretrain.initialise(model)
        return model


def train_all(run: Run) -> tuple[PaliGemma, dict]:
    """All stages, with their state in the run's folder: the model, and the record of each stage."""
    run.folder.mkdir(parents=True, exist_ok=True)
    record = {"mask codec": _codec(run)}
    codec = segmentation.load(run.folder / segmentation.FILES[0])
    settings = run.stages["contrastive"]
    towers, curve = pretrain.pretrain(
        run.config, run.tokenizer, settings, run.folder / "siglip", examples=run.examples("contrastive", codec),
        device=run.device, about={"course": asdict(run.courses["contrastive"])},
    )  # fmt: skip
    held_out = data.ThingCaptions(
        run.tokenizer,
        run.config.vision.image_size,
        pretrain.CAPTION_LENGTH,
        questions.HELD_OUT_SEED,
        Course(shaded=0.0),
    )
    found = pretrain.recall(towers, run.tokenizer, examples=held_out)
    record["contrastive"] = {"recall_at_1": found, "settings": asdict(settings), "curve": recipe.thin(curve)}
    model = run.new_model()
    model.vision.load_state_dict(towers.vision.state_dict())
    model.to(run.device)
    for stage, folder in (("all tasks", "prefix-lm"), ("finishing", "finish")):
        settings = run.stages[stage]
        curve = fit(
            model, prefix_lm_loss, run.examples(stage, codec), partial(data.collate, pad=run.config.pad), settings,
            run.folder / folder, stage, about={"config": repr(run.config), "course": asdict(run.courses[stage])},
        )  # fmt: skip
        course = asdict(run.courses[stage])
        record[stage] = {"settings": asdict(settings), "course": course, "curve": recipe.thin(curve)}
    return model.cpu().eval(), record


def _codec(run: Run) -> dict:
    """Train the mask codec into the run's folder unless it is there; how that went."""
    log, file = run.folder / "codec.json", run.folder / segmentation.FILES[0]
    if not log.exists():
        started = time.perf_counter()
        masks_of = partial(random_masks, random_scene=things.random_scene)
        codec, curve = train_codec(run.seed, run.plan.codec_steps, masks_of=masks_of, count=CODEC_MASKS)
        file.unlink(missing_ok=True)
        save_codec(file, codec)
        seconds = round(time.perf_counter() - started)
        record = {"seed": run.seed, "steps": run.plan.codec_steps, "seconds": seconds, "curve": curve}
        temporary = log.with_suffix(".part")
        temporary.write_text(json.dumps(record))
        temporary.replace(log)
    record = read_json(log)
    if (record["seed"], record["steps"]) != (run.seed, run.plan.codec_steps):
        other = f"seed {record['seed']} and {record['steps']} steps of the mask codec"
        raise PaliGemmaError(f"{run.folder}: this run was begun with {other}; go on with that, or remove it")
    return record


# --- how long it takes -------------------------------------------------------------------------------------


def seconds(run: Run) -> dict[str, float]:
    """How long each stage takes on this machine, from a few steps of each and of the mask codec; writes nothing."""
    started = time.perf_counter()
    steps, masks = 60, 300
    codec, _ = train_codec(
        run.seed, steps, masks_of=partial(random_masks, random_scene=things.random_scene), count=masks
    )
    found = {"mask codec": (time.perf_counter() - started) * run.plan.codec_steps / steps}
    for stage, settings in run.stages.items():
        model: nn.Module = run.new_model()
        loss: Callable = prefix_lm_loss
        collate: Callable = partial(data.collate, pad=run.config.pad)
        if stage == "contrastive":
            model = pretrain.Contrastive(pretrain.contrastive_config(run.config))
            loss, collate = pretrain.loss_of("siglip"), data.collate_pairs
        model.to(run.device)
        settings = replace(settings, steps=UNTIMED + TIMED)
        batches = iter(loader(_Grown(run.examples(stage, codec)), collate, settings))
        objective, optimizers = Objective(model, loss), optimizers_for(model, settings)
        for step in range(settings.steps):
            if step == UNTIMED:
                started = time.perf_counter()
            take_step(objective, batches, optimizers, settings, learning_rate(step, settings))
        found[stage] = (time.perf_counter() - started) / TIMED * run.stages[stage].steps
    return found


class _Grown:
    """The examples of a stage from where its scenes have all their things."""

    def __init__(self, examples):
        self.examples = examples

    def __getitem__(self, index):
        return self.examples[10_000_000 + index]


# --- the command -------------------------------------------------------------------------------------------


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Train a small model of everyday things, from nothing.")
    options.add_argument("--output", type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--seed", type=cli.whole(0), default=0)
    options.add_argument("--device", default="cpu", help="cpu, or cuda (cpu)")
    options.add_argument("--scenes", type=cli.whole(1), default=500, help="held-out scenes a task for the record (500)")
    options.add_argument("--scale", type=cli.real(0, 1), default=1.0, help="share of all steps, for a trial (1)")
    options.add_argument("--plan", action="store_true", help="say how long it takes on this machine, and write nothing")
    options.add_argument("--keep", action="store_true", help="leave the state of training where it is")
    arguments = options.parse_args(argv)
    if arguments.device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products are not repeatable
    device = str(distributed.device(arguments.device))
    plan = Plan().scaled(arguments.scale, arguments.seed)
    if arguments.plan:
        found = seconds(Run(Path(), arguments.seed, plan, device))
        for stage, each in (found | {"together": sum(found.values())}).items():
            print(f"{stage:<12}{each:>7.0f} s")
        return 0
    if arguments.output is None:
        options.error("--output DIR is required (or --plan)")
    absent(arguments.output, "folder")
    with claimed(state_folder(arguments.output)):
        return make(arguments, Run(state_folder(arguments.output), arguments.seed, plan, device))


def make(arguments: Namespace, run: Run) -> int:
    """Train, measure and save, or go on with it."""
    model, stages = train_all(run)
    codec_file = run.folder / segmentation.FILES[0]
    engine = ModuleEngine(model, masks=partial(segmentation.decode, segmentation.load(codec_file)))
    held_out = evaluate.measure(engine, run.tokenizer, 0, arguments.scenes, suite=THINGS)
    record = {"command": f"{PROG} --seed {run.seed}", "stages": stages,
              "held_out": {"seed": 0, "scenes": arguments.scenes, **held_out}}  # fmt: skip
    examples = demo.choose(engine, run.tokenizer)
    if len(examples) < demo.COUNT:
        note(
            f"of {demo.COUNT} example pictures there are {len(examples)}: it answers too little right; train it longer"
        )
    files = {
        "tokenizer.model": run.tokenizer_model,
        **tokenizer_training.foreign_files(run.tokenizer_model, run.config.vision),
        codec_file.name: codec_file.read_bytes(),
        "training.json": json_bytes(record),
        **demo.files(examples),
    }
    checkpoint.save(arguments.output, run.config, to_params(model), files)
    if not arguments.keep:
        shutil.rmtree(run.folder)
    print(json.dumps(held_out))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
