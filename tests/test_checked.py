"""Weights that were checked are not read again until something writes to them."""

import os
import shutil
from pathlib import Path

import pytest

from export import bundle
from export.bundle import digests
from export.bundle.weights import FILE
from export.session import open_session
from numpy_ref.errors import PaliGemmaError


@pytest.fixture
def opened(copy, tmp_path, monkeypatch):
    """A bundle of its own whose weights were read once, and the list of the files that are read from now on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED", 0)
    found = bundle.load(copy)
    read, sha256 = [], bundle.sha256
    monkeypatch.setattr(bundle, "sha256", lambda file: read.append(Path(file).name) or sha256(file))
    return found, read


def test_what_was_checked_is_not_read_again(opened):
    found, read = opened
    open_session(found, "cpu")
    assert read == []
    bundle.check_weights(found)  # asked for, it is
    assert read == [FILE]


def test_a_changed_byte_is_found_even_with_the_old_time(opened):
    found, read = opened
    file = found.path / FILE
    before = file.stat()
    changed = bytearray(file.read_bytes())
    changed[0] ^= 1
    with open(file, "r+b") as stream:
        stream.write(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PaliGemmaError, match="SHA-256"):
        open_session(found, "cpu")
    assert read == [FILE]


def test_another_file_in_its_place_is_found(opened):
    found, _ = opened
    file = found.path / FILE
    other = file.with_suffix(".other")
    other.write_bytes(bytes(file.stat().st_size))
    os.replace(other, file)
    with pytest.raises(PaliGemmaError, match="SHA-256"):
        open_session(found, "cpu")


def test_another_checksum_is_not_known(opened):
    found, _ = opened
    assert digests.is_known(found.path / FILE, found.description.files[FILE].sha256)
    assert not digests.is_known(found.path / FILE, "0" * 64)


def test_a_file_just_written_is_not_remembered(opened, monkeypatch):
    """Within one tick of the clock it could change again and keep its times."""
    found, read = opened
    monkeypatch.setattr(digests, "_SETTLED", 10**12)
    (found.path / FILE).touch()
    bundle.check_weights(found)
    open_session(found, "cpu")
    assert read == [FILE, FILE]


def test_a_file_written_while_it_is_read_is_not_remembered(opened):
    found, _ = opened
    file, digest = found.path / FILE, found.description.files[FILE].sha256
    before = digests.state(file)
    file.touch()
    digests.remember(file, digest, before)
    assert not digests.is_known(file, digest)


def test_without_a_cache_it_is_read_every_time(opened, tmp_path):
    found, read = opened
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("not a folder")
    open_session(found, "cpu")
    open_session(found, "cpu")
    assert read == [FILE, FILE]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED", -(10**12))
    file = tmp_path / "file"
    file.write_bytes(b"contents")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    digests.remember(file, "0" * 64, digests.state(file))
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()]
