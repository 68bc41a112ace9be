"""The commands as a user meets them: answers, JSON, and one clear line for everything that is wrong."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from numpy_ref import cli, files
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.drawing import check_drawing, write_drawing
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image

EXAMPLE = SHIPPED / "example.png"
COMMANDS = {
    "run-onnx": ["-c", "from export.cli import run_main; run_main()"],
    "export-onnx": ["-c", "from export.cli import export_main; export_main()"],
    "numpy": ["-m", "numpy_ref"],
    "torch": ["-m", "torch_impl"],
}
ENGINES = ["run-onnx", "numpy", "torch"]
SUBJECT = "black cross"  # a thing in the example picture


def call(command, *arguments):
    return subprocess.run(
        [sys.executable, *COMMANDS[command], *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def answer(command, *arguments):
    result = call(command, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    result = call("export-onnx", "--output", folder, "--max-length", 100)
    assert result.returncode == 0, result.stderr
    return folder


def test_three_commands_one_answer(bundle):
    answers = [answer("run-onnx", bundle, EXAMPLE, "caption en"), answer("run-onnx", EXAMPLE, "caption en")]
    answers += [answer(command, EXAMPLE, "caption en") for command in ("numpy", "torch")]
    for each in answers:
        assert each.keys() == {"text", "tokens", "logprobs", "boxes", "masks", "timings"}
        assert each["timings"].keys() == {"load_s", "prefill_s", "decode_tokens_per_s"}
        assert (each["text"], each["tokens"]) == (answers[0]["text"], answers[0]["tokens"])
    assert answers[0]["tokens"]


@pytest.mark.parametrize("options", [["--temperature", "1.5", "--seed", "3"], ["--temperature", "1", "--top-k", "5"], ["--temperature", "2", "--top-p", "0.7"]])  # fmt: skip
def test_three_commands_draw_the_same(options):
    answers = [answer(command, EXAMPLE, "caption en", *options, "--max-new-tokens", "12") for command in ENGINES]
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]


def test_plain_output_is_the_text():
    streamed = call("run-onnx", EXAMPLE, "caption en")
    assert streamed.returncode == 0
    assert streamed.stdout == answer("run-onnx", EXAMPLE, "caption en")["text"] + "\n"


@pytest.mark.parametrize("command", ENGINES)
def test_options_between_the_arguments(command):
    plain = answer(command, EXAMPLE, "caption en", "--provider", "cpu", "--top-k", "3")
    assert answer(command, "--top-k", "3", EXAMPLE, "--provider", "cpu", "caption en")["tokens"] == plain["tokens"]


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = answer("run-onnx", EXAMPLE, "caption en")
    (graph,) = tmp_path.rglob("decode.onnx")
    graph.write_bytes(b"damaged")
    assert answer("run-onnx", EXAMPLE, "caption en")["tokens"] == first["tokens"]
    assert graph.read_bytes() != b"damaged"


def test_one_line_for_an_existing_output_without_a_tokenizer(tmp_path):
    """No warning goes before the error."""
    bare = shutil.copytree(SHIPPED, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "out").mkdir()
    refused(call("export-onnx", bare, "--output", tmp_path / "out"), "out", "exists")


def test_prompt_from_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("caption en\n")
    from_file = answer("run-onnx", EXAMPLE, f"@{tmp_path / 'prompt.txt'}")
    assert from_file["tokens"] == answer("run-onnx", EXAMPLE, "caption en")["tokens"]


def test_prompt_files_of_other_editors(tmp_path):
    """A byte order mark, carriage returns at the end, and line breaks that a shell left in PROMPT are no part of it."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfcaption en\r\n\r\n")
    assert (
        cli.read_prompt(f"@{file}") == cli.read_prompt("caption en\n") == cli.read_prompt("caption en") == "caption en"
    )
    file.write_bytes(b"caption\r\nen")
    assert cli.read_prompt(f"@{file}") == "caption\nen"
    file.write_bytes("caption en".encode("utf-16"))
    with pytest.raises(PaliGemmaError, match="not UTF-8; save it as UTF-8"):
        cli.read_prompt(f"@{file}")


@pytest.mark.parametrize(("argument", "prompt"), [("@@home", "@home"), ("@@", "@"), ("@@@", "@@"), ("a@b", "a@b")])
def test_prompts_that_begin_with_an_at(argument, prompt):
    assert cli.read_prompt(argument) == prompt


