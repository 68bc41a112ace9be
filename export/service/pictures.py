"""Recent pictures by their contents, so that one that is asked about again is not decoded and resized again."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numpy_ref.engine import Engine
from numpy_ref.image import decode_image


@dataclass(frozen=True)
class Picture:
    """What is kept of a picture: what an engine takes, and its size in pixels."""

    pixel_values: np.ndarray  # [1, 3, S, S]
    width: int
    height: int


class PictureCache:
    """The pictures that were used last, of at most `capacity` bytes together. Threads may share one."""

    def __init__(self, capacity: int):
        self.capacity, self.size, self.hits, self.misses = capacity, 0, 0, 0
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes, make: Callable[[], Picture]) -> Picture:
        """The picture that is kept by a key, or else the one that is made and kept."""
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self.misses += 1
        made = make()
        with self._lock:
            if key not in self._kept and made.pixel_values.nbytes <= self.capacity:
                self._kept[key] = made
                self.size += made.pixel_values.nbytes
                while self.size > self.capacity:
                    _, dropped = self._kept.popitem(last=False)
                    self.size -= dropped.pixel_values.nbytes
        return made


def read(engine: Engine, contents: bytes, name: str, transparency: str, cache: PictureCache) -> Picture:
    """The bytes of a picture file, as an engine takes it. Raises PaliGemmaError that begins with `name`."""

    def make():
        image = decode_image(io.BytesIO(contents), name, transparency)
        return Picture(engine.preprocess(image), image.width, image.height)

    return cache.get(hashlib.sha256(transparency.encode() + contents).digest(), make)
