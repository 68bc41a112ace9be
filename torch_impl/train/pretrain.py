"""python -m torch_impl.train.pretrain --output DIR: teach a vision tower by pictures and captions, and measure it.

`--loss siglip` or `clip`, on the same budget; the measure is recall@1: of held-out pictures, the share whose own
caption is the nearest of all.
"""

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint.safetensors import write_safetensors
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import one_line
from numpy_ref.files import absent, claimed, new_directory
from numpy_ref.model.contrastive import ContrastiveConfig, TextConfig, recall_at_1
from numpy_ref.scenes import questions
from numpy_ref.tokenizer import Tokenizer

from ..model import contrastive
from ..model.contrastive import Contrastive
from . import data
from .loop import LOG, Examples, Settings, fit, state_folder

PROG = "python -m torch_impl.train.pretrain"
CAPTION_LENGTH = 32
SETTINGS = Settings(1200, 128, peak=2e-3, warmup=100, optimizer="muon")
SHADED = 0.6  # share of the scenes
PAIRS = 500
LOSSES = ("siglip", "clip")


def contrastive_config(config: PaliGemmaConfig) -> ContrastiveConfig:
    """The two towers of pretraining: the model's own for pictures, one half as deep for captions."""
    vision = config.vision
    text = TextConfig(config.text.vocab, CAPTION_LENGTH, vision.width, vision.depth // 2, vision.mlp, vision.heads)
    return ContrastiveConfig(vision, text)


def initialise(model: nn.Module) -> None:
    """Outputs of the residual branches start small, so that depth does not amplify."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("output.kernel", "down.kernel")):
                parameter.mul_(0.3)


def loss_of(name: str) -> Callable[[Contrastive, dict[str, Tensor]], Tensor]:
    """`loss(model, batch)` for training, by the name of one of LOSSES."""

    def loss(model, batch):
        image, text = model.embed_image(batch["pixel_values"]), model.embed_text(batch["ids"])
        with torch.autocast(image.device.type, enabled=False):  # the losses sum small differences
            image, text = image.float(), text.float()
            if name == "clip":
                return contrastive.clip_loss(image, text, model.log_temperature)
            return contrastive.siglip_loss(image, text, model.log_temperature, model.bias)

    return loss


def pretrain(
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    settings: Settings,
    folder: Path,
    loss: str = "siglip",
    examples: Examples | None = None,
    device: str = "cpu",
    about: dict | None = None,
) -> tuple[Contrastive, list]:
    """Teach the towers by pictures and captions of scenes, with the state in `folder`; them, and the curve.

    `examples` gives pairs as `data.Captions` does, which are taken if it is left out; `about` says what they are.
    """
    torch.manual_seed(settings.seed)
    model = Contrastive(contrastive_config(config))
    initialise(model)
    if loss == "clip":
        model.log_temperature.data.fill_(math.log(1 / 0.07))
    model.to(device)
    examples = examples or data.Captions(tokenizer, config.vision.image_size, CAPTION_LENGTH, settings.seed, SHADED)
    curve = fit(
        model, loss_of(loss), examples, data.collate_pairs, settings, folder, f"contrastive ({loss})",
        about={"loss": loss, "config": repr(model.config), **(about or {"shaded": SHADED})},
    )  # fmt: skip
    return model.eval(), curve


@torch.inference_mode()
def recall(model: Contrastive, tokenizer: Tokenizer, count: int = PAIRS, examples: Examples | None = None) -> float:
    """recall@1 over so many held-out pairs of distinct captions; by chance 1 / count."""
    size = model.config.vision.image_size
    examples = examples or data.Captions(tokenizer, size, CAPTION_LENGTH, questions.HELD_OUT_SEED)
    distinct: dict[bytes, tuple] = {}
    for i in itertools.count():  # a caption that fits two pictures could not be told apart
        if len(distinct) == count:
            break
        picture, ids = examples[i]
        distinct.setdefault(ids.tobytes(), (picture, ids))
    batch = data.collate_pairs(list(distinct.values()))
    device = model.bias.device
    images = model.embed_image(batch["pixel_values"].to(device))
    texts = model.embed_text(batch["ids"].to(device))
    return round(recall_at_1(images.cpu().numpy(), texts.cpu().numpy()), 4)


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Contrastive pretraining on drawn scenes.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--loss", choices=LOSSES, default="siglip")
    options.add_argument(
        "--like", type=Path, default=checkpoint.SHIPPED, metavar="CHECKPOINT",
        help="whose sizes and tokenizer to take (the model that ships); the weights start at random",
    )  # fmt: skip
    options.add_argument("--steps", type=cli.whole(1), default=SETTINGS.steps)
    options.add_argument("--batch-size", type=cli.whole(2), default=SETTINGS.batch_size)
    options.add_argument("--seed", type=cli.whole(0), default=0)
    arguments = options.parse_args(argv)
    absent(arguments.output, "folder")
    config = checkpoint.load_config(arguments.like)
    tokenizer = Tokenizer.load(arguments.like, config)
    settings = replace(SETTINGS, steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed)
    folder = state_folder(arguments.output)
    with claimed(folder):
        found, curve = _pretrained(arguments, config, tokenizer, settings, folder)
    print(f"{arguments.loss}: recall@1 {found:.1%} of {PAIRS} held-out pairs, loss {curve[-1][2]}")
    print(one_line(f"wrote {arguments.output}"))
    return 0


def _pretrained(arguments, config, tokenizer, settings, folder) -> tuple[float, list]:
    """Train and save; recall@1, and the curve."""
    model, curve = pretrain(config, tokenizer, settings, folder, arguments.loss)
    found = recall(model, tokenizer)
    with new_directory(arguments.output) as output:
        tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        write_safetensors(output, tensors)
        shutil.copyfile(folder / LOG, output / LOG)
        record = {"loss": arguments.loss, "steps": settings.steps, "recall_at_1": found, "pairs": PAIRS}
        (output / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # the result is there: what stays behind does no harm
    return found, curve


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