def test_an_at_that_names_no_file(tmp_path):
    with pytest.raises(PaliGemmaError, match="@ names no file"):
        cli.read_prompt("@")
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(PaliGemmaError, match=f"cannot read the prompt .* is asked as @@{absent}"):
            cli.read_prompt(f"@{absent}")


@pytest.mark.parametrize("command", ENGINES)
def test_picture_tokens_in_front_are_warned_of_once(command):
    result = call(command, EXAMPLE, "<image><bos>caption en", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["text"]
    (line,) = result.stderr.splitlines()
    assert "warning: the prompt begins with <image>" in line
    assert "leave it out" in line
    assert call(command, EXAMPLE, "caption en").stderr == ""


def test_control_tokens_stay_text():
    """A prompt that spells control tokens is longer than one that does not; it has one picture, one bos."""
    from numpy_ref.checkpoint import load_config
    from numpy_ref.tokenizer import Tokenizer

    config = load_config(SHIPPED)
    tokenizer = Tokenizer.load(SHIPPED, config)
    prompt = tokenizer.prompt("<image><bos><eos><pad> caption <loc0005>")
    assert prompt.count(config.image_token) == config.vision.patches
    assert [prompt.count(token) for token in (config.bos, config.eos, config.pad)] == [1, 0, 0]
    assert tokenizer.content["<loc0005>"] in prompt


def test_drawing(tmp_path):
    result = call("run-onnx", EXAMPLE, "detect star", "--draw", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out.png") as drawing:
        assert drawing.width >= 448
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_a_drawing_of_a_thread_of_a_picture(tmp_path):
    """Once 450 x 450,036 pixels, in 14 s and 1.8 GB."""
    Image.new("RGB", (3, 3000), "red").save(tmp_path / "thread.png")
    result = call("run-onnx", tmp_path / "thread.png", "detect star", "--draw", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out.png") as drawing:
        assert drawing.width == 448
        assert drawing.height < 4000


@pytest.mark.parametrize("name", ["out.png", "out", "out.webp"])
def test_what_a_killed_process_left_beside_a_drawing_goes(tmp_path, name):
    """Its name says whose it is."""
    code = (
        "import os, signal, sys; from pathlib import Path; from numpy_ref.cli.drawing import write_drawing\n"
        "class Slow:\n    def save(self, file, kind=None):\n        Path(file).write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_drawing(Path(sys.argv[1]), Slow())"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)])
    assert ended.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name != name
    write_drawing(tmp_path / name, Image.new("RGB", (3, 3)))
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o000])
def test_what_is_written_is_as_the_umask_wants_it(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_drawing(tmp_path / "out.png", Image.new("RGB", (3, 3)))
        with files.new_directory(tmp_path / "above" / "folder") as folder:
            (folder / "file").touch()
        with files.new_file(tmp_path / "file") as file:
            file.touch()
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders = dict.fromkeys(("above", "above/folder"), 0o777 & ~mask)
    assert modes == folders | dict.fromkeys(("out.png", "above/folder/file", "file"), 0o666 & ~mask)


@pytest.mark.parametrize(("command", "option"), [*((engine, "--draw") for engine in ENGINES), ("numpy", "--heatmap")])
def test_a_drawing_is_refused_before_the_model_runs(tmp_path, command, option):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for place, words in {
        "absent/out.png": ["there is no folder", "absent"],
        "file/out.png": ["there is no folder"],
        "folder.png": ["this is a folder"],
        "out.xyz": ["drawings are written as PNG, JPEG"],
        "out.pdf": ["drawings are written as"],
    }.items():
        refused(call(command, tmp_path / "no model", EXAMPLE, "caption en", option, tmp_path / place), place, *words)
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_folder_that_takes_no_drawing(tmp_path, monkeypatch):
    """The temporary file is not what a user named."""

    def refuse(*_, dir, **__):
        raise PermissionError(13, "Permission denied", f"{dir}/tmpabcdef.png")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PaliGemmaError) as refusal:
        check_drawing(tmp_path / "out.png")
    assert str(refusal.value) == f"{tmp_path / 'out.png'}: cannot write the drawing (Permission denied)"
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PaliGemmaError) as refusal:
        write_drawing(tmp_path / "out.png", Image.new("RGB", (3, 3)))
    assert "tmpabcdef" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.webp", "out.tiff", "out"])
