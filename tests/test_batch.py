"""run-onnx-batch: the answers of run-onnx, each row once, whatever the batches, the workers and the kills."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from export import batch, bundle, cli
from export.batch import dataset
from export.benchmark import batch as measure_batch
from numpy_ref import scenes
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer

COMMAND = [sys.executable, "-c", "from export.cli import batch_main; batch_main()"]
PROMPTS = ["caption en", "detect star", "answer en how many shapes are there?", "segment {}", None]
COUNT = 15
DRAWN = ["--temperature", "1.5", "--top-p", "0.95", "--seed", "7", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A JSONL file: pictures of unequal sizes, prompts of unequal lengths, every fifth row without one."""
    folder = tmp_path_factory.mktemp("rows")
    asked = []
    for i in range(COUNT):
        scene = scenes.random_scene(np.random.default_rng([3, i]))
        scene.draw(100 + 9 * i).save(folder / f"{i:02}.png")
        prompt = (PROMPTS[i % len(PROMPTS)] or "").format(scene.things[0].shape)
        asked.append({"image": f"{i:02}.png"} | ({("prompt", "prefix")[i % 2]: prompt} if prompt else {}))
    file = folder / "rows.jsonl"
    write(file, asked)
    return file


def write(file, rows):
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def arguments(source, output, *options, prompt="detect cross"):
    """One thread: tests run side by side."""
    usual = ["--provider", "cpu", "--threads", "1"]
    return ["--input", str(source), "--output", str(output), "--prompt", prompt, *usual, *options]


def answer(source, output, *options, **prompt):
    """The answers that the command writes."""
    assert run("run-onnx-batch", cli.run_onnx_batch, arguments(source, output, *options, **prompt)) == 0
    assert not list(output.parent.glob(f"{output.name}.part*"))
    return read(output)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def alike(found, expected):
    """Whether rows are the same, but for the rounding of numbers that tell how likely tokens were."""

    def without(rows):
        unknown = {"score": None, "mask_score": None, "uncertainty": None}
        return [row | {"logprobs": None, "boxes": [{**box, **unknown} for box in row["boxes"]]} for row in rows]

    def numbers(rows):
        scores = ("score", "mask_score")
        boxes = [box[name] for row in rows for box in row["boxes"] for name in scores if name in box]
        return [*boxes, *(logprob for row in rows for logprob in row["logprobs"])]

    def pixels(rows):
        return [side for row in rows for box in row["boxes"] for side in box["uncertainty"]]

    return (
        without(found) == without(expected)
        and numbers(found) == pytest.approx(numbers(expected), abs=1e-4)
        and pixels(found) == pytest.approx(pixels(expected), rel=1e-3, abs=1e-3)
    )


def refused(capsys, source, output, *options, **prompt):
    """The one line that the command stops with."""
    capsys.readouterr()
    assert run("run-onnx-batch", cli.run_onnx_batch, arguments(source, output, *options, **prompt)) == 1
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


@pytest.fixture(scope="module")
def greedy(rows, tmp_path_factory):
    return answer(rows, tmp_path_factory.mktemp("greedy") / "out.jsonl", "--batch-size", "4")


@pytest.fixture(scope="module")
def drawn(rows, tmp_path_factory):
    return answer(rows, tmp_path_factory.mktemp("drawn") / "out.jsonl", "--batch-size", "4", *DRAWN)


