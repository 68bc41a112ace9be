"""Files that were found to have their SHA-256, remembered so that gigabytes are not read at every start.

A file is told by its path, device, inode, size and times. Whatever writes to it changes the last of them, the inode's
own time, which no program can set back (on Windows that is the time of creation, and the time of writing must do).
What only a device's decay changes goes unseen; `bundle.load` reads everything.
"""

import hashlib
import os
import tempfile
import time
from pathlib import Path

import platformdirs

_SETTLED = 2 * 10**9  # nanoseconds; a file that was written later than this ago may change again within one tick


def is_known(file: Path, digest: str) -> bool:
    """Whether the file, as it is now, was found to have this SHA-256."""
    try:
        return _note(file, digest).read_text() == state(file)
    except (OSError, ValueError):
        return False


def remember(file: Path, digest: str, before: str) -> None:
    """Note that the file had this SHA-256; `before` is its `state`, taken before its bytes were read."""
    settled = int(before.split()[-1]) < time.time_ns() - _SETTLED
    if not settled or state(file) != before:
        return
    note = _note(file, digest)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(before)
        os.replace(temporary, note)
    except OSError:
        pass  # a home that cannot be written costs only time


def state(file: Path) -> str:
    """What changes when a file is written or replaced; the latest of its times comes last."""
    told = file.stat()
    times = told.st_mtime_ns, told.st_ctime_ns
    return " ".join(str(number) for number in (told.st_dev, told.st_ino, told.st_size, min(times), max(times)))


def _note(file, digest) -> Path:
    name = hashlib.sha256(f"{file.resolve()}\n{digest}".encode()).hexdigest()
    return cache_folder() / "checked" / name


def cache_folder() -> Path:
    """Where this project keeps, for a user, what can be made again."""
    return Path(platformdirs.user_cache_dir("paligemma-onnx", appauthor=False))
