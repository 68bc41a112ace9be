"""The mask codec: twin of `numpy_ref/model/segmentation.py`, and how it is trained.

Training follows VQ-VAE (van den Oord et al. 2017): the decoder sees the nearest code words, whose gradient passes
straight through to the encoder; code words move to the mean of the vectors that chose them, and one that nobody
chooses is put where a vector is.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from numpy_ref import scenes
from numpy_ref.checkpoint import flatten, unflatten
from numpy_ref.checkpoint.npz import write_npz
from numpy_ref.files import new_file
from numpy_ref.model import segmentation
from numpy_ref.model.layers import Params
from numpy_ref.model.segmentation import CELLS, CODES

from .layers import conv, conv_transpose, relu


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec, here of the one that ships; the official one has 128 channels."""

    channels: int = 32
    code_width: int = 16


class Conv(nn.Module):
    """`conv` with its weights."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, size, size) * math.sqrt(2 / (inputs * size * size)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return conv(x, self.kernel, self.bias, self.stride, self.padding)


class ConvTranspose(nn.Module):
    """`conv_transpose` with its weights."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, padding: int):
        super().__init__()
        fan_in = inputs * size * size / stride**2  # the inputs that reach one output
        self.kernel = nn.Parameter(torch.randn(inputs, outputs, size, size) * math.sqrt(2 / fan_in))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return conv_transpose(x, self.kernel, self.bias, self.stride, self.padding)


