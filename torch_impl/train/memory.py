"""What makes training fit: a frozen base in fewer bits, and blocks that are computed again in the backward pass."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.layers import Linear
from ..model.paligemma import PaliGemma

BASE_DTYPES = ("float32", "bfloat16", "int4")
GROUPS = (64, 32, 16)  # weights of a column that share a scale: as many as divide it


def recompute_blocks(model: PaliGemma) -> None:
    """Gradient checkpointing (Chen et al. 2016): of each block only its input is kept for the backward pass."""
    for block in (*model.vision.blocks, *model.text.blocks):
        # Nothing is drawn at random in a block, so there is no state of a generator to put back.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def store_base(model: PaliGemma, dtype: str) -> None:
    """Keep a model's weights, which are not to be trained, in one of BASE_DTYPES.

    In int4 that is for the kernels of the blocks, which are nearly all of it; the rest is kept in bfloat16.
    """
    if dtype == "float32":
        return
    model.to(torch.bfloat16)
    if dtype == "int4":
        for block in (*model.vision.blocks, *model.text.blocks):
            for owner in (block.attention, block.mlp):
                for name, layer in list(owner.named_children()):
                    if isinstance(layer, Linear) and group_size(len(layer.kernel)):
                        setattr(owner, name, Int4Linear(layer))


def group_size(inputs: int) -> int | None:
    """How many weights of a column of so many share a scale; None if no size of GROUPS divides it."""
    return next((size for size in GROUPS if inputs % size == 0), None)


def quantize(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """kernel [in, out] -> codes [in / 2, out] (uint8, two rows in each), scales [in / g, out] in the kernel's dtype.

    A weight is (code - 8) * scale, the scale a seventh of the largest of its group of g.
    """
    inputs, outputs = kernel.shape
    groups = kernel.float().reshape(-1, group_size(inputs) or inputs, outputs)
    scales = (groups.abs().amax(1) / 7).to(kernel.dtype)
    divisors = torch.where(scales == 0, 1, scales).float()[:, None]
    codes = (torch.round(groups / divisors).clamp(-8, 7) + 8).to(torch.uint8).reshape(-1, 2, outputs)
    return codes[:, 0] | codes[:, 1] << 4, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [in / 2, out], scales [in / g, out] -> kernel [in, out] in a dtype."""
    rows = torch.stack([codes & 15, codes >> 4], 1).reshape(len(scales), -1, codes.shape[1])
    return ((rows.to(dtype) - 8) * scales[:, None].to(dtype)).reshape(-1, codes.shape[1])


class _Product(torch.autograd.Function):
    """x @ kernel with the kernel made from its codes, here and again for the gradient, and kept for neither."""

    @staticmethod
    def forward(ctx, x, codes, scales):
        ctx.save_for_backward(codes, scales)
        return x @ dequantize(codes, scales, x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        codes, scales = ctx.saved_tensors
        return gradient @ dequantize(codes, scales, gradient.dtype).T, None, None


class Int4Linear(nn.Module):
    """A frozen `Linear` whose kernel is kept in four bits: x [..., in] -> [..., out]."""

    def __init__(self, layer: Linear):
        super().__init__()
        codes, scales = quantize(layer.kernel.detach())
        self.codes, self.scales, self.bias = nn.Buffer(codes), nn.Buffer(scales), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# --- bytes -------------------------------------------------------------------------------------------------


def of_weights(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def of_gradients(model: nn.Module) -> int:
    """Bytes of the gradients of what is trained."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def of_moments(model: nn.Module, optimizer: str) -> int:
    """Bytes that an optimizer keeps: AdamW two numbers a weight, Muon one a weight of the blocks' kernels."""
    trained = [(name, p.nbytes) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, _ in trained if optimizer == "muon" and ".blocks." in name and name.endswith("kernel")}
    return sum(size * (1 if name in hidden else 2) for name, size in trained)
