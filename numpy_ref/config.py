"""Configurations as frozen data.

Nothing in the model branches on a variant's name: PaliGemma 1 and 2 differ in these fields alone.
Sources: big_vision `models/ppp/gemma.py` and `models/vit.py`.
"""

import math
from dataclasses import dataclass

from .errors import PaliGemmaError


@dataclass(frozen=True)
class SiglipConfig:
    """The vision tower (SigLIP So400m/14 by default)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp: int = 4304
    heads: int = 16
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class GemmaConfig:
    """The decoder (Gemma 2B by default; the fields from `query_scalar` on are Gemma 2's)."""

    vocab: int = 257216  # rows of the embedding table
    width: int = 2048
    depth: int = 18
    mlp: int = 16384
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    rope_base: float = 10000.0
    eps: float = 1e-6
    tied: bool = True  # the head is the embedding table
    query_scalar: float = 256.0  # queries are scaled by query_scalar ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    windows: tuple[int | None, ...] = ()  # one sliding window a layer, None for full attention

    @property
    def query_scale(self) -> float:
        return 1 / math.sqrt(self.query_scalar)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True)
class PaliGemmaConfig:
    """Both towers, the ids of the control tokens, and the longest sequence the decoder knows."""

    vision: SiglipConfig = SiglipConfig()
    text: GemmaConfig = GemmaConfig()
    image_token: int = 257152
    pad: int = 0
    eos: int = 1
    bos: int = 2
    max_length: int = 8192
    stops: tuple[int, ...] | None = None  # what ends an answer, where that is not eos alone; () for nothing

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return (self.eos,) if self.stops is None else self.stops


def alternating_windows(depth: int, window: int | None) -> tuple[int | None, ...]:
    """Gemma 2 slides its window on layers 0, 2, 4 …; () when there is no window."""
    return tuple(window if layer % 2 == 0 else None for layer in range(depth)) if window else ()


def _gemma2(width, depth, mlp, heads, kv_heads, head_dim, query_scalar) -> GemmaConfig:
    return GemmaConfig(
        width=width, depth=depth, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        query_scalar=query_scalar, attn_softcap=50.0, final_softcap=30.0, post_norms=True,
        windows=alternating_windows(depth, 4096),
    )  # fmt: skip


_DECODERS = {
    "paligemma-3b": GemmaConfig(),
    "paligemma2-3b": _gemma2(2304, 26, 9216, 8, 4, 256, 256.0),
    "paligemma2-10b": _gemma2(3584, 42, 14336, 16, 8, 256, 256.0),
    "paligemma2-28b": _gemma2(4608, 46, 36864, 32, 16, 128, 4608 / 32),
}

#: The released models by name, "paligemma-3b-224" … "paligemma2-28b-896".
VARIANTS = {
    f"{name}-{size}": PaliGemmaConfig(vision=SiglipConfig(image_size=size), text=decoder)
    for name, decoder in _DECODERS.items()
    for size in (224, 448, 896)
}


def check(config: PaliGemmaConfig, source: object = "config.json") -> None:
    """Raise PaliGemmaError, naming the source, if the sizes cannot belong together."""
    vision, text = config.vision, config.text
    table = [
        (vision.image_size >= vision.patch_size, "the image size is smaller than the patch size"),
        (vision.width % vision.heads == 0, f"{vision.heads} vision heads do not divide the width {vision.width}"),
        (text.heads % text.kv_heads == 0, f"{text.kv_heads} key/value heads do not divide {text.heads} heads"),
        (text.head_dim % 2 == 0, f"head_dim {text.head_dim} is odd; the rotary embedding needs pairs"),
        (
            vision.patches < config.max_length,
            f"the {vision.patches} patches of a picture do not fit into {config.max_length} positions",
        ),
        (max(config.bos, config.pad) < text.vocab, f"bos or pad lies past the {text.vocab} embeddings"),
    ]
    for holds, problem in table:
        if not holds:
            raise PaliGemmaError(f"{source}: {problem}")