def test_drawings_of_every_kind(tmp_path, name):
    check_drawing(tmp_path / name)
    write_drawing(tmp_path / name, Image.new("RGB", (30, 20), "red"))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as drawing:
        assert drawing.size == (30, 20)


def test_a_mask_by_every_command(tmp_path):
    """`segment` gives the same box, codes and painted mask everywhere, and a drawing that shows it."""
    found, scores, sides = [answer(command, EXAMPLE, f"segment {SUBJECT}") for command in ENGINES], [], []
    for each in found:
        (mask,) = each["masks"]
        assert mask["label"] == SUBJECT
        assert len(mask["codes"]) == 16
        assert sum(mask["counts"]) == mask["size"][0] * mask["size"][1] == 224 * 224
        inside = sum(mask["counts"][1::2])
        assert 0.3 < inside / ((mask["x2"] - mask["x1"]) * (mask["y2"] - mask["y1"])) < 1
        scores.append([mask.pop(name) for name in ("score", "mask_score")])
        assert scores[-1] == pytest.approx(scores[0], abs=1e-4)  # engines round differently
        sides.append(mask.pop("uncertainty"))
        assert sides[-1] == pytest.approx(sides[0], rel=1e-3)
        assert each["masks"] == found[0]["masks"]
    result = call("run-onnx", EXAMPLE, f"segment {SUBJECT}", "--draw", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out.png") as drawing, Image.open(EXAMPLE) as picture:
        zoomed = np.asarray(picture.convert("RGB").resize((448, 448), Image.Resampling.NEAREST)).astype(int)
        changed = np.abs(np.asarray(drawing.convert("RGB"))[:448] - zoomed).max(-1) > 30
    assert changed.mean() > 0.5 * inside / 224**2


def test_verify_prints_and_keeps_the_table(tmp_path):
    result = call("export-onnx", "--output", tmp_path / "out", "--verify")
    assert result.returncode == 0, result.stderr
    description = json.loads((tmp_path / "out" / "bundle.json").read_text())
    rows = description["parity"]
    assert {row["stage"] for row in rows} == {"prefill", "decode", "extend", "end to end", "example"}
    assert all(row["error"] <= row["budget"] for row in rows)
    assert "text.blocks.0" in result.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*description["files"], "bundle.json"}


# --- bad input ---------------------------------------------------------------------------------------------


def refused(result, *words):
    """Exit code 1 or 2, one line that has the words, no traceback."""
    assert result.returncode in (1, 2), result.stderr
    assert not result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def broken(tmp_path):
    """A copy of the shipped checkpoint to break."""
    return shutil.copytree(SHIPPED, tmp_path / "checkpoint")


def edit(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize("command", ["export-onnx", "numpy", "torch"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), ["missing", NORM]),
        (lambda t: t.update(extra=np.ones(3, np.float32)), ["unexpected", "extra", "[3]"]),
        (lambda t: t.update({NORM: np.ones(5, np.float32)}), [NORM, "[5]", "[128]"]),
        (lambda t: t.update({NORM: t[NORM].astype(np.int8)}), [NORM, "I8", "quantized"]),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_broken_tensors(broken, tmp_path, command, change, words):
    edit(broken, change)
    if command == "export-onnx":
        refused(call(command, broken, "--output", tmp_path / "out"), *words)
    else:
        refused(call(command, broken, EXAMPLE, "caption en"), *words)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint"}


def test_truncated_checkpoint(broken, tmp_path):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(call("export-onnx", broken, "--output", tmp_path / "out"), "model.safetensors", "not a whole")
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint"}


def test_existing_output(tmp_path):
    (tmp_path / "out").mkdir()
    refused(call("export-onnx", "--output", tmp_path / "out"), "out", "exists")
    assert not list((tmp_path / "out").iterdir())


def test_missing_output_option():
    assert call("export-onnx").returncode == 2


@pytest.mark.parametrize("command", ENGINES)
def test_not_a_picture(tmp_path, command):
    (tmp_path / "text.png").write_text("hello")
    refused(call(command, tmp_path / "text.png", "caption en"), "text.png", "not a picture")
    refused(call(command, tmp_path / "absent.png", "caption en"), "absent.png", "no such")


def test_truncated_picture(tmp_path):
    (tmp_path / "half.png").write_bytes(EXAMPLE.read_bytes()[:-400])
    refused(call("run-onnx", tmp_path / "half.png", "caption en"), "half.png", "broken")


@pytest.mark.parametrize("command", ENGINES)
def test_empty_prompt(tmp_path, command):
    (tmp_path / "empty.txt").write_text("\n")
    refused(call(command, EXAMPLE, f"@{tmp_path / 'empty.txt'}"), "empty.txt is empty")
    refused(call(command, EXAMPLE, " "), "prompt is empty")


def test_capacity_too_small(bundle, tmp_path):
    refused(call("run-onnx", bundle, EXAMPLE, "caption en " * 30), "exceeds the capacity of 100")
    refused(call("run-onnx", bundle, EXAMPLE, "caption en", "--max-new-tokens", "90"), "exceeds the capacity of 100")
    refused(call("export-onnx", "--output", tmp_path / "out", "--max-length", "12"), "--max-length 12", "from 67")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["weights.bin", "decode.onnx", "tokenizer.model"])
