"""The npm package of the hosts: packed, installed elsewhere, and used as programs use it, in Node and in a browser."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest

import numpy_ref
from export import bundle
from export.session import Session
from numpy_ref.answer import answer
from numpy_ref.cli import as_json
from numpy_ref.image import open_image
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer

from .test_hosts import HOSTS, SHIPPED, TESTS, browser, command, need, node, one_line, run_node, shipped  # noqa: F401

SUITE = suite_of()  # what the shipped model is measured on
PACKAGE = json.loads((HOSTS / "package.json").read_text())
EXAMPLE = SHIPPED / "example.png"
NODE_MODULES = "node_modules/paligemma-onnx"
PROMPTS = ["caption en", "detect star", "segment red circle", "answer en how many shapes are there?"]
DISPOSED = ["PaliGemmaError", "this model was disposed of; load it again"]


def npm(*arguments, folder):
    """What npm prints; it must succeed, and warn of nothing."""
    need(program := shutil.which("npm"), "npm (nodejs.org)")
    ended = subprocess.run([program, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "warn" not in ended.stderr, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def packed(node, tmp_path_factory):  # noqa: F811
    """The tarball, and the names of the files in it."""
    folder = tmp_path_factory.mktemp("packed")
    (listed,) = json.loads(npm("pack", "--json", "--pack-destination", folder, folder=HOSTS))
    return folder / listed["filename"], {file["path"] for file in listed["files"]}


@pytest.fixture(scope="module")
def installed(packed, tmp_path_factory):
    """A folder that has nothing but the package, and what it depends on in the versions of this project's lock file."""
    folder, tarball = tmp_path_factory.mktemp("installed"), packed[0]
    lock = json.loads((HOSTS / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name and not entry.get("dev")}
    wanted = {PACKAGE["name"]: f"file:{tarball}"}
    fields = ("version", "dependencies", "optionalDependencies", "bin", "engines")
    own = {field: PACKAGE[field] for field in fields} | {"resolved": f"file:{tarball}"}
    lock |= {"name": "user", "packages": {"": {"name": "user", "dependencies": wanted}, NODE_MODULES: own, **packages}}
    (folder / "package.json").write_text(json.dumps({"name": "user", "private": True, "dependencies": wanted}))
    (folder / "package-lock.json").write_text(json.dumps(lock))
    npm("ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", folder=folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(scope="module")
def used(node, installed, shipped):  # noqa: F811
    """What a program in Node gets from the package."""
    library = (installed / NODE_MODULES / "node" / "index.mjs").as_uri()
    return run_node(node, "host_library.mjs", library=library, bundle=shipped.path, picture=EXAMPLE)


@pytest.fixture(scope="module")
def page(browser, installed, shipped):  # noqa: F811
    """What a page gets from it, behind a server of files that knows nothing of threads."""
    shutil.copytree(shipped.path, installed / "bundle")
    shutil.copy(EXAMPLE, installed / "example.png")
    (installed / "index.html").write_text("<!doctype html><link rel=icon href=data:,><title>a page</title>")
    with files_of(installed) as url:
        return run_node(
            browser, "host_browser.mjs", url=url, library=f"/{NODE_MODULES}/web/browser.mjs", bundle="/bundle",
            modules="/node_modules", picture="/example.png", prompts=PROMPTS,
        )  # fmt: skip


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Nothing."""


@contextmanager
def files_of(folder):
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def expected(shipped):  # noqa: F811
    """Python's answers about the example picture."""
    engine, tokenizer = Session(shipped, "cpu"), Tokenizer.load(shipped.path, shipped.config)
    picture = open_image(EXAMPLE)
    return {prompt: answer(engine, tokenizer, picture, prompt) for prompt in [*PROMPTS, "segment star"]}


# --- the package -------------------------------------------------------------------------------------------


def test_what_is_packed(packed):
    _, names = packed
    assert {name.partition("/")[0] for name in names} == {
        "LICENSE",
        "README.md",
        "common",
        "node",
        "package.json",
        "web",
    }
    assert {f"common/{file.name}" for file in (HOSTS / "common").iterdir()} <= names
    assert {"node/index.mjs", "node/index.d.mts", "web/browser.mjs", "web/browser.d.mts", "web/worker.mjs"} <= names
    assert not names & {"web/index.html", "web/page.mjs", "web/chromium.mjs"}


def test_it_could_be_published():
    assert PACKAGE["version"] == numpy_ref.__version__
    assert "private" not in PACKAGE
    assert (HOSTS / "LICENSE").read_bytes() == (HOSTS.parent.parent / "LICENSE").read_bytes()
    entries = [entry[kind] for entry in PACKAGE["exports"].values() for kind in ("types", "default")]
    for file in [*entries, *PACKAGE["bin"].values()]:
        assert (HOSTS / file).is_file()


def test_its_command(node, installed, shipped, expected):  # noqa: F811
    command = installed / "node_modules" / ".bin" / "paligemma-onnx"
    ended = subprocess.run([command, shipped.path, EXAMPLE, "caption en"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", expected["caption en"].text + "\n")


RESOLUTIONS = {"nodenext": ["--module", "nodenext"], "bundler": ["--module", "esnext", "--moduleResolution", "bundler"]}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_types(node, installed, resolution):  # noqa: F811
    """In the strictest setting, and with the package's own declarations checked too."""
    shutil.copy(TESTS / "host_types.mts", installed)
    options = [
        "--strict",
        "--noEmit",
        "--target",
        "es2024",
        "--types",
        "",
        "--lib",
        "es2024,dom,dom.iterable,esnext.disposable",
    ]
    command = [
        node,
        HOSTS / "node_modules" / "typescript" / "bin" / "tsc",
        *options,
        *RESOLUTIONS[resolution],
        "host_types.mts",
    ]
    ended = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# --- in Node -----------------------------------------------------------------------------------------------


def refused_in_a_line(found):
    assert len(found) > 60
    for case in found:
        assert case["known"], case
        assert "\n" not in case["message"]
        for word in case["words"]:
            assert word in case["message"], case


def test_answers(used, expected):
    found = used["answer"]
    wanted = expected["segment star"]
    assert found["tokens"] == wanted.tokens
    assert found["logprobs"] == pytest.approx(wanted.logprobs, abs=1e-4)
    assert used["ways"] == [expected["caption en"].text] * 5
    assert used["together"] == [expected["caption en"].text] * 4


def test_mistakes_are_refused(used):
    refused_in_a_line(used["refused"])


def test_pictures_are_not_fetched(used):
    name, line = used["elsewhere"]
    assert name == "PaliGemmaError"
    assert "http://127.0.0.1/cat.png: the picture is read from a file and not fetched" in line


def test_signals(used, expected):
    """An aborted one runs nothing; before the first token its reason is thrown, later there is what there is."""
    assert [name for name, _ in used["aborted"]] == ["AbortError"] * 3
    assert used["abortedRuns"] == 0
    assert used["during"] == ["TypeError", "enough"]
    assert used["duringRuns"][0] == "preprocess"
    assert used["later"]["tokens"] == expected["caption en"].tokens[:2]
    assert used["listener"] == ["RangeError", "mine"]


def test_disposal(used, expected):
    """The question that runs is answered, each session is released once, and more questions are refused."""
    assert used["underway"] == expected["caption en"].text
    released, sessions = used["released"]
    assert released == sessions >= 5
    assert used["disposed"] == [DISPOSED] * 3


def without_halves(folder):
    """The bundle as it was before prefill had two halves."""
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    for name in ("vision", "prefill_text"):
        graph = description["graphs"].pop(name)
        del description["files"][graph["file"]]
        (folder / graph["file"]).unlink()
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_several_prompts_about_a_picture(node, shipped, tmp_path, old):  # noqa: F811
    """Each as if it were asked alone; the picture goes through the vision tower once, where the bundle can do that."""
    folder = without_halves(shutil.copytree(shipped.path, tmp_path / "old")) if old else shipped.path
    engine, tokenizer = Session(bundle.load(folder), "cpu"), Tokenizer.load(shipped.path, shipped.config)
    cases, wanted = [], []
    for i, question in enumerate(SUITE.held_out(5, 3, "detect")):
        file = tmp_path / f"{i}.png"
        evaluate.picture(question).save(file)
        prompts = [question.prefix, *PROMPTS]
        cases.append({"picture": file, "prompts": prompts})
        wanted += [answer(engine, tokenizer, open_image(file), prompt).tokens for prompt in prompts]
    found = run_node(node, "host_prompts.mjs", bundle=folder, cases=cases)
    assert found["answers"] == wanted
    runs = found["runs"]
    assert runs.count("preprocess") == len(cases)
    assert runs.count("vision") == (0 if old else len(cases))
    assert runs.count("prefill" if old else "prefill_text") == len(wanted)


@pytest.mark.parametrize("json_lines", [False, True])
def test_the_command_takes_several_prompts(node, shipped, expected, json_lines):  # noqa: F811
    """A line each, in their order, and none if one of them is refused."""
    ended = command(node, shipped.path, EXAMPLE, *PROMPTS, *["--json"] * json_lines)
    lines = ended.stdout.splitlines()
    found = (
        [(each["prompt"], each["text"]) for each in map(json.loads, lines)]
        if json_lines
        else zip(PROMPTS, lines, strict=True)
    )
    assert list(found) == [(prompt, expected[prompt].text) for prompt in PROMPTS]
    assert (ended.returncode, ended.stderr) == (0, "")
    one_line(command(node, shipped.path, EXAMPLE, *PROMPTS, " "), "prompt is empty")


def shape(value):
    """The names in a JSON value, in their order, and the kinds of what they stand for."""
    if isinstance(value, dict):
        return [(name, shape(each)) for name, each in value.items()]
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_the_same_json_everywhere(node, shipped, used, page, expected):  # noqa: F811
    """Of Python's command, of Node's, and of the library in Node and in a browser, which say nothing of loading.

    How uncertain the sides of boxes are the hosts do not say.
    """
    printed = json.loads(json.dumps(as_json(expected["segment star"], 0.5)))
    for box in [*printed["boxes"], *printed["masks"]]:
        del box["uncertainty"]
    python = shape(printed)
    command_ = json.loads(command(node, shipped.path, EXAMPLE, "segment star", "--json").stdout)
    assert shape(command_) == python
    del command_["timings"]["load_s"]
    assert shape(used["answer"]) == shape(page["answer"]) == shape(command_)


# --- in the browser ----------------------------------------------------------------------------------------


def test_the_browser_answers(page, expected):
    assert page["about"]["backend"] == "wasm"
    assert page["about"]["threads"] == 1  # a server of files sends no headers that would allow more
    pieces, most = page["fractions"]
    assert pieces > 1
    assert most == 1
    wanted = expected["segment star"]
    found = page["answer"]
    assert found["tokens"] == wanted.tokens
    assert found["text"] == page["streamed"] == wanted.text
    assert [box["label"] for box in found["boxes"]] == ["star"]
    assert found["boxes"][0]["score"] == pytest.approx(wanted.boxes[0].score, abs=1e-4)
    assert sum(found["masks"][0]["counts"]) == wanted.width * wanted.height
    assert page["ways"] == [expected["caption en"].text] * 6
    assert page["prompts"] == [expected[prompt].tokens for prompt in PROMPTS]
    assert "begins with <image>" in page["warning"]


def test_mistakes_are_refused_in_the_browser(page):
    refused_in_a_line(page["refused"])


def test_signals_in_the_browser(page, expected):
    assert [name for name, _ in page["aborted"]] == ["AbortError"] * 2
    assert page["before"] == ["TypeError", "enough"]
    tokens = page["later"]["tokens"]
    assert 0 < len(tokens) < len(expected["caption en"].tokens)
    assert tokens == expected["caption en"].tokens[: len(tokens)]
    assert page["listener"] == ["RangeError", "mine"]


def test_what_is_absent_is_named_in_the_browser(page):
    lines = [("cannot be fetched",), ("bundle.json is missing",), ("the bundle must be an address",),
             ("without a bundler", "modules"), ("/none/ where npm put them",), ("backend must be one of auto, wasm, webgpu",)]  # fmt: skip
    for (name, line), words in zip(page["absent"], lines, strict=True):
        assert name == "PaliGemmaError"
        for word in words:
            assert word in line
    name, line = page["unclonable"]
    assert name == "PaliGemmaError"
    assert "cannot be handed to the model's worker" in line


def test_disposal_in_the_browser(page, expected):
    assert page["underway"] == expected["caption en"].text
    assert page["disposed"] == [DISPOSED] * 3
