"""Kills, full disks, places that may not be written or vanish, and several writers at once: whole or absent."""

import shutil
import subprocess
import sys

import pytest

from export import bundle
from numpy_ref import checkpoint, files
from numpy_ref.errors import PaliGemmaError

from . import faults

WRITERS = ("export", "convert to npz", "convert from npz")
#: Runs Python with a limit on the size of each file, and without root's power to write where nobody may.
LIMITED = """
import ctypes, os, resource, sys
size = int(sys.argv[1])
if size >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return faults.jobs(*faults.sources(tmp_path_factory.mktemp("sources"), vocab=3000, width=42))


def call_limited(job, folder, size=-1):
    """Run a job to its end: the exit code, and the lines on stderr."""
    command = [sys.executable, "-c", LIMITED, str(size), *job.command(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=faults.ROOT, env=faults.environment())
    return result.returncode, result.stderr.strip().splitlines()


@pytest.mark.parametrize(("name", "count"), [*zip(WRITERS, (2, 4, 2), strict=True)])
def test_killed_at_random_moments(jobs, name, count, tmp_path):
    """A small share of `python -m tests.faults`; for training see test_training.py."""
    rows = faults.kills(jobs[name], tmp_path / "place", count)
    assert sum(row.get("kills", 0) for row in rows) == count
    assert all(row.get("kills") == row.get("next run succeeded") for row in rows)


def test_the_look_at_what_is_left_can_fail(jobs, tmp_path):
    """Half an output, and something that lies beside it."""
    job, folder = jobs["convert from npz"], tmp_path / "place"
    folder.mkdir()
    alone = faults.undisturbed(job, folder)
    checkpoint.convert(job.arguments[-1], folder / job.output)
    shutil.copytree(folder / job.output, tmp_path / "kept")
    faults.check(job, folder, alone)
    shutil.copytree(tmp_path / "kept", folder / job.output)
    (folder / job.output / "config.json").unlink()
    with pytest.raises(faults.FaultError, match="not whole"):
        faults.check(job, folder, alone)
    shutil.rmtree(folder / job.output)
    (folder / "stray").touch()
    with pytest.raises(faults.FaultError, match=r"beside the output there is .'stray'"):
        faults.finish_again(job, folder, alone)


@pytest.mark.parametrize("make", [files.new_directory, files.new_file])
def test_left_overs_of_the_dead_are_removed(tmp_path, make):
    """Those of this output, and nothing that anybody else may have put there."""
    kept = [
        ".out.old",
        ".out.part",
        ".out.x.abcdefgh.part",
        ".other.abcdefgh.part",
        "out.abcdefgh.part",
        ".out.ABCDEFGH.part",
    ]
    for name in (".out.abcdefgh.part", ".out.z_4xk0q9.part", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    fill(make, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "out"}


def test_left_overs_do_not_take_the_room_of_the_next(jobs, tmp_path, monkeypatch):
    """They are gone before an export asks how much of the disk is free."""
    (tmp_path / ".out.abcdefgh.part").mkdir()
    usage, seen = shutil.disk_usage, []

    def look(path):
        seen.append((tmp_path / ".out.abcdefgh.part").exists())
        return usage(path)

    monkeypatch.setattr(bundle.shutil, "disk_usage", look)
    bundle.write(checkpoint.load(jobs["export"].arguments[2]), tmp_path / "out")
    assert seen == [False]


@pytest.mark.parametrize("make", [files.new_directory, files.new_file])
def test_the_living_are_left_alone(tmp_path, make):
    """Who comes first with a whole output has the place; the other is told."""

    def overtake():
        fill(make, tmp_path / "out", "quick")
        assert len(list(tmp_path.iterdir())) == 2

    with pytest.raises(PaliGemmaError, match="exists already"):
        fill(make, tmp_path / "out", "slow", overtake)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    out = tmp_path / "out"
    assert (out / "file" if out.is_dir() else out).read_text() == "quick"


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    fill(files.new_file, tmp_path / "out", "first")
    with pytest.raises(PaliGemmaError, match="exists already"):
        fill(files.new_file, tmp_path / "other", "second", (tmp_path / "other").touch)
    assert (tmp_path / "out").read_text() == "first"
    assert (tmp_path / "other").read_text() == ""


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Left-overs stay, and harm nobody."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.abcdefgh.part").mkdir()
    fill(files.new_directory, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".out.abcdefgh.part", "out"}


def fill(make, path, contents="whole", meanwhile=lambda: None):
    """Write a folder with one file, or a file, and do something while it is not there yet."""
    with make(path) as output:
        meanwhile()
        (output / "file" if make is files.new_directory else output).write_text(contents)


def test_three_exports_to_one_place(jobs, tmp_path):
    """One of them has it; the others say so, or that it was there already."""
    job, output = jobs["export"], tmp_path / "bundle"
    command = [sys.executable, *job.command(tmp_path)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": faults.ROOT, "env": faults.environment()}
    processes = [subprocess.Popen(command, text=True, **options) for _ in range(3)]
    ended = [(*process.communicate(), process.returncode) for process in processes]
    assert [code for *_, code in ended].count(0) == 1, ended
    for printed, errors, code in ended:
        message = f"wrote {output}" if code == 0 else f"export-onnx: error: {output}: output folder exists already"
        assert message in (printed if code == 0 else errors)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    bundle.load(output)


@pytest.mark.parametrize("size", [1000, 100_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full(jobs, name, size, tmp_path):
    job = jobs[name]
    code, errors = call_limited(job, tmp_path, size)
    assert code == 1
    assert len(errors) == 1
    assert f"error: {tmp_path / job.output}: cannot be written (File too large)" in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_not_be_written(jobs, name, tmp_path):
    job = jobs[name]
    tmp_path.chmod(0o500)
    try:
        code, errors = call_limited(job, tmp_path)
        assert code == 1
        assert errors[0].endswith(f"error: {tmp_path / job.output}: cannot be written (Permission denied)")
        tmp_path.chmod(0o000)  # nor looked into
        code, errors = call_limited(job, tmp_path / "new")
        assert code == 1
        assert errors[0].endswith("cannot be written (Permission denied)")
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long(tmp_path):
    name = "long" * 99
    with pytest.raises(PaliGemmaError, match=f"{name}: cannot be written .File name too long"):
        fill(files.new_directory, tmp_path / name)
    with pytest.raises(PaliGemmaError, match="cannot be written"):
        bundle.write(checkpoint.load(), tmp_path / name)


@pytest.mark.parametrize("make", [files.new_directory, files.new_file])
def test_a_place_that_vanishes(tmp_path, make):
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(PaliGemmaError, match=r"out: cannot be written .No such file or directory"):
        fill(make, place / "out", meanwhile=lambda: shutil.rmtree(place))
    assert not list(tmp_path.iterdir())


def test_an_export_whose_place_vanishes(jobs, tmp_path):
    place = tmp_path / "place"
    with pytest.raises(PaliGemmaError, match=r"out: cannot be written .No such file or directory"):
        bundle.write(
            checkpoint.load(jobs["export"].arguments[2]), place / "out", verify=lambda *_: shutil.rmtree(place)
        )
    assert not list(tmp_path.iterdir())