def test_damaged_bundle(bundle, tmp_path, file):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    contents = bytearray((copy / file).read_bytes())
    contents[len(contents) // 2] ^= 1
    (copy / file).write_bytes(contents)
    refused(call("run-onnx", copy, EXAMPLE, "caption en"), file, "SHA-256")
    (copy / file).write_bytes(contents[:-1])
    refused(call("run-onnx", copy, EXAMPLE, "caption en"), file, "bytes")
    (copy / file).unlink()
    refused(call("run-onnx", copy, EXAMPLE, "caption en"), file, "missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, ["version 99"]),
        ({"format": "something"}, ["does not describe"]),
        ({"files": {}}, ["no checksum"]),
        ({"config": {}}, ["model_type"]),
        ({"max_length": None}, ["damaged"]),
    ],
    ids=["version", "format", "files", "config", "max_length"],
)
def test_wrong_description(bundle, tmp_path, change, words):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    description = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(description | change))
    refused(call("run-onnx", copy, EXAMPLE, "caption en"), *words)


def test_not_a_bundle(tmp_path):
    refused(call("run-onnx", tmp_path, EXAMPLE, "caption en"), "bundle.json is missing")
    refused(call("run-onnx", tmp_path / "absent", EXAMPLE, "caption en"), "no such bundle")
    refused(call("numpy", tmp_path / "absent", EXAMPLE, "caption en"), "no such checkpoint")


def test_cuda_is_never_assumed():
    """Where no device answers, auto is quiet and takes the CPU, and cuda says what is missing."""
    from export.session import cuda

    quiet = call("run-onnx", EXAMPLE, "caption en", "--provider", "auto")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    if cuda.device_count() == 0:
        refused(call("run-onnx", EXAMPLE, "caption en", "--provider", "cuda"), "--provider cuda", "onnxruntime-gpu")


@pytest.mark.parametrize(
    "options",
    [["--temperature", "-1"], ["--top-p", "2"], ["--top-k", "x"], ["--max-new-tokens", "0"], ["extra", "more"]],
)
def test_bad_options(options):
    result = call("run-onnx", EXAMPLE, "caption en", *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert not result.stdout


# --- transparency ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ENGINES)
def test_transparency_is_an_option(tmp_path, command):
    """A picture whose dark parts are transparent: on white it is another than without its alpha."""
    pixels = np.asarray(Image.open(EXAMPLE).convert("RGBA")).copy()
    pixels[:, :, 3] = np.where(pixels[:, :, :3].max(-1) > 128, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    found = {}
    for how in ("white", "drop"):
        open_image(tmp_path / "clear.png", how).save(tmp_path / f"{how}.png")
        found[how] = answer(command, tmp_path / "clear.png", "caption en", "--transparency", how)["tokens"]
        assert found[how] == answer(command, tmp_path / f"{how}.png", "caption en")["tokens"]
    assert found["white"] != found["drop"]


@pytest.mark.parametrize("option", ["--draw", "--heatmap"])
def test_the_picture_itself_is_not_drawn_over(tmp_path, option):
    picture = shutil.copy(EXAMPLE, tmp_path / "picture.png")
    before = picture.read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    for target in (picture, tmp_path / "link.png"):
        result = call("numpy", picture, "caption en", option, target)
        assert (result.returncode, result.stdout) == (1, "")
        assert "this is the picture itself; name another file for the drawing" in result.stderr
    assert picture.read_bytes() == before
