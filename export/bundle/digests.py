"""Files that were found to have their SHA-256, remembered so that gigabytes are not read at every start.

A file is known by its path, device, inode, size and times. A copy, a download or a program that writes to it in the
usual way changes the last of them, the inode's own time, which no program can set back (on Windows that is the time of
creation, and the time of writing must do). What goes unseen: a device's decay, and writing through a shared mapping of
the file, which need not change any time. Against those, and against whoever may write to the file, `bundle.load` reads
everything.
"""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

from numpy_ref.files import replaced_file

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
    noted = _note(file, digest)
    with suppress(OSError):  # a home that cannot be written costs only time
        noted.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(noted) as temporary:
            temporary.write_text(before)


def is_noted(kind: str, key: str) -> bool:
    """Whether something of a kind, by its key in hexadecimal, was noted on this machine."""
    return (cache_folder() / kind / key).is_file()


def note(kind: str, key: str) -> None:
    """Note something of a kind."""
    file = cache_folder() / kind / key
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def state(file: Path) -> str:
    """What changes when a file is written or replaced; the latest of its times comes last."""
    found = file.stat()
    times = found.st_mtime_ns, found.st_ctime_ns
    return " ".join(str(number) for number in (found.st_dev, found.st_ino, found.st_size, min(times), max(times)))


def _note(file, digest) -> Path:
    name = hashlib.sha256(f"{file.resolve()}\n{digest}".encode()).hexdigest()
    return cache_folder() / "checked" / name


def cache_folder() -> Path:
    """Where this project keeps, for a user, what can be made again."""
    return Path(platformdirs.user_cache_dir("paligemma-onnx", appauthor=False))
