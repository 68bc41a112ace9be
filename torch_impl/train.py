"""python -m torch_impl.train --output DIR: train a small model on drawn scenes, from nothing or from a checkpoint.

The loss is big_vision's (`trainers/proj/paligemma/train.py`): cross-entropy of the suffix tokens and the eos,
averaged over the tokens of an example, then over the batch. The prefix and the picture are attended to in both
directions and are not predicted.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from numpy_ref import checkpoint, cli
from numpy_ref.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import preprocess
from numpy_ref.storage import read_json
from numpy_ref.tokenizer import SentencePiece, Tokenizer

from . import evaluate, scenes, tokenizer_training
from .load import ModuleEngine, load, to_params
from .paligemma import PaliGemma

PROG = "python -m torch_impl.train"
DRAWN_AT = 96  # pixels a side of a training picture before it is resized to the model's


def small_config(vocab: int) -> PaliGemmaConfig:
    """The shipped model: PaliGemma 1 with every dimension small. `vocab` counts the tokenizer's ids."""
    return PaliGemmaConfig(
        vision=SiglipConfig(image_size=64, patch_size=8, width=128, depth=4, mlp=512, heads=4),
        text=GemmaConfig(
            vocab=-(-(vocab + 1) // 64) * 64, width=128, depth=4, mlp=512, heads=4, kv_heads=1, head_dim=32,
            query_scalar=32.0,
        ),
        image_token=vocab,
        max_length=256,
    )  # fmt: skip


class Examples(IterableDataset):
    """An endless stream of (pixels uint8 [S, S, 3], prompt ids, suffix ids) of random scenes."""

    def __init__(self, tokenizer_model: bytes, config: PaliGemmaConfig, seed: int, shares=scenes.SHARES):
        self.tokenizer_model, self.config, self.seed, self.shares = tokenizer_model, config, seed, shares

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        tokenizer, size = Tokenizer(SentencePiece(self.tokenizer_model), self.config), self.config.vision.image_size
        while True:
            scene = scenes.random_scene(rng)
            prefix, suffix = scenes.random_question(rng, scene, shares=self.shares)
            pixels = preprocess(scenes.draw(scene, DRAWN_AT), size)[0]
            yield pixels, tokenizer.prompt(prefix), [*tokenizer.encode(suffix), self.config.eos]


def collate(examples, pad: int) -> dict[str, torch.Tensor]:
    """Right-padded rows. `weights` is 1 / (loss tokens of the row) where a token is predicted, else 0."""
    size = max(len(prompt) + len(suffix) for _, prompt, suffix in examples)
    ids = np.full((len(examples), size), pad, np.int64)
    weights = np.zeros((len(examples), size), np.float32)
    for row, weight, (_, prompt, suffix) in zip(ids, weights, examples, strict=True):
        row[: len(prompt) + len(suffix)] = [*prompt, *suffix]
        weight[len(prompt) : len(prompt) + len(suffix)] = 1 / len(suffix)
    return {
        "pixel_values": torch.from_numpy(np.stack([pixels for pixels, _, _ in examples])),
        "input_ids": torch.from_numpy(ids),
        "lengths": torch.tensor([len(prompt) + len(suffix) for _, prompt, suffix in examples]),
        "prefix_lengths": torch.tensor([len(prompt) for _, prompt, _ in examples]),
        "weights": torch.from_numpy(weights),
    }


def prefix_lm_loss(model: PaliGemma, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the batch of each row's mean cross-entropy over its suffix tokens; logits of no other are made."""
    x, _ = model.hidden_states(batch["pixel_values"], batch["input_ids"], batch["lengths"], batch["prefix_lengths"])
    weights = batch["weights"][:, 1:]
    predicted = weights > 0  # the token at t + 1 is predicted at t
    logits = model.text.logits(x[:, :-1][predicted])
    losses = torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][predicted], reduction="none")
    return (losses * weights[predicted]).sum() / len(weights)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: PaliGemma, peak: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms, biases and the embedding tables do not."""
    decayed = [p for name, p in model.named_parameters() if name.endswith("kernel")]
    kept = [p for name, p in model.named_parameters() if not name.endswith("kernel")]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))


def initialise(model: PaliGemma) -> None:
    """Outputs of the residual branches start small, so that depth does not amplify."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("output.kernel", "down.kernel")):
                parameter.mul_(0.3)


def start(seed: int) -> tuple[PaliGemma, bytes]:
    """A fresh small model, and a tokenizer trained for it."""
    torch.manual_seed(seed)
    model = PaliGemma(small_config(tokenizer_training.VOCAB))
    initialise(model)
    return model, tokenizer_training.train_tokenizer(seed)