class ResBlock(nn.Module):
    """x + conv1(relu(conv3(relu(conv3(x))))): x [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_0, self.conv_1 = Conv(channels, channels, 3, padding=1), Conv(channels, channels, 3, padding=1)
        self.conv_2 = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(relu(self.conv_1(relu(self.conv_0(x)))))


class Encoder(nn.Module):
    """Masks to vectors: masks [B, 64, 64] in [-1, 1] -> [B, 4, 4, E]."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        channels = config.channels
        widths = [1, channels // 4, channels // 2, channels, channels]
        self.down = nn.ModuleList(Conv(a, b, 4, 2, 1) for a, b in itertools.pairwise(widths))
        self.res = nn.ModuleList(ResBlock(channels) for _ in range(2))
        self.output = Conv(channels, config.code_width, 1)

    def forward(self, masks: Tensor) -> Tensor:
        x = masks[:, None]
        for stage in self.down:
            x = relu(stage(x))
        for block in self.res:
            x = block(x)
        return self.output(x).permute(0, 2, 3, 1)


class Decoder(nn.Module):
    """Code words to masks: words [B, 4, 4, E] -> [B, 64, 64], positive inside."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        channels = config.channels
        widths = [channels, channels, channels // 2, channels // 4, channels // 8]
        self.input = Conv(config.code_width, channels, 1)
        self.res = nn.ModuleList(ResBlock(channels) for _ in range(2))
        self.up = nn.ModuleList(ConvTranspose(a, b, 4, 2, 1) for a, b in itertools.pairwise(widths))
        self.output = Conv(widths[-1], 1, 1)

    def forward(self, words: Tensor) -> Tensor:
        x = relu(self.input(words.permute(0, 3, 1, 2)))
        for block in self.res:
            x = block(x)
        for stage in self.up:
            x = relu(stage(x))
        return self.output(x)[:, 0]


class Codec(nn.Module):
    """Encoder, code book and decoder; the attribute tree is the parameter tree of `numpy_ref`."""

    def __init__(self, config: CodecConfig = CodecConfig()):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODES, config.code_width), requires_grad=False)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, masks: Tensor) -> Tensor:
        """Masks to tokens: masks [B, 64, 64] in [-1, 1] -> [B, 16]."""
        vectors = self.encoder(masks)
        return quantize(vectors, self.codebook).reshape(len(masks), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Tokens to masks: codes [B, 16] -> [B, 64, 64]."""
        return self.decoder(self.codebook[codes].reshape(len(codes), CELLS, CELLS, -1))


def quantize(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The number of the nearest code word: vectors [..., E], codebook [V, E] -> [...]."""
    return ((codebook * codebook).sum(-1) - 2 * vectors @ codebook.T).argmin(-1)


# --- training ----------------------------------------------------------------------------------------------


def random_masks(rng: np.random.Generator, count: int, random_scene: Callable = scenes.random_scene) -> np.ndarray:
    """Masks of things in random scenes, as the encoder sees them: [count, 64, 64]."""
    masks = []
    while len(masks) < count:
        scene = random_scene(rng, compositional=bool(rng.random() < 0.5))  # a mask has no color
        for index, thing in enumerate(scene.things):
            masks.append(segmentation.crop(scene.visible(index, 128), thing.box))
    return np.stack(masks[:count])


def train_codec(
    seed: int,
    steps: int = 1500,
    batch_size: int = 64,
    peak: float = 2e-3,
    masks_of: Callable[..., np.ndarray] = random_masks,
    count: int = 6000,
    config: CodecConfig = CodecConfig(),
) -> tuple[dict, list]:
    """A codec for masks of scenes: its weights as a nested dict of arrays, and the curve of (step, loss) pairs.

    `masks_of(rng, count)` gives the masks that it learns.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    pool = torch.from_numpy(masks_of(rng, count))
    codec = Codec(config)
    optimizer = torch.optim.AdamW([p for p in codec.parameters() if p.requires_grad], lr=peak, weight_decay=0.01)
    counts = torch.ones(CODES)
    curve, recent = [], []
    for step in tqdm(range(steps), desc="mask codec", disable=None, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
        masks = pool[torch.from_numpy(rng.integers(0, len(pool), batch_size))]
        vectors = codec.encoder(masks)
        if step < steps // 10:  # without a code book first, so that it starts among vectors that mean something
            words, commitment = vectors, 0.0
        else:
            if step == steps // 10:
                _place_at_random(codec, vectors, torch.arange(CODES), rng)
            chosen = quantize(vectors.detach(), codec.codebook)
            words = codec.codebook[chosen]
            commitment = 0.25 * ((vectors - words) ** 2).mean()
            _move_words(codec, vectors.detach(), chosen, counts, rng, restart=step % 50 == 0 and step < steps * 0.7)
            words = vectors + (words - vectors).detach()
        loss = nn.functional.softplus(-3 * masks * codec.decoder(words)).mean() + commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            curve.append((step + 1, round(float(np.mean(recent)), 4)))
            recent = []
    return unflatten({name: tensor.detach().numpy() for name, tensor in codec.state_dict().items()}), curve


def _place_at_random(codec, vectors, which, rng):
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    codec.codebook.data[which] = flat[torch.from_numpy(rng.integers(0, len(flat), len(which)))]


def _move_words(codec, vectors, chosen, counts, rng, restart, decay=0.95):
    """Each code word towards the mean of the vectors that chose it; `counts` is how many lately did."""
    flat, numbers = vectors.reshape(-1, vectors.shape[-1]), chosen.reshape(-1)
    found = torch.bincount(numbers, minlength=CODES).float()
    sums = torch.zeros_like(codec.codebook).index_add_(0, numbers, flat)
    counts.mul_(decay).add_(found, alpha=1 - decay)
    used = found > 0
    means = sums[used] / found[used, None]
    codec.codebook.data[used] += (1 - decay) * (means - codec.codebook.data[used])
    if restart and len(dead := torch.nonzero(counts < 0.02)[:, 0]):
        _place_at_random(codec, vectors, dead, rng)
        counts[dead] = 1


def save(file: str | Path, params: Params) -> None:
    """Write the weights under their official names."""
    flat = flatten(params)
    with new_file(file) as temporary:
        write_npz(temporary, {name: np.asarray(flat[path]) for path, name in segmentation.names().items()})


class Speller:
    """Called with a mask and its box, the mask's tokens. Shapes recur, so tokens are kept by a digest of the mask."""

    MOST = 50_000  # masks remembered

    def __init__(self, params: Params):
        self.params, self.known = params, {}

    def __call__(self, mask: np.ndarray, box: tuple[float, float, float, float]) -> str:
        cropped = segmentation.crop(mask, box)
        key = hashlib.blake2b(cropped.tobytes(), digest_size=16).digest()
        if key not in self.known:
            if len(self.known) == self.MOST:
                self.known.clear()
            self.known[key] = segmentation.spell(segmentation.encode(self.params, cropped[None])[0])
        return self.known[key]
