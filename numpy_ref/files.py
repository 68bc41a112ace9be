"""Files: reading those of a folder that may come from a stranger, and writing whole or not at all."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import PaliGemmaError, quote

MAX_JSON_BYTES = 16 * 2**20  # the largest JSON file that there is, an index of shards, has a tenth
MAX_SMALL_BYTES = 2**28  # the largest of other files that are read whole, a tokenizer.json, has an eighth
_LOCK = ".lock"
_PART = ".part"  # how the names of unfinished folders end
#: Do not wait for a pipe's other end, and do not follow a link; what else to say where systems have it.
_ONLY_FILES = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))

# --- reading -----------------------------------------------------------------------------------------------


def within(folder: str | Path, name: str) -> Path:
    """The path of a file of a folder that may come from a stranger; whether it exists is another question.

    A link may not lead out of the folder, except as in a Hugging Face cache: from snapshots/<revision> to blobs.
    Raises PaliGemmaError for a link that does, and for a name that is more than a name.
    """
    file = Path(folder) / name
    try:
        home, target = Path(folder).resolve(), file.resolve()
        file.is_file()  # which a name that is too long fails
    except (OSError, ValueError, RuntimeError):  # the last is a circle of links
        target = None
    if target is None or Path(name).name != name or name in ("", ".."):
        raise PaliGemmaError(f"{folder}: {quote(name)} is not a file name of this folder")
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in homes:
        raise PaliGemmaError(f"{file}: this link leads out of its folder; put a copy of the file in its place")
    return file


@contextmanager
def opened(file: str | Path) -> Iterator[BufferedReader]:
    """Open a file to read its bytes. Raises OSError, also for what only has a name like one: a pipe would block.

    A link is followed once: if another link is put where it led, that is not.
    """
    descriptor = os.open(os.path.realpath(file), os.O_RDONLY | _ONLY_FILES)
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file, but a folder, pipe, socket or device", str(file))
        yield stream


def read_bytes(file: str | Path, most: int = MAX_SMALL_BYTES) -> bytes:
    """All bytes of a small file. Raises OSError, and PaliGemmaError if it has more than `most`."""
    with opened(file) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise PaliGemmaError(f"{Path(file).name} has {size} bytes, more than the {most} that are read")
        return stream.read(most)


def read_json(file: Path) -> Any:
    """Parse a JSON file; PaliGemmaError if it is absent, larger than MAX_JSON_BYTES, or not JSON."""
    try:
        return json.loads(read_bytes(file, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise PaliGemmaError(f"{Path(file).name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PaliGemmaError(f"{Path(file).name} is not readable JSON ({error})") from None


# --- writing -----------------------------------------------------------------------------------------------


def json_bytes(value: Any) -> bytes:
    """The contents of a JSON file, to be read by people too."""
    return (json.dumps(value, indent=1) + "\n").encode()


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` if all goes well, and vanishes if not.

    What processes that were killed while making `path` left beside it is removed first. Raises PaliGemmaError if
    `path` exists, be it only by the end, or cannot be made.
    """
    path = absent(path, "folder")
    with _parents(path), _sibling(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()  # as the umask wants it, where `folder` is nobody else's
        yield temporary
        _move_into_place(temporary, path, "folder", os.rename)  # refused where another has put something


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """As `new_directory`, for one file."""
    path = absent(path, "file")
    with _parents(path), _sibling(path) as folder:
        yield folder / path.name
        _move_into_place(folder / path.name, path, "file", os.link)  # a rename would replace another process's file


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """As `new_file`, for one that may be there already, in a folder that is. Raises OSError."""
    path = Path(path)
    with _sibling(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def added_files(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder, whose files are moved into `folder`, which is there, if all goes well.

    In the order of their names, those of inner folders first. Raises PaliGemmaError if another process is at work
    in it.
    """
    folder = Path(folder)
    try:
        with claimed(folder), _sibling(folder) as temporary:
            yield temporary
            made = [file for file in temporary.rglob("*") if file.is_file()]
            for file in sorted(made, key=lambda file: (file.parent == temporary, file.name)):
                target = folder / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
    except OSError as error:
        raise PaliGemmaError(f"{folder}: cannot be written ({error.strerror or error})") from None


def absent(path: str | Path, kind: str) -> Path:
    """The path, if nothing is there yet; PaliGemmaError if there is."""
    path = Path(path)
    if os.path.lexists(path):
        raise PaliGemmaError(f"{path}: output {kind} exists already; remove it or name another")
    return path


def _move_into_place(temporary, path, kind, move) -> None:
    try:
        move(temporary, path)
    except OSError:
        os.rename(temporary, absent(path, kind))  # a disk without hard links, or an error to report


@contextmanager
def _sibling(path):
    """A folder beside `path`, locked while it is in use and removed at the end."""
    _remove_leftovers(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{_mark(path)}.", suffix=_PART, dir=path.parent))
        with _locked(folder):
            if not folder.exists():
                continue  # another process took it for a left-over in the moment before it was locked
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _mark(path) -> str:
    """By what a sibling's name says whose it is: the name, or what is sure to fit."""
    name = os.fsencode(path.name)
    return path.name if len(name) < 200 else hashlib.sha256(name).hexdigest()


def _remove_leftovers(path) -> None:
    """Remove the siblings that `_sibling` made for processes that have ended since.

    The lock of a process ends with it, however it ends. Where there are no locks, left-overs stay, and do no harm.
    """
    for leftover in path.parent.glob(f".{glob.escape(_mark(path))}.{'[a-z0-9_]' * 8}{_PART}"):
        with _locked(leftover, wait=False) as held:
            if held:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(folder, wait=True):
    """Lock a folder; yields whether that worked. It does not on Windows, and on some disks of other machines."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except (ImportError, OSError):
        held = False
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


_claimed: set[Path] = set()  # folders of this process


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Make a folder, if it is not there, and keep other processes away from it until the end.

    Raises PaliGemmaError if one is at work in it, or if it cannot be made. Within it may be claimed again. The lock
    ends with this process, however that ends, and is not passed on to those that it starts. Where there are no locks,
    nobody is kept away. A folder that was made and stayed empty is taken away.
    """
    folder = Path(folder)
    if folder.resolve() in _claimed:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        home = folder.resolve()
        lock = home / _LOCK
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | _ONLY_FILES, 0o666)
    except OSError as error:
        raise PaliGemmaError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        if not _lock_alone(descriptor, lock):
            raise PaliGemmaError(f"{folder}: another process is at work in it; wait, or name another --output")
        _claimed.add(home)
        try:
            yield
        finally:
            _claimed.discard(home)
            with suppress(OSError):
                lock.unlink()
            with suppress(OSError):  # it is not empty
                if made:
                    home.rmdir()
    finally:
        os.close(descriptor)


def _lock_alone(descriptor, lock) -> bool:
    """Lock an opened file for this process, unless another has it, or has just put it away."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except OSError:
        return False


@contextmanager
def _parents(path):
    """Make the folders above `path`, and take away again those that were made if what follows fails."""
    made = []
    try:
        for parent in reversed(path.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                made.append(parent)
        yield
    except BaseException as error:
        for parent in reversed(made):
            with suppress(OSError):  # somebody else's file is in it by now
                parent.rmdir()
        if isinstance(error, OSError):
            raise PaliGemmaError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
