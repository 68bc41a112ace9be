"""Weights between the NumPy dict and the modules, strictly, and the twin as a generation engine."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.blocks import bfloat16, check_finite
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.engine import (
    Engine,
    Features,
    FirstNotFinite,
    MaskDecoder,
    Pictures,
    check_room,
    pictures_per_prompt,
)
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model.layers import Params
from numpy_ref.model.segmentation import decoder_of

from .model.layers import Pair, upcast
from .model.paligemma import PaliGemma


def load(
    path: str | Path | None = None, dtype: torch.dtype = torch.float32, adapter: str | Path | None = None
) -> tuple[PaliGemma, Checkpoint]:
    """A checkpoint directory, and perhaps an adapter -> the module in evaluation mode, and the loaded checkpoint."""
    checkpoint = checkpoints.load(path, adapter)
    return from_params(checkpoint.config, checkpoint.params, dtype), checkpoint


def from_params(config: PaliGemmaConfig, params: Params, dtype: torch.dtype = torch.float32) -> PaliGemma:
    """A nested dict of arrays -> the module.

    Raises PaliGemmaError if a tensor is missing or left over, or holds a NaN or an infinity.
    """
    with torch.device("meta"):
        model = PaliGemma(config)
    model = model.to_empty(device="cpu").to(dtype).eval()
    flat, state = checkpoints.flatten(params), model.state_dict()
    if flat.keys() != state.keys():
        raise PaliGemmaError(f"parameters do not match the module: {', '.join(sorted(flat.keys() ^ state.keys()))}")
    for name, array in flat.items():
        if array.shape != tuple(state[name].shape):
            raise PaliGemmaError(f"{name} has shape {list(array.shape)}, the module asks for {list(state[name].shape)}")
    with torch.no_grad():
        for name, array in flat.items():
            array = np.asarray(array)  # of a weight that an adapter changes, made here and forgotten
            check_finite(name, array)
            state[name].copy_(to_tensor(array))
    return model


def to_params(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict:
    """The module's weights as the nested dict of NumPy arrays, which `checkpoint.save` writes."""
    return checkpoints.unflatten({name: to_array(tensor.to(dtype)) for name, tensor in model.state_dict().items()})


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor, bfloat16 included, as a NumPy array of the same dtype."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy().view(bfloat16()) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """A NumPy array, bfloat16 included, as a tensor of the same dtype."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class ModuleEngine(Engine):
    """A module as an engine: NumPy arrays in, NumPy logits out."""

    name = "torch"
    extends_at_once = True

    def __init__(self, model: PaliGemma, resize: str = "bicubic", masks: MaskDecoder | None = None):
        super().__init__(model.config, resize, masks)
        self.model = model

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> list[Features]:
        return list(map(Features, pixel_values, self.model.encode_image(self._pixels(pixel_values))))

    @torch.inference_mode()
    def prefill(
        self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int
    ) -> tuple[np.ndarray, list[Pair]]:
        check_room(input_ids.shape[1], capacity)
        pictures_per_prompt(self.config, pictures, input_ids)
        given = isinstance(pictures, np.ndarray)
        images = self._pixels(pictures) if given else torch.stack([each.value for each in pictures])
        ids, counts = self._there(input_ids), self._there(lengths)
        logits, cache = self.model.prefill(images, ids, counts, capacity)
        return upcast(logits).cpu().numpy(), cache

    @torch.inference_mode()
    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: list[Pair]) -> tuple[np.ndarray, list[Pair]]:
        check_room(lengths.max() + 1, cache[0][0].shape[2])
        logits, cache = self.model.decode(self._there(input_ids), self._there(lengths), cache)
        return upcast(logits).cpu().numpy(), cache

    @torch.inference_mode()
    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: list[Pair]) -> tuple[np.ndarray, list[Pair]]:
        check_room(lengths.max() + input_ids.shape[1], cache[0][0].shape[2])
        logits, cache = self.model.extend(torch.from_numpy(input_ids), torch.from_numpy(lengths), cache)
        return upcast(logits).numpy(), cache

    @torch.inference_mode()
    def reorder(self, cache: list[Pair], rows: np.ndarray) -> list[Pair]:
        return [(key[rows], value[rows]) for key, value in cache]

    @torch.inference_mode()
    def first_not_finite(
        self, pixel_values: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, prefix_lengths: np.ndarray
    ) -> str | None:
        tap = FirstNotFinite(lambda value: bool(torch.isfinite(value).all()))
        self.model(self._pixels(pixel_values), *map(self._there, (input_ids, lengths, prefix_lengths)), tap)
        return tap.name

    def _pixels(self, pixel_values) -> Tensor:
        """Pictures where the module is, in its dtype."""
        return self._there(np.ascontiguousarray(pixel_values)).to(self.model.projector.kernel.dtype)

    def _there(self, array) -> Tensor:
        """An array as a tensor on the module's device."""
        return torch.from_numpy(array).to(self.model.projector.kernel.device)


class TorchEngine(ModuleEngine):
    """The twin of a loaded checkpoint as an engine."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        model = from_params(checkpoint.config, checkpoint.params, dtype)
        super().__init__(model, checkpoint.resize, decoder_of(checkpoint))