# --- what is answered --------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_run_onnx(rows, greedy, capsys):
    for i, (result, asked) in enumerate(zip(greedy, read(rows), strict=True)):
        prompt = asked.get("prompt") or asked.get("prefix") or "detect cross"
        capsys.readouterr()
        assert run("run-onnx", cli.run_onnx, [str(rows.parent / asked["image"]), prompt, "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        head = {"row": i, "image": asked["image"], "prompt": prompt}
        assert list(result) == [*head, "text", "tokens", "logprobs", "boxes"]
        assert alike([result], [head | {name: alone[name] for name in ("text", "tokens", "logprobs", "boxes")}])
    assert any(result["boxes"] for result in greedy)
    assert any("codes" in box for result in greedy for box in result["boxes"])


@pytest.mark.parametrize("options", [["--batch-size", "1"], ["--batch-size", "64"], ["--workers", "2", "--batch-size", "3"]])  # fmt: skip
def test_batches_and_workers_change_nothing(rows, greedy, drawn, tmp_path, options):
    assert alike(answer(rows, tmp_path / "drawn.jsonl", *options, *DRAWN), drawn)
    if "--workers" not in options:
        assert alike(answer(rows, tmp_path / "greedy.jsonl", *options), greedy)


def test_each_row_draws_for_itself(greedy, drawn, rows, tmp_path):
    assert drawn != greedy
    assert answer(rows, tmp_path / "out.jsonl", *DRAWN, "--seed", "8") != drawn
    same = tmp_path / "same.jsonl"
    write(same, [{"image": str(SHIPPED / "example.png")}] * 4)
    results = answer(same, tmp_path / "out2.jsonl", *DRAWN, prompt="caption en")
    assert len({tuple(each["tokens"]) for each in results}) > 1


def test_a_folder_is_asked_one_prompt(rows, greedy, tmp_path):
    results = answer(rows.parent, tmp_path / "out.jsonl", prompt="caption en")
    assert [each["image"] for each in results] == [f"{i:02}.png" for i in range(COUNT)]
    assert alike([results[i] for i in range(0, COUNT, len(PROMPTS))], greedy[:: len(PROMPTS)])


def test_parquet_holds_the_pictures_themselves(rows, greedy, tmp_path):
    asked = read(rows)
    pictures = [{"bytes": (rows.parent / row["image"]).read_bytes(), "path": row["image"]} for row in asked]
    prompts = [row.get("prompt") or row.get("prefix") for row in asked]
    pq.write_table(pa.table({"image": pictures, "prompt": prompts}), tmp_path / "rows.parquet", row_group_size=4)
    assert answer(tmp_path / "rows.parquet", tmp_path / "out.jsonl", "--batch-size", "4") == greedy


def test_answers_stop_where_the_model_does(tmp_path, rows):
    """Beside a long prompt, which leaves room for few tokens, a short one has its full answer."""
    file = tmp_path / "rows.jsonl"
    limit = bundle.shipped().max_length
    tokenizer = batch.Tokenizer.load(SHIPPED, bundle.shipped().config)
    long = "answer en " + "star " * 200
    while len(tokenizer.prompt(long)) > limit - 3:
        long = long.removesuffix("star ")
    prompts = (long, "caption en", long + "star " * 9)
    write(file, [{"image": str(rows.parent / "00.png"), "prompt": prompt} for prompt in prompts])
    results = answer(file, tmp_path / "out.jsonl", "--temperature", "5")  # hot, so that nothing ends early
    alone = answer(file, tmp_path / "alone.jsonl", "--temperature", "5", "--batch-size", "1")
    assert alike(results[:2], alone[:2])
    assert results[2] == alone[2]
    assert 0 < len(results[0]["tokens"]) <= limit - len(tokenizer.prompt(long)) + 1 < len(results[1]["tokens"])
    assert "exceeds the capacity" in results[2]["error"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_picture_tokens_in_front_are_warned_of_once(rows, tmp_path, capsys, workers):
    file, image = tmp_path / "rows.jsonl", str(rows.parent / "00.png")
    write(file, [{"image": image, "prompt": prompt} for prompt in ("caption en", *["<image>caption en"] * 5)])
    found = answer(file, tmp_path / "out.jsonl", "--batch-size", "2", "--workers", workers)
    assert found[0]["tokens"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("run-onnx-batch: warning: row 1: the prompt begins with <image>")


def test_a_default_prompt_is_read_as_run_onnx_reads_it(rows, tmp_path, capsys):
    prompt, file = tmp_path / "prompt.txt", tmp_path / "rows.jsonl"
    prompt.write_bytes(b"\xef\xbb\xbfcaption en\r\n")
    write(file, [{"image": str(rows.parent / "00.png")}])
    found = [
        answer(file, tmp_path / f"{i}.jsonl", prompt=given)
        for i, given in enumerate(["caption en", "caption en\n", f"@{prompt}"])
    ]
    assert found[0] == found[1] == found[2]
    assert capsys.readouterr().out.splitlines()[-1].endswith(": 1 row")


def test_flat_boxes_are_in_the_rows(rows, monkeypatch, tmp_path):
    """None is left out in silence: here the model says one."""
    text = "<loc0100><loc0200><loc0100><loc0300> thin ; <loc0300><loc0300><loc0200><loc0200> turned"
    monkeypatch.setattr(batch.Tokenizer, "decode", lambda self, ids: text)
    file = tmp_path / "rows.jsonl"
    write(file, [{"image": str(rows.parent / "00.png")}])
    (found,) = answer(file, tmp_path / "out.jsonl")
    assert [box["label"] for box in found["boxes"]] == ["thin", "turned"]
    assert found["boxes"][0]["y1"] == found["boxes"][0]["y2"]


def test_a_worker_short_of_memory_says_so(monkeypatch):
    """In a process of its own it cannot raise what the first would catch."""

    def short(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    sent = []
    monkeypatch.setattr(batch, "Worker", short)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    batch._work(SimpleNamespace(send=sent.append), None, 1)
    (error,) = sent
    assert isinstance(error, PaliGemmaError)
    assert "not enough memory (Unable to allocate 9 TiB)" in str(error)


def test_bad_rows_are_reported_and_stop_nothing(rows, greedy, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "half.png").write_bytes((SHIPPED / "example.png").read_bytes()[:-400])
    good = {"image": str(rows.parent / "00.png"), "prompt": "caption en"}
    bad = {
        "not a picture": {"image": "text.png"}, "broken": {"image": "half.png"}, "no such picture": {"image": "absent.png"},
        "has no picture": {"image": None}, "has no picture ": {"image": 7}, "no such picture ": {"image": "\0"},
        "cannot be read": {"image": "a" * 5000}, "has no prompt": good | {"prompt": " "}, "has no prompt ": good | {"prompt": 3},
        "exceeds the capacity": good | {"prompt": "star " * 900}, "not valid Unicode": good | {"prompt": "\ud800"},
    }  # fmt: skip
    asked = [each for row in bad.values() for each in (row, good)]
    file = tmp_path / "rows.jsonl"
    write(file, asked)
    results = answer(file, tmp_path / "out.jsonl", "--batch-size", "5")
    assert f"{2 * len(bad)} rows, {len(bad)} of them errors" in capsys.readouterr().out
    assert [each["row"] for each in results] == list(range(len(asked)))
    for words, each in zip(bad, results[::2], strict=True):
        assert each.keys() == {"row", "image", "prompt", "error"}
        assert words.strip() in each["error"]
    for each in results[1::2]:
        assert each["tokens"] == greedy[0]["tokens"]


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), ValueError("odd"), KeyError("x")])
@pytest.mark.parametrize("step", ["look", "as_json", "prefill"])
def test_no_row_ends_the_run(rows, greedy, tmp_path, monkeypatch, error, step):
    """Whatever is raised while the third row is prepared, asked or spelled is that row's error alone."""
    with Image.open(rows.parent / "02.png") as picture:
        width = picture.width
    ids = Tokenizer.load(bundle.shipped().path, bundle.shipped().config).prompt(greedy[2]["prompt"])

    def breaks(owner, name, is_third):
        original = getattr(owner, name)

        def broken(*arguments, **options):
            if is_third(*arguments):
                raise error
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, broken)

    if step == "look":
        breaks(batch.answering, "look", lambda engine, image: image.width == width)
    elif step == "as_json":
        breaks(batch.answering.Answer, "as_json", lambda answer: answer.width == width)
    else:
        breaks(batch.answering, "generate", lambda engine, pixels, prompts, *rest: ids in prompts)
    few = tmp_path / "rows.jsonl"
    write(few, [row | {"image": str(rows.parent / row["image"])} for row in read(rows)[:5]])
    results = answer(few, tmp_path / "out.jsonl", "--batch-size", "4")
    assert ["error" in each for each in results] == [i == 2 for i in range(5)]
    assert [each["tokens"] for each in results if "error" not in each] == [greedy[i]["tokens"] for i in (0, 1, 3, 4)]


def test_text_of_a_parquet_row_that_is_not_utf8(rows, greedy, tmp_path):
    picture = (rows.parent / "00.png").read_bytes()
    prompts = pa.array([b"caption en", b"\xff\xfe", b"caption en"], pa.binary()).view(pa.string())
    table = pa.table({"image": [picture] * 3, "prompt": prompts})
    pq.write_table(table, tmp_path / "rows.parquet")
    results = answer(tmp_path / "rows.parquet", tmp_path / "out.jsonl")
    assert ["error" in each for each in results] == [False, True, False]
    assert "row 1 cannot be read" in results[1]["error"]
    assert results[2]["tokens"] == greedy[0]["tokens"]


def test_the_exit_code_tells_of_errors_where_it_is_asked_to(rows, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for failed, options, code in ((True, ["--fail-on-error"], 3), (True, [], 0), (False, ["--fail-on-error"], 0)):
        image = "absent.png" if failed else str(rows.parent / "00.png")
        write(file, [{"image": image}])
        output = tmp_path / f"{code}{len(options)}{failed}.jsonl"
        assert run("run-onnx-batch", cli.run_onnx_batch, arguments(file, output, *options)) == code
        assert output.exists()


@pytest.mark.parametrize("limit", [0, 100, 700])
def test_a_disk_that_fills_up(rows, tmp_path, limit):
    """One line; what is left is what the next run goes on from, or nothing."""
    bundle.shipped()
    output = tmp_path / "out" / "out.jsonl"
    output.parent.mkdir()
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from export.cli import batch_main; batch_main()"
    )
    command = [sys.executable, "-c", code, *arguments(rows, output, "--batch-size", "2")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "cannot be written (File too large)" in line
    assert "part" in line or "out.jsonl" in line
    left = {file.name: file.stat().st_size for file in output.parent.iterdir()}
    assert not left or left["out.jsonl.part"] > 0
    answer(rows, output, "--batch-size", "2")
    assert [file.name for file in output.parent.iterdir()] == ["out.jsonl"]


def test_progress_is_for_terminals(rows, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        answer(rows, tmp_path / f"{shown}.jsonl")
        assert (f"{COUNT}/{COUNT} [" in stream.getvalue()) == shown
        assert ("pictures/s" in stream.getvalue()) == shown


def test_what_a_folder_has_besides_pictures_is_named(tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for name in ["b.xcf", "c.XCF", "notes.txt"]:
        (tmp_path / name).write_bytes(b"x")
    answer(tmp_path, tmp_path / "out.jsonl")
    assert (
        "run-onnx-batch: warning: 3 files left out, by their endings not pictures that can be read: 2 .xcf, 1 .txt "
        "(b.xcf, c.XCF, notes.txt)\n"
    ) in capsys.readouterr().err


# --- killed and started again ------------------------------------------------------------------------------


def begin(source, output, *options):
    return subprocess.Popen([*COMMAND, *arguments(source, output, *options)], stderr=subprocess.PIPE, text=True)


def wait_for(what, seconds=120):
    """Wait until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def lines(file):
    """How many whole lines a file has; 0 if there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def children(pid):
    """The processes that a process started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def many(rows, tmp_path_factory):
    """The rows six times, and their answers in one go."""
    file = rows.parent / "many.jsonl"
    file.write_text(rows.read_text() * 6)
    return file, answer(file, tmp_path_factory.mktemp("many") / "out.jsonl", *DRAWN, "--batch-size", "8")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_started_again(many, tmp_path, workers, capsys):
    file, expected = many
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = begin(file, output, *DRAWN, "--workers", workers, "--batch-size", "2")
    wait_for(lambda: lines(part) >= 16)
    others = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(is_running, others)))
    assert not output.exists()
    kept = read(part)
    assert alike(kept, expected[: len(kept)])
    assert 0 < len(kept) < len(expected)
    with part.open("a") as stream:
        stream.write('{"row": ')  # cut off in the middle of a line
    capsys.readouterr()
    assert alike(answer(file, output, *DRAWN, "--batch-size", "8"), expected)
    resumed = int(capsys.readouterr().err.split("going on from row ")[1].split()[0])
    assert len(kept) - 8 < resumed <= len(kept)


def test_interrupted_it_ends_without_a_word(many, tmp_path):
    file, expected = many
    output = tmp_path / "out.jsonl"
    process = begin(
        file, output, *DRAWN, "--workers", "2", "--batch-size", "2"
    )  # small ones: many come after the first
    wait_for(lambda: lines(tmp_path / "out.jsonl.part"))
    others = children(process.pid)
    for pid in (process.pid, *others):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    wait_for(lambda: not any(map(is_running, others)))
    kept = read(tmp_path / "out.jsonl.part")
    assert alike(kept, expected[: len(kept)])


def test_a_worker_that_is_killed(rows, greedy):
    job = batch.Job(dataset.open_dataset(rows, "detect cross"), bundle.shipped(), "detect cross", provider="cpu")
    with batch.workers(job, 2) as answers:
        results = answers(range(0, COUNT, 2), 2)
        victim = answers.args[0][1].process
        os.kill(victim.pid, signal.SIGSTOP)  # or it might be ahead of its turn, and done
        assert alike(json.loads(json.dumps(next(results))), greedy[:2])
        victim.kill()
        victim.join()
        with pytest.raises(PaliGemmaError, match=r"a worker stopped \(exit code -9\); the same command again goes on"):
            list(results)


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ("", 6), ('{"row": 6', 6), ('{"row": 6, "text"\n{"row": 7}\n', 6), ('{"row": 6}\n{"row": 7}', 6),
        ('{"row": 6}\n{"row": 7}\n', 8), ('{"row": 6}\n{"row": 7}\n{"row": 8, "error": ""}\n', 9), ('{"row": 7}\n' * 2, 6),
        ('{"row": 5}\n' * 2, 6), ("\0" * 40, 6), ("[]\n7\n", 6), ('{"row": 6}\n{"row": 7}\n{"row": 8}\n{"row": 9}\n', 9),
        ("\udcff\n", 6),
    ],
)  # fmt: skip
def test_what_is_kept_of_a_work_file(tmp_path, tail, kept):
    """Whole batches from the first on (of two here), and the last, which is shorter (of nine rows)."""
    head = "".join(f"{json.dumps({'row': i} | ({'error': ''} if i == 1 else {}))}\n" for i in range(6))
    (tmp_path / "out.part").write_bytes((head + tail).encode("utf-8", "surrogateescape"))
    (tmp_path / "out.part.json").write_text('{"a": 1}')
    with batch.work_file(tmp_path / "out", {"a": 1}) as work:
        assert work.keep(9, 2) == work.rows == kept
        assert work.errors == 1 + (kept == 9 and "error" in tail)
        if kept < 9:
            work.write([{"row": i} for i in range(kept, 9)])
        work.finish(9)
    assert [each["row"] for each in read(tmp_path / "out")] == list(range(9))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def stopped(rows, folder, *options):
    """A work file as a kill leaves it behind, three rows in."""
    folder.mkdir()
    output = folder / "out.jsonl"
    answer(rows, folder / "whole.jsonl", *options)
    prompt = "detect cross"
    job = batch.Job(dataset.open_dataset(rows, prompt), bundle.shipped(), prompt, provider="cpu")
    with batch.work_file(output, job.settings()) as work:
        work.write(read(folder / "whole.jsonl")[:3])
    return output


@pytest.mark.parametrize(
    ("options", "prompt", "named"),
    [
        (["--temperature", "0.5"], "detect cross", "another temperature;"), (["--seed", "1"], "detect cross", "another seed;"),
        (["--max-new-tokens", "3", "--top-k", "2"], "detect cross", "another max-new-tokens, top-k;"),
        ([], "detect star", "another prompt;"), (["--transparency", "drop"], "detect cross", "another transparency;"),
    ],
)  # fmt: skip
def test_other_options_are_refused(rows, tmp_path, capsys, options, prompt, named):
    output = stopped(rows, tmp_path / "work")
    before = (tmp_path / "work" / "out.jsonl.part").read_bytes()
    assert named in refused(capsys, rows, output, *options, prompt=prompt)
    assert (tmp_path / "work" / "out.jsonl.part").read_bytes() == before
    assert len(answer(rows, output, "--batch-size", "2", "--threads", "2")) == COUNT  # these may be others


def test_a_changed_input_is_refused(rows, tmp_path, capsys):
    copy = shutil.copytree(rows.parent, tmp_path / "rows")
    output = stopped(copy / "rows.jsonl", tmp_path / "work")
    with (copy / "rows.jsonl").open("a") as stream:
        stream.write('{"image": "00.png"}\n')
    assert "another input;" in refused(capsys, copy / "rows.jsonl", output)
    (tmp_path / "work" / "out.jsonl.part.json").unlink()
    assert "out.jsonl.part.json is missing, so it cannot go on" in refused(capsys, rows, output)


def test_two_at_once_are_refused(rows, tmp_path, capsys):
    with (tmp_path / "out.jsonl.part").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is at work" in refused(capsys, rows, tmp_path / "out.jsonl")


def test_an_output_is_never_overwritten(rows, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists already" in refused(capsys, rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_rows_that_are_lost_are_noticed(tmp_path):
    with batch.work_file(tmp_path / "out", {}) as work:
        work.write([{"row": 0}])
        with pytest.raises(PaliGemmaError, match="1 answer to 2 rows"):
            work.finish(2)
    assert not (tmp_path / "out").exists()


# --- what cannot be done -----------------------------------------------------------------------------------


def test_nothing_is_left_where_nothing_was_answered(rows, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise PaliGemmaError("the session does not open")

    monkeypatch.setattr(batch, "make", fail)
    assert "does not open" in refused(capsys, rows, tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_session_that_does_not_open(rows, tmp_path, capsys, workers):
    copy = shutil.copytree(bundle.shipped().path, tmp_path / "bundle")
    graph = copy / "decode.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    description = json.loads((copy / "bundle.json").read_text())
    description["files"]["decode.onnx"]["sha256"] = bundle.sha256(graph)
    (copy / "bundle.json").write_text(json.dumps(description))
    line = refused(capsys, rows, tmp_path / "out.jsonl", "--workers", workers, str(copy))
    assert "decode.onnx: ONNX Runtime cannot load or run it" in line
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_a_model_that_fails_names_its_rows(rows, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("bad allocation")
        yield

    monkeypatch.setattr(batch.answering, "generate", fail)
    line = refused(capsys, rows, tmp_path / "out.jsonl", "--batch-size", "4")
    assert "rows 0 to 3: the model failed (bad allocation)" in line
    assert "--batch-size" in line


def test_a_missing_package_is_named(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "(the extra `ray`): pip install 'ray[data]'" in refused(
        capsys, rows, tmp_path / "out.jsonl", "--engine", "ray"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--batch-size", "0"], ["--workers", "x"], ["--engine", "spark"], ["a", "b"]])
def test_bad_options(rows, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run_onnx_batch(arguments(rows, tmp_path / "out.jsonl", *options))
    assert exit_.value.code == 2


# --- leaves ------------------------------------------------------------------------------------------------


def test_one_ahead_and_no_more():
    started, seen = [], []

    def double(number):
        started.append(number)
        return 2 * number

    for result in batch.one_ahead(double, range(5)):
        seen.append(result)
        assert len(started) <= len(seen) + 1  # pictures never pile up
    assert seen == [0, 2, 4, 6, 8]
    assert list(batch.one_ahead(double, [])) == []


def test_one_ahead_is_at_work_meanwhile():
    started = threading.Event()

    def work(number):
        if number:
            started.set()
        return number

    for number in batch.one_ahead(work, range(2)):
        if number == 0:
            assert started.wait(30)


def test_measures(tmp_path):
    file = measure_batch.repeated(tmp_path, SHIPPED / "example.png", 4)
    job = batch.Job(
        dataset.open_dataset(file, "caption en"), bundle.shipped(), "caption en", 2, Sampling(), provider="cpu"
    )
    speeds = measure_batch.measure(job, [1, 4], [1], rounds=1, threads=1)
    assert speeds.keys() == {(1, 1), (1, 4)}
    assert all(speed > 0 for speed in speeds.values())
    assert (
        measure_batch.table({(1, 1): 2.5, (1, 4): 10.0}, [1, 4], [1])
        == "pictures/s     batch 1   batch 4\n1 worker          2.50     10.00"
    )


# --- several pictures in a row -----------------------------------------------------------------------------


WRONG = [
    "row 9 has no picture: an empty list", "absent.png: no such picture", "row 11 has no picture: neither a path",
    "99 pictures take 6336 positions, more than the 256",
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(rows):
    """Rows of one, two and three pictures in turn, some of them that cannot be asked."""
    asked = []
    for i in range(9):
        names = [f"{(i + j) % COUNT:02}.png" for j in range(1 + i % 3)]
        asked.append({"image": names if i % 2 else names[0], "prompt": PROMPTS[i % 2]})
    asked += [{"image": image} for image in ([], ["00.png", "absent.png"], ["00.png", 7], ["00.png"] * 99)]
    file = rows.parent / "mixed.jsonl"
    write(file, asked)
    return file


def test_rows_of_several_pictures(mixed, tmp_path):
    """In order, each once, the same in any batch; one picture in a list is one picture."""
    found, asked = answer(mixed, tmp_path / "eight.jsonl"), read(mixed)
    assert [each["row"] for each in found] == list(range(13))
    named = [row["image"] for row in asked]
    named[11] = ["00.png", None]
    assert [each["image"] for each in found] == named
    assert all(each["text"] for each in found[:9])
    for each, words in zip(found[9:], WRONG, strict=True):
        assert words in each["error"]
    alone = answer(mixed, tmp_path / "one.jsonl", "--batch-size", "1")
    assert alike(alone[:9], found[:9])
    assert alone[9:] == found[9:]
    write(mixed.parent / "lists.jsonl", [{**row, "image": [row["image"]]} for row in asked[:9:6]])
    lists = answer(mixed.parent / "lists.jsonl", tmp_path / "lists.out")
    assert [each["tokens"] for each in lists] == [each["tokens"] for each in found[:9:6]]


def test_several_pictures_are_those_of_run_onnx(mixed, tmp_path, capsys):
    found = answer(mixed, tmp_path / "out.jsonl")
    for row in (1, 5):
        names = [str(mixed.parent / name) for name in found[row]["image"]]
        capsys.readouterr()
        assert cli.run_onnx([*names, found[row]["prompt"], "--json", "--provider", "cpu", "--threads", "1"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == found[row]["tokens"]


def test_several_pictures_resume(mixed, tmp_path):
    """What a run that stopped kept is gone on from, and the end is the same."""
    whole = answer(mixed, tmp_path / "whole.jsonl", "--batch-size", "4")
    output = tmp_path / "out.jsonl"
    job = batch.Job(dataset.open_dataset(mixed, "detect cross"), bundle.shipped(), "detect cross", provider="cpu")
    with pytest.raises(PaliGemmaError, match="stopped"):
        batch.run(job, output, 4, stopping_workers)
    assert len(read(tmp_path / "out.jsonl.part")) == 4
    assert answer(mixed, output, "--batch-size", "4") == whole


@contextlib.contextmanager
def stopping_workers(job):
    """A worker that answers one batch and then fails."""
    with batch.workers(job, threads=1) as answer:

        def answers(begins, size):
            yield next(answer(begins, size))
            raise PaliGemmaError("stopped")

        yield answers


def test_lists_in_parquet(mixed, tmp_path):
    """Names, and pictures themselves."""
    asked = [row for row in read(mixed)[:9] if isinstance(row["image"], list)]
    write(mixed.parent / "some.jsonl", asked)
    expected = [each["tokens"] for each in answer(mixed.parent / "some.jsonl", tmp_path / "jsonl.out")]
    prompts = [row["prompt"] for row in asked]
    files = [[{"bytes": (mixed.parent / name).read_bytes(), "path": name} for name in row["image"]] for row in asked]
    for column, images in {"names": [row["image"] for row in asked], "files": files}.items():
        table = pa.table({"image": images, "prompt": prompts})
        pq.write_table(table, mixed.parent / f"{column}.parquet")
        found = answer(mixed.parent / f"{column}.parquet", tmp_path / f"{column}.out")
        assert [each["tokens"] for each in found] == expected
        assert [each["image"] for each in found] == [row["image"] for row in asked]
