"""`run-onnx --json-schema`: what the commands and the Node host print is as it says, and other things are not."""

import json
import shutil
import subprocess

import jsonschema
import pytest

from export import bundle
from export.cli import SCHEMA, run_onnx, run_onnx_batch
from numpy_ref import cli
from numpy_ref.__main__ import main as numpy_main
from numpy_ref.checkpoint import SHIPPED
from torch_impl.__main__ import main as torch_main

from .test_hosts import HOSTS, RUN, need

EXAMPLE = str(SHIPPED / "example.png")
PROMPTS = ["detect star", "segment star", "caption en"]
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def printed(main, capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.run("command", main, [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def valid(line) -> dict:
    found = json.loads(line)
    VALIDATOR.validate(found)
    return found


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as ended:
        run_onnx(["--json-schema"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == VALIDATOR.schema
    jsonschema.Draft202012Validator.check_schema(found)


@pytest.mark.parametrize("main", [run_onnx, numpy_main, torch_main])
def test_commands(main, capsys):
    for prompt in PROMPTS:
        assert "prompt" not in valid(printed(main, capsys, EXAMPLE, prompt, "--json"))
    lines = printed(main, capsys, EXAMPLE, *PROMPTS, "--json").splitlines()
    assert [valid(line)["prompt"] for line in lines] == PROMPTS
    valid(printed(main, capsys, EXAMPLE, "caption en", "--score", "a red star", "--json"))
    found = valid(printed(main, capsys, EXAMPLE, "detect star", "--beams", "2", "--json"))
    assert len(found["candidates"]) == 2
    assert [len(box["uncertainty"]) for box in found["boxes"]] == [4]


def test_rows(tmp_path, capsys):
    rows = [{"image": EXAMPLE, "prompt": prompt} for prompt in PROMPTS]
    rows += [{"image": [EXAMPLE, EXAMPLE], "prompt": "caption en"}, {"image": "absent.png", "prompt": "caption en"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for options in ([], ["--masks"]):
        output = tmp_path / f"out{len(options)}.jsonl"
        printed(run_onnx_batch, capsys, "--input", tmp_path / "rows.jsonl", "--output", output, *options)
        found = [valid(line) for line in output.read_text().splitlines()]
        assert ["error" in each for each in found] == [False] * 4 + [True]
        assert ["masks" in each for each in found] == [bool(options)] * 4 + [False]
    alone = valid(printed(run_onnx, capsys, EXAMPLE, "segment star", "--json"))
    assert found[1]["masks"][0]["counts"] == alone["masks"][0]["counts"]


def test_the_node_host():
    need(node := shutil.which("node"), "Node 20 or later (nodejs.org)")
    need((HOSTS / "node_modules" / "onnxruntime-node").is_dir(), f"npm ci --prefix {HOSTS}")
    command = [node, RUN, bundle.shipped().path, EXAMPLE, *PROMPTS, "--json"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len([valid(line) for line in ended.stdout.splitlines()]) == 3


BOX = {"label": "star", "x1": 1, "y1": 2, "x2": 3, "y2": 4}
ANSWER = {"text": "a", "tokens": [5], "boxes": [BOX]}


@pytest.mark.parametrize(
    "wrong",
    [
        {}, [], {"text": "a"}, {**ANSWER, "more": 1}, {**ANSWER, "tokens": ["5"]}, {**ANSWER, "error": "no"},
        {**ANSWER, "boxes": [{**BOX, "size": [1, 2]}]}, {**ANSWER, "boxes": [{**BOX, "codes": [1]}]},
        {**ANSWER, "boxes": [{**BOX, "score": 1.5}]}, {**ANSWER, "boxes": [{**BOX, "uncertainty": [1, 2, 3]}]},
        {**ANSWER, "masks": [BOX]}, {**ANSWER, "masks": [{**BOX, "codes": [1] * 16, "size": [2, 2]}]},
        {"row": 1, "error": "no"}, {**ANSWER, "timings": {"load_s": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_an_answer(wrong):
    assert not VALIDATOR.is_valid(wrong)


@pytest.mark.parametrize(
    "right",
    [
        ANSWER, {**ANSWER, "candidates": [{"text": "a", "logprob": -1.5}]}, {**ANSWER, "logprobs": [-0.5], "masks": []},
        {**ANSWER, "boxes": [{**BOX, "score": 0.5, "uncertainty": [0, 1.5, 2, 3]}]},
        {**ANSWER, "masks": [{**BOX, "codes": [1] * 16}]}, {"row": 0, "image": None, "prompt": None, "error": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_one(right):
    assert VALIDATOR.is_valid(right)
