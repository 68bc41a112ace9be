"""LoRA (Hu et al. 2021): thin pairs of matrices beside frozen kernels, saved as `peft` does.

    y = x @ kernel + bias + alpha / r * (x @ a) @ b        a [in, r], b [r, out]

a begins as `peft` begins it (Kaiming's uniform), b with zeros, so that the first step starts from the base itself. The
pairs stay in float32 whatever the base is kept in. There is no dropout: runs repeat to the last bit, and with so few
weights an early best (`--validation`) guards against learning by heart.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from numpy_ref.checkpoint import adapter
from numpy_ref.checkpoint.layouts import module_name, parameters
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError

from ..load import to_array
from ..model.layers import cast_like
from ..model.paligemma import PaliGemma

PARTS = ("vision", "projector", "text")
#: The last part of a module's name in Hugging Face's model, which peft's users know; both towers share some.
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
TARGETS = (*PARTS, *NAMES)


class LoraLinear(nn.Module):
    """A layer that stays, and the pair that is trained in its stead: x [..., in] -> [..., out]."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(inputs, rank))
        self.lora_b = nn.Parameter(torch.zeros(rank, outputs))
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_(a=sqrt(5)) of peft's A [r, in]
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        change = (x @ cast_like(self.lora_a, x)) @ cast_like(self.lora_b, x)
        return y + cast_like(change * self.scale, y)

    @property
    def kernel(self) -> Tensor:
        """The kernel of the layer that stays, [in, out], which tells its device and dtype."""
        return self.base.get_parameter("kernel")


def target_kernels(config: PaliGemmaConfig, targets: Sequence[str]) -> list[str]:
    """The paths of the kernels that targets name: of a part all, of a name those of that name in both towers.

    The patches' projection (a convolution in Hugging Face's model), tables and the head are not adapted. Raises
    PaliGemmaError if a target names none.
    """
    found: dict[str, list[str]] = {target: [] for target in targets}
    for parameter in parameters(config):
        path, name = parameter.path, module_name(parameter.hf.name).rpartition(".")[2]
        if path.endswith(".kernel") and (path == "projector.kernel" or ".blocks." in path):
            for target in found.keys() & {path.partition(".")[0], name}:
                found[target].append(path)
    if empty := [target for target, paths in found.items() if not paths]:
        raise PaliGemmaError(f"--lora-targets: {', '.join(empty)} is in no layer of this model")
    wanted = {path for paths in found.values() for path in paths}
    return [parameter.path for parameter in parameters(config) if parameter.path in wanted]


def adapt(model: PaliGemma, kernels: Sequence[str], rank: int, alpha: float) -> None:
    """Freeze a model, and put a fresh pair of the given rank beside each of the kernels."""
    model.requires_grad_(False)
    for parameter in parameters(model.config):
        if parameter.path in kernels:
            parent, _, name = parameter.path.removesuffix(".kernel").rpartition(".")
            owner = model.get_submodule(parent)
            inputs, outputs = parameter.shape
            setattr(owner, name, LoraLinear(owner.get_submodule(name), inputs, outputs, rank, alpha))


def pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The path of each adapted kernel -> its a [in, r] and b [r, out]."""
    return {
        f"{name}.kernel": (module.lora_a, module.lora_b)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def save(path: Path, model: PaliGemma, alpha: float, base: str, files: dict[str, bytes]) -> None:
    """Write the pairs of a model as an adapter of `base`, and `files` beside them (`adapter.save`)."""
    arrays = {kernel: (to_array(a), to_array(b)) for kernel, (a, b) in pairs(model).items()}
    adapter.save(path, model.config, arrays, alpha, base, files)