def start_from(path: Path) -> tuple[PaliGemma, bytes]:
    """The model and tokenizer of a checkpoint, to train on."""
    model, loaded = load(path)
    return model.train(), (loaded.folder / "tokenizer.model").read_bytes()


def train(model, tokenizer_model, steps, seed, batch_size, peak, bfloat16, log, shares=scenes.SHARES) -> list:
    """Train a model on random scenes; the curve as (step, seconds, loss) triples."""
    config = model.config
    optimizer = optimizer_for(model, peak)
    loader = DataLoader(
        Examples(tokenizer_model, config, seed, shares), batch_size, num_workers=1, prefetch_factor=8,
        collate_fn=lambda examples: collate(examples, config.pad),
    )  # fmt: skip
    curve, recent, started = [], [], time.perf_counter()
    with tqdm(total=steps, desc="training", disable=None) as bar:
        for step, batch in zip(range(steps), loader, strict=False):
            rate = learning_rate(step, steps, peak, warmup=min(300, steps // 10 + 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = prefix_lm_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.3f}", rate=f"{rate:.1e}")
            if (step + 1) % 100 == 0:
                curve.append((step + 1, round(time.perf_counter() - started, 1), round(float(np.mean(recent)), 4)))
                recent = []
                log(curve[-1])
    model.eval()
    return curve


def save(output, model, tokenizer_model, record: dict) -> None:
    """Write the Hugging Face directory, the tokenizer, and how it was trained."""
    files = {
        "tokenizer.model": tokenizer_model,
        **tokenizer_training.foreign_files(tokenizer_model, model.config.vision),
        "training.json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    checkpoint.save(output, model.config, to_params(model), files)


def main(argv=None):
    options = argparse.ArgumentParser(prog=PROG, description="Train the small model on drawn scenes.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--init", type=Path, metavar="CHECKPOINT", help="train on from here; left out: from nothing")
    options.add_argument("--steps", type=int, default=6000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--learning-rate", type=float, default=1.5e-3)
    options.add_argument(
        "--tasks", type=float, nargs=len(scenes.TASKS), default=scenes.SHARES, metavar="SHARE",
        help=f"shares of the tasks {', '.join(scenes.TASKS)}, which sum to one",
    )  # fmt: skip
    options.add_argument("--float32", action="store_true", help="no bfloat16 autocast, which is 1.5 times faster")
    options.add_argument("--scenes", type=int, default=200, help="held-out scenes a task for the final evaluation")
    arguments = options.parse_args(argv)
    if abs(sum(arguments.tasks) - 1) > 1e-6 or min(arguments.tasks) < 0:
        raise PaliGemmaError(f"--tasks: shares sum to one, not {sum(arguments.tasks)}")
    if arguments.output.exists():
        raise PaliGemmaError(f"{arguments.output}: output folder exists already; remove it or name another")

    def log(point):
        if not sys.stderr.isatty():
            print(f"step {point[0]}  {point[1]:.0f} s  loss {point[2]:.4f}", flush=True)

    model, tokenizer_model = start_from(arguments.init) if arguments.init else start(arguments.seed)
    curve = train(
        model, tokenizer_model, arguments.steps, arguments.seed, arguments.batch_size, arguments.learning_rate,
        not arguments.float32, log, arguments.tasks,
    )  # fmt: skip
    engine, tokenizer = ModuleEngine(model), Tokenizer(SentencePiece(tokenizer_model), model.config)
    accuracy = evaluate.measure(engine, tokenizer, 0, arguments.scenes)
    print(json.dumps(accuracy))
    stage = {
        "command": f"{PROG} --steps {arguments.steps} --seed {arguments.seed} --batch-size {arguments.batch_size} "
        f"--learning-rate {arguments.learning_rate} --tasks {' '.join(map(str, arguments.tasks))}"
        + (" --init PREVIOUS" if arguments.init else ""),
        "curve": {"columns": ["step", "seconds", "loss"], "points": curve[4::5]},
    }
    record = {
        "stages": [*_earlier_stages(arguments.init), stage],
        "held_out": {"seed": 0, "scenes": arguments.scenes, **accuracy},
    }
    save(arguments.output, model, tokenizer_model, record)


def _earlier_stages(path) -> list:
    """How the checkpoint that training went on from was trained, as far as it says."""
    file = path / "training.json" if path else None
    return read_json(file).get("stages", []) if file and file.exists() else []


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
