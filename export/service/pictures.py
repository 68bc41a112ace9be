"""Recent pictures by their contents: one that is asked about again is not decoded, resized and looked at again."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable

from numpy_ref.answer import Picture, look
from numpy_ref.engine import Engine
from numpy_ref.image import decode_image


class PictureCache:
    """The pictures that were used last, of at most `capacity` bytes together. Threads may share one.

    A picture counts with the features that the vision tower makes of it, which come to it later.
    """

    def __init__(self, engine: Engine, capacity: int):
        vision = engine.config.vision
        self.bytes_each = 4 * (3 * vision.image_size**2 + vision.patches * engine.config.text.width)
        self.most, self.hits, self.misses = capacity // self.bytes_each, 0, 0
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return len(self._kept) * self.bytes_each

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
            kept = self._kept.setdefault(key, made)  # another thread may have made it meanwhile
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return kept


def read(engine: Engine, contents: bytes, name: str, transparency: str, cache: PictureCache) -> Picture:
    """The bytes of a picture file, as an engine takes it. Raises PaliGemmaError that begins with `name`."""

    def make():
        return look(engine, decode_image(io.BytesIO(contents), name, transparency))

    return cache.get(hashlib.sha256(transparency.encode() + contents).digest(), make)
