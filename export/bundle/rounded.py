"""Weights that were rounded before the weights file is written, for which that takes more than the weights alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .description import Calibration


class Rounded(Mapping[str, tuple[np.ndarray, np.ndarray]]):
    """What `quantized.quantize_blocks` gives, of weights by path; in files of a folder."""

    def __init__(self, folder: Path, calibration: Calibration):
        self.folder, self.calibration, self.paths = folder, calibration, []

    def add(self, path: str, values: np.ndarray, scales: np.ndarray) -> None:
        save_file(
            {"values": np.ascontiguousarray(values), "scales": np.ascontiguousarray(scales, np.float32)},
            self.folder / f"{path}.safetensors",
        )
        self.paths.append(path)

    def __getitem__(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        if path not in self.paths:
            raise KeyError(path)
        found = load_file(self.folder / f"{path}.safetensors")
        return found["values"], found["scales"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
