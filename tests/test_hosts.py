"""The hosts that have nothing of Python: Node and a browser page, held to the same golden set as Python.

A machine without Node or Chromium skips them and says so; where REQUIRE_HOSTS is set, as in CI, that is a failure.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export import bundle, serve
from export.session import HostSession, Session
from numpy_ref import checkpoint, detection, knows
from numpy_ref.answer import answer
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image, preprocess
from numpy_ref.model import segmentation
from numpy_ref.model.sampling import Sampling
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer, prompt_warning

from .fuzz import corpus
from .test_scores import without_logprob

SUITE = suite_of()  # what the shipped model is measured on
SHIPPED = checkpoint.SHIPPED
TESTS, HOSTS = Path(__file__).parent, Path(serve.__file__).parent / "hosts"
RUN = HOSTS / "node" / "run.mjs"
TASKS = {"caption": 15, "detect": 15, "answer": 10, "segment": 10}
SAMPLED = 10
STEP = 2 / 255
TEXTS = [
    "caption en", "detect star ; blue circle", "<loc0010><loc1023> star<seg127>", "<image><bos>a<eos>", " two  spaces ",
    "<loc1024> x<loc9999><seg128> <seg999>", "tab\tand\nnewlines\n\n", "é ß 漢字 🦄 \u200d", "<loc10><seg999><<bos>>", "MiXeD 12345", "▁", "\ufeffmark",
]  # fmt: skip
_PIECES = [*"<>;, 7aeé日☕\n\t", "star", "red", "  ", "<bos>", "<loc0003>", "<seg127>", "\N{BELL}", "e\u0301"]
TEXTS += ["".join(np.random.default_rng(i).choice(_PIECES, 12)) for i in range(300)]
DETECTIONS = json.loads((TESTS / "detections.json").read_text(encoding="utf-8"))["cases"]
PASTED = [
    {
        "mask": np.random.default_rng(i).standard_normal(64 * 64).astype(np.float32).tolist(),
        "box": dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)), "width": 90, "height": 70,
    }
    for i, corners in enumerate([
        (0, 0, 90, 70), (3.9, 5.9, 80.9, 60.9), (3.5, 4.5, 8.5, 9.5), (10, 10, 10, 40), (10, 10, 40, 10.9),
        (40, 40, 10, 10), (7.2, 7.2, 7.9, 7.9), (-4.5, 3, 20, 200), (89, 69, 90, 70),
    ])
]  # fmt: skip


def need(there, what):
    """Go on if something is there; where hosts are required its absence is a failure, elsewhere a reason to skip."""
    if not there:
        (pytest.fail if os.environ.get("REQUIRE_HOSTS") else pytest.skip)(f"the host tests need {what}")


@pytest.fixture(scope="module")
def node():
    need(program := shutil.which("node"), "Node 20 or later (nodejs.org)")
    need((HOSTS / "node_modules" / "onnxruntime-node").is_dir(), f"npm ci --prefix {HOSTS}")
    return program


@pytest.fixture(scope="module")
def browser(node):
    names = ("chromium", "chromium-browser", "google-chrome")
    need(os.environ.get("CHROMIUM") or any(map(shutil.which, names)), "Chromium (or its path in CHROMIUM)")
    return node


@pytest.fixture(scope="module")
def shipped():
    return bundle.shipped()


@pytest.fixture(scope="module")
def golden(shipped, tmp_path_factory):
    """50 pictures, a prompt each, and what Python answers: greedy, and some drawn with known uniform numbers."""
    folder, engine = tmp_path_factory.mktemp("golden"), Session(shipped, "cpu")
    tokenizer, cases = Tokenizer.load(shipped.path, shipped.config), []
    asked = [question for task, count in TASKS.items() for question in SUITE.held_out(7, count, task)]
    for i, question in enumerate(asked):
        evaluate.picture(question).save(folder / f"{i}.png")
        settings = [Sampling()] + [Sampling(2.5, 50, 0.95, seed=i)] * (i % (len(asked) // SAMPLED) == 0)
        for sampling in settings:
            cases.append(case(engine, tokenizer, folder / f"{i}.png", question.prefix, sampling))
    assert len(cases) == len(asked) + SAMPLED == 60
    return cases


def case(engine, tokenizer, picture, prompt, sampling):
    """What a host is asked, and what Python answers."""
    image = open_image(picture)
    found = answer(engine, tokenizer, image, prompt, max_new_tokens=64, sampling=sampling)
    uniforms = np.random.default_rng(sampling.seed).random(64, np.float32).tolist()
    return {
        "asked": {
            "picture": str(picture), "prompt": prompt, "temperature": sampling.temperature, "topK": sampling.top_k,
            "topP": sampling.top_p, "uniforms": uniforms,
        },
        **json.loads(json.dumps(found.as_json())), "masks": [mask for mask in found.masks if mask is not None],
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Picture files of every kind that people drop."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).resize((130, 170), Image.Resampling.BICUBIC)
    files = {
        "example.png": open_image(checkpoint.SHIPPED / "example.png"),
        "noise.png": Image.fromarray(rng.integers(0, 256, (70, 150, 3), np.uint8)),
        "grey.png": smooth.convert("L"), "palette.png": smooth.convert("P"), "opaque.png": smooth.convert("RGBA"),
        "large.png": smooth.resize((700, 500)), "smooth.webp": smooth, "smooth.jpg": smooth,
    }  # fmt: skip
    for name, picture in files.items():
        picture.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    opacity = Image.fromarray(rng.integers(0, 256, (170, 130), np.uint8))
    clear = smooth.copy()
    clear.putalpha(opacity)
    clear.save(folder / "clear.png")
    smooth.convert("P").save(folder / "stencil.png", transparency=7)
    turned = Image.Exif()
    turned[0x0112] = 6  # a telephone held upright
    smooth.save(folder / "turned.png", exif=turned)
    return [folder / name for name in [*files, "clear.png", "stencil.png", "turned.png"]]


def run_node(program, script, **arguments):
    result = subprocess.run(
        [program, TESTS / script], input=json.dumps(arguments, default=str), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def answered(node, shipped, golden, pictures):
    cases = [case["asked"] for case in golden]
    detections = [case["text"] for case in DETECTIONS]
    return run_node(
        node, "host_node.mjs", bundle=shipped.path, cases=cases, pictures=pictures, texts=TEXTS, detections=detections,
        pasted=PASTED,
    )  # fmt: skip


@contextmanager
def served(opened):
    """The page with a bundle, at the address that is yielded."""
    with serve.open_server(opened) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://{serve.ADDRESS}:{server.server_port}/web/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def shown(browser, shipped, golden, pictures, broken_bundles, tmp_path_factory):
    path = tmp_path_factory.mktemp("huge")
    with ExitStack() as stack:
        url = stack.enter_context(served(shipped))
        broken = [stack.enter_context(served(replace(shipped, path=path))) for path in broken_bundles.values()]
        cases = [case["asked"] for case in golden]
        huge = [path / "line.png", path / "huge.png"]
        for file, size in zip(huge, [(1, 3000), (70_000, 2)], strict=True):
            Image.new("RGB", size, "red").save(file)
        results = run_node(browser, "host_page.mjs", url=url, cases=cases, pictures=pictures, broken=broken, huge=huge)
    return {**results, "url": url}


@pytest.fixture(scope="module")
def broken_bundles(shipped, tmp_path_factory):
    """What can be wrong with a bundle -> a bundle that it is wrong with."""
    folder, paths = tmp_path_factory.mktemp("broken"), {}
    for name in ("SHA-256", "missing", "version", "lists no checksum", "evil.onnx", "damaged", "not JSON"):
        paths[name] = Path(shutil.copytree(shipped.path, folder / name))
    contents = bytearray((paths["SHA-256"] / "weights.bin").read_bytes())
    contents[len(contents) // 2] ^= 1
    (paths["SHA-256"] / "weights.bin").write_bytes(contents)
    (paths["missing"] / "sample.onnx").unlink()
    change(paths["version"], version=9)
    files = json.loads((shipped.path / "bundle.json").read_text())["files"]
    change(paths["lists no checksum"], files={name: entry for name, entry in files.items() if name != "weights.bin"})
    change(paths["evil.onnx"], masks="../evil.onnx")
    change(paths["damaged"], files={**files, "weights.bin": 7})
    (paths["not JSON"] / "bundle.json").write_text("<html>")
    return paths


def change(path, masks=None, **entries):
    """Change entries of a bundle's description."""
    description = json.loads((path / "bundle.json").read_text()) | entries
    if masks:
        description["graphs"]["masks"]["file"] = masks
    (path / "bundle.json").write_text(json.dumps(description))


# --- the same answers --------------------------------------------------------------------------------------


def same_answers(golden, results):
    assert len(golden) == len(results)
    for case, result in zip(golden, results, strict=True):
        asked = case["asked"]
        assert result["tokens"] == case["tokens"], asked
        assert result["text"] == result["streamed"] == case["text"], asked
        assert result["logprobs"] == pytest.approx(case["logprobs"], abs=1e-4)
        assert len(result["boxes"]) == len(case["boxes"])
        for found, expected in zip(result["boxes"], case["boxes"], strict=True):
            expected = {name: value for name, value in expected.items() if name != "uncertainty"}  # of Python alone
            scores = {
                name: pytest.approx(expected[name], abs=1e-4) for name in ("score", "mask_score") if name in expected
            }
            assert found == expected | scores
            assert "score" in scores
        assert len(result["masks"]) == len(case["masks"])
        for found, mask in zip(result["masks"], case["masks"], strict=True):
            assert found["size"] == list(mask.shape)
            expected = segmentation.run_lengths(mask)
            # A value at the very edge of zero may fall to either side.
            assert abs(sum(found["counts"][1::2]) - sum(expected[1::2])) <= 2
            assert len(found["counts"]) == pytest.approx(len(expected), abs=4)


def test_golden_set_is_worth_it(golden):
    greedy = [case for case in golden if not case["asked"]["temperature"]]
    assert len({case["text"] for case in greedy}) > 30
    assert sum(bool(case["masks"]) for case in golden) >= 10
    drawn = [case for case in golden if case["asked"]["temperature"]]
    others = {case["asked"]["picture"]: case["tokens"] for case in greedy}
    assert sum(case["tokens"] != others[case["asked"]["picture"]] for case in drawn) >= SAMPLED // 2


def test_node_answers_as_python(golden, answered):
    same_answers(golden, answered["answers"])


def test_node_answers_with_an_older_bundle(node, shipped, golden, tmp_path):
    """Whose sampling graph gives the token alone."""
    folder = without_logprob(shutil.copytree(shipped.path, tmp_path / "old"))
    cases = [case for case in golden if case["boxes"]][:2] + [case for case in golden if case["asked"]["temperature"]][
        :1
    ]
    answered = run_node(
        node, "host_node.mjs", bundle=folder, cases=[case["asked"] for case in cases], pictures=[], texts=[]
    )
    same_answers(cases, answered["answers"])


def test_page_answers_as_python(golden, shown):
    same_answers(golden, shown["golden"])


def test_python_by_the_host_graphs(golden, shipped):
    """Pictures and draws by the bundle's graphs, in Python."""
    engine, tokenizer = HostSession(shipped, "cpu"), Tokenizer.load(shipped.path, shipped.config)
    for case in golden:
        asked, image = case["asked"], open_image(case["asked"]["picture"])
        seed = int(Path(asked["picture"]).stem) if asked["temperature"] else 0
        sampling = Sampling(asked["temperature"], asked["topK"], asked["topP"], seed)
        found = answer(engine, tokenizer, image, asked["prompt"], max_new_tokens=64, sampling=sampling)
        assert found.tokens == case["tokens"], asked
        assert found.logprobs == pytest.approx(case["logprobs"], abs=1e-4)


# --- pictures and text -------------------------------------------------------------------------------------


def same_pixels(pictures, results, size, decoded_alike=()):
    for file, result in zip(pictures, results, strict=True):
        image = open_image(file)
        rgb = np.frombuffer(base64.b64decode(result["rgb"]), np.uint8).reshape(image.height, image.width, 3)
        off = np.abs(rgb.astype(int) - np.asarray(image)).max()
        assert off <= (3 if file.name in decoded_alike else 0), file.name  # JPEG decoders differ in rounding
        values = np.frombuffer(base64.b64decode(result["values"]), np.float32).reshape(1, 3, size, size)
        difference = np.abs(values - preprocess(Image.fromarray(rgb), size))
        assert difference.max() <= 1.001 * STEP, file.name


def test_node_sees_what_pillow_sees(pictures, answered, shipped):
    same_pixels(pictures, answered["pixels"], shipped.config.vision.image_size, ["smooth.jpg"])


def test_page_sees_what_pillow_sees(pictures, shown, shipped):
    same_pixels(pictures, shown["pixels"], shipped.config.vision.image_size, ["smooth.jpg"])


def test_node_reads_answers_as_python(answered):
    """The table of test_detection.py, to the last bit."""
    assert len(answered["boxes"]) == len(DETECTIONS)
    for case, found in zip(DETECTIONS, answered["boxes"], strict=True):
        expected = [box.as_json() for box in detection.parse(case["text"], 640, 480)]
        assert found == json.loads(json.dumps(expected)), case["what"]
        assert [box["label"] for box in found] == [box["label"] for box in case["boxes"]]


def test_node_pastes_as_python(answered):
    for case, found in zip(PASTED, answered["masks"], strict=True):
        mask, corners = np.reshape(np.array(case["mask"], np.float32), (64, 64)), tuple(case["box"].values())
        expected = segmentation.paste(mask, corners, case["width"], case["height"])
        found = np.reshape(found, expected.shape)
        assert (found != expected).sum() <= 2, corners  # a value at the very edge of zero may fall to either side
        assert found.any() == expected.any()


def test_node_warns_as_python(answered):
    assert answered["warnings"] == [prompt_warning(text) for text in TEXTS]
    assert any(answered["warnings"])


def test_node_spells_as_python(answered, shipped):
    tokenizer = Tokenizer.load(shipped.path, shipped.config)
    assert answered["encoded"] == [tokenizer.encode(text) for text in TEXTS]
    assert answered["decoded"] == [tokenizer.decode(ids) for ids in answered["encoded"]]


# --- the page ----------------------------------------------------------------------------------------------


def test_page_in_use(shown, golden):
    assert shown["errors"] == []
    assert "Loaded in" in shown["about"]
    assert "thread" in shown["about"]
    assert "not a picture" in shown["notPicture"]
    assert shown["complaintGone"]
    assert " on a " in shown["caption"]
    assert re.search(r"; \d+ tokens, score [01]\.\d\d\.$", shown["times"])
    assert "First token after" in shown["times"]
    assert len(shown["found"]) == shown["detect"].count("star") > 0
    assert all(re.search(r"^star at [\d, ]+ score [01]\.\d\d$", found) for found in shown["found"])
    assert "star" in shown["label"]
    assert shown["focus"] == ["file", "example", "prompt", "run"]
    assert shown["focusAfterAnswer"] == "prompt"
    assert "exceeds the capacity" in shown["tooLong"]
    warned, gone = shown["noted"]
    assert "begins with <image>" in warned
    assert gone
    assert shown["overflow"] <= 0  # at the width of a telephone
    assert 0 < int(shown["stopped"].split("; ")[1].split()[0]) < 150
    assert shown["changed"] == ""
    height, message = shown["tall"]
    assert height < 3000
    assert "huge.png: 70000 x 2 pixels" in message


def test_no_request_leaves_the_server(shown):
    origin = shown["url"].removesuffix("/web/")
    assert len(shown["requests"]) > 10
    strangers = [url for url in shown["requests"] if not url.startswith((f"{origin}/", f"blob:{origin}/", "data:"))]
    assert strangers == []


def test_broken_bundles_in_the_page(shown, broken_bundles):
    for word, message in zip(broken_bundles, shown["broken"], strict=True):
        assert word in message
        assert "\n" not in message


def test_page_before_a_server_that_answers(browser, shipped):
    """For bundles that no browser holds: the page asks the server, and fetches no model."""
    picture = SHIPPED / "example.png"
    with served(shipped) as url:
        shown = run_node(browser, "host_service.mjs", url=url, bundle=shipped.path, picture=picture)
    assert "Answers come from the server" in shown["about"]
    assert "stub" in shown["about"]
    assert "server" in shown["place"]
    assert shown["answer"] == answer(
        Session(shipped, "cpu"), Tokenizer.load(shipped.path, shipped.config), open_image(picture), "segment star"
    ).text  # fmt: skip
    (found,) = shown["found"]
    assert "star at " in found
    assert "score 0." in found
    first, second, _ = shown["fields"]
    size = picture.stat().st_size
    assert first == {"prompt": "segment star", "temperature": "0", "top_p": "1", "top_k": "0", "bytes": size}
    assert (second["temperature"], second["max_new_tokens"]) == ("0.5", "9")
    assert 0 <= int(second["seed"]) < 2**32
    assert "exceeds the capacity" in shown["error"]
    assert shown["held"] == "closed"
    assert not shown["complaint"]
    assert not [path for path in shown["paths"] if path.startswith("/bundle/") or "node_modules" in path]


# --- Node from the command line ----------------------------------------------------------------------------


def command(node, *arguments):
    return subprocess.run([node, RUN, *map(str, arguments)], capture_output=True, text=True)


def test_node_command(node, shipped, golden):
    asked = golden[0]["asked"]
    result = command(node, shipped.path, asked["picture"], asked["prompt"])
    assert (result.returncode, result.stdout, result.stderr) == (0, golden[0]["text"] + "\n", "")
    result = command(node, shipped.path, asked["picture"], asked["prompt"], "--json", "--temperature", 1, "--seed", 3)
    found = json.loads(result.stdout)
    assert found.keys() == {"text", "tokens", "logprobs", "boxes", "masks", "timings"}
    again = command(node, shipped.path, asked["picture"], asked["prompt"], "--json", "--temperature", 1, "--seed", 3)
    assert json.loads(again.stdout)["tokens"] == found["tokens"]


def one_line(result, *words):
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("run.mjs: error: ")
    for word in words:
        assert word in line


def test_node_names_what_is_wrong(node, shipped, broken_bundles, tmp_path, pictures):
    for word, path in broken_bundles.items():
        one_line(command(node, path, pictures[0], "caption en"), word, str(path))
    one_line(command(node, tmp_path / "none", pictures[0], "caption en"), "no such bundle")
    one_line(command(node, tmp_path, pictures[0], "caption en"), "bundle.json is missing")
    (tmp_path / "notes.png").write_text("not a picture")
    one_line(command(node, shipped.path, tmp_path / "notes.png", "caption en"), "notes.png", "not a picture")
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:2000])
    one_line(command(node, shipped.path, tmp_path / "half.png", "caption en"), "half.png")
    one_line(command(node, shipped.path, tmp_path / "absent.png", "caption en"), "no such picture")
    one_line(command(node, shipped.path, pictures[0], " "), "prompt is empty")
    one_line(command(node, shipped.path, pictures[0], "star " * 300), "exceeds the capacity")
    Image.new("CMYK", (9, 9)).save(tmp_path / "print.jpg")
    one_line(command(node, shipped.path, tmp_path / "print.jpg", "caption en"), "print.jpg", "cmyk")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    one_line(command(node, shipped.path, tmp_path / "drawing.svg", "caption en"), "drawing.svg", "svg")
    misuse = command(node, shipped.path, pictures[0], "caption en", "--top-p", "2")
    assert (misuse.returncode, misuse.stdout) == (2, "")
    assert "--top-p 2" in misuse.stderr


def test_node_reads_prompts_from_files(node, shipped, golden, tmp_path):
    asked, file = golden[0]["asked"], tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + asked["prompt"].encode() + b"\r\n")
    for prompt in (f"@{file}", asked["prompt"] + "\n"):
        result = command(node, shipped.path, asked["picture"], prompt)
        assert (result.returncode, result.stdout, result.stderr) == (0, golden[0]["text"] + "\n", "")
    one_line(command(node, shipped.path, asked["picture"], "@"), "@ names no file")
    one_line(command(node, shipped.path, asked["picture"], f"@{tmp_path}"), "cannot read the prompt", "is asked as @@")
    file.write_bytes("caption en".encode("utf-16"))
    one_line(command(node, shipped.path, asked["picture"], f"@{file}"), "not UTF-8")
    assert command(node, shipped.path, asked["picture"], "@@home").returncode == 0


def test_node_warns_of_picture_tokens_in_front(node, shipped, golden):
    result = command(node, shipped.path, golden[0]["asked"]["picture"], "<image>caption en")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("run.mjs: warning: the prompt begins with <image>")


@pytest.mark.parametrize("value", ["-1", "100000", "", "x"])
def test_node_bounds_threads(node, shipped, golden, value):
    result = command(node, shipped.path, golden[0]["asked"]["picture"], "caption en", f"--threads={value}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "must be a whole number from 0 to " in result.stderr.splitlines()[-1]


def test_node_counts_one_argument(node):
    assert command(node, "bundle").stderr.splitlines()[-1].endswith("got 1 argument")


def test_node_without_its_libraries_says_what_to_run(node, tmp_path, shipped):
    shutil.copytree(HOSTS, tmp_path / "hosts", ignore=shutil.ignore_patterns("node_modules"))
    script = tmp_path / "hosts" / "node" / "run.mjs"
    one_line(
        subprocess.run([node, script, shipped.path, "a.png", "b"], capture_output=True, text=True), "npm ci --prefix"
    )


def test_a_reader_that_has_seen_enough(node, shipped, golden):
    asked = golden[0]["asked"]
    parts = [node, RUN, shipped.path, asked["picture"], asked["prompt"]]
    writer = subprocess.Popen(parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait() == 0


def test_tokenizers_of_other_makes(node, shipped, tmp_path):
    """Location tokens marked as special are text all the same; where there are none they follow behind the end."""
    source, target = tmp_path / "source", tmp_path / "bundle"
    shutil.copytree(shipped.path, source)
    contents = json.loads((source / "tokenizer.json").read_text())
    for entry in contents["added_tokens"]:
        entry["special"] = True
    (source / "tokenizer.json").write_text(json.dumps(contents))
    entry = {"bytes": (source / "tokenizer.json").stat().st_size, "sha256": bundle.sha256(source / "tokenizer.json")}
    files = json.loads((source / "bundle.json").read_text())["files"]
    change(source, files={**files, "tokenizer.json": entry})
    source.rename(target)
    answered = run_node(node, "host_node.mjs", bundle=target, cases=[], pictures=[], texts=["<loc0010> star <seg003>"])
    assert answered["decoded"] == ["<loc0010> star <seg003>"]


# --- a bad day ---------------------------------------------------------------------------------------------


def failed_line(ended) -> str:
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("run.mjs: error: ")
    assert len(line) <= 2000
    assert line.isprintable()
    return line


def call_node(node, *arguments, **options):
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(
        [node, RUN, *map(str, arguments)], stderr=subprocess.PIPE, text=True, timeout=60, **options
    )  # fmt: skip


def test_node_on_a_full_output_is_one_line(node, shipped):
    with open("/dev/full", "w") as full:
        ended = call_node(node, shipped.path, SHIPPED / "example.png", "caption en", stdout=full)
    assert "standard output cannot be written" in failed_line(ended)


@pytest.mark.parametrize("name", ["bundle.json", "tokenizer.json", "weights.bin", "prefill.onnx"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_node_reads_files_of_the_folder_alone(node, copy, tmp_path, name, kind):
    outside = tmp_path / "outside"
    (copy / "tokenizer.json").touch()
    (copy / name).rename(outside)
    description = json.loads((outside if name == "bundle.json" else copy / "bundle.json").read_text())
    description["files"]["tokenizer.json"] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (outside if name == "bundle.json" else copy / "bundle.json").write_text(json.dumps(description))
    {"fifo": os.mkfifo, "link": lambda path: path.symlink_to(outside), "folder": Path.mkdir}[kind](copy / name)
    line = failed_line(call_node(node, copy, SHIPPED / "example.png", "caption en"))
    assert ("this link leads out of its folder" if kind == "link" else "missing") in line


def test_node_prompts_from_files_alone(node, shipped, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "not a file" in failed_line(call_node(node, shipped.path, SHIPPED / "example.png", f"@{tmp_path / 'fifo'}"))


def test_node_does_not_trust_repacked_weights(node, tmp_path):
    """Whose pieces are shorter than the kernels read: in a bundle of a stranger with the right checksums."""
    folder = tmp_path / "out"
    bundle.write(checkpoint.load(), folder, prepacked=True)
    end = (folder / "weights.bin").stat().st_size - 16
    for name in ("prefill", "decode"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for pair in (pair for tensor in model.graph.initializer for pair in tensor.external_data):
            if pair.key.startswith("prepacked_"):
                pair.value = f"{pair.value.split('|')[0]}|{end};16;0"
        corpus.sealed(folder, f"{name}.onnx", model.SerializeToString())
    ended = call_node(node, folder, SHIPPED / "example.png", "caption en")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "black cross" in ended.stdout


def test_node_shows_characters_of_format(node):
    code = (
        f"import {{ printable, oneLine }} from {json.dumps(str(HOSTS / 'common' / 'errors.mjs'))};"
        r"console.log(JSON.stringify([printable('a\u202eb\u{e0001}\x1b[2J\n☕'), oneLine('a\u202e\x1b\n' + 'b'.repeat(9e6) + '; c')]))"
    )
    ended = subprocess.run([node, "--input-type=module", "-e", code], capture_output=True, text=True, check=True)
    shown, line = json.loads(ended.stdout)
    assert shown == "a\\u202eb\\U000e0001\N{REPLACEMENT CHARACTER}[2J\n☕"
    assert line.startswith(r"a\u202e\x1b bbb")
    assert line.endswith("bbb; c")
    assert len(line) <= 1900


# --- several pictures --------------------------------------------------------------------------------------


def several(shipped, folder):
    """Prompts about two and three pictures of unequal sizes, and what Python answers."""
    engine, tokenizer, asked = Session(shipped, "cpu"), Tokenizer.load(shipped.path, shipped.config), []
    for i, question in enumerate(SUITE.held_out(3, 3, "detect")):
        evaluate.picture(question).resize((200 + 30 * i, 150)).save(folder / f"{i}.png")
    for names, prompt in [((0, 1), "caption en"), ((2, 0, 1), "segment star"), ((1, 1), "detect star ; ring")]:
        files = [folder / f"{name}.png" for name in names]
        found = answer(engine, tokenizer, [open_image(file) for file in files], prompt)
        masks = [mask for mask in found.masks if mask is not None]
        plain = json.loads(json.dumps(found.as_json()))
        asked.append({"asked": {"picture": files, "prompt": prompt}, **plain, "masks": masks})
    return asked


def test_node_answers_about_several_pictures(node, shipped, tmp_path):
    cases = several(shipped, tmp_path)
    asked = [case["asked"] for case in cases]
    same_answers(
        cases, run_node(node, "host_node.mjs", bundle=shipped.path, cases=asked, pictures=[], texts=[])["answers"]
    )
    for case in cases:
        result = command(node, shipped.path, *case["asked"]["picture"], case["asked"]["prompt"], "--json")
        assert json.loads(result.stdout)["tokens"] == case["tokens"]
    one_line(command(node, shipped.path, *[tmp_path / "0.png"] * 4, "caption en"), "256 of them the pictures", "fewer")


def test_node_names_what_stands_in_the_wrong_place(node, shipped, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for arguments, words in [
        ((shipped.path, "caption en", tmp_path / "a.png"), "a.png: a picture in the place of the prompt"),
        (
            (shipped.path, tmp_path / "a.png", "caption en", tmp_path / "a.png"),
            "a.png: a picture in the place of the prompt",
        ),
        ((tmp_path / "a.png", shipped.path, "caption en"), "a folder in the place of a picture"),
        ((tmp_path / "a.png", tmp_path / "a.png", "caption en"), "a.png: a file in the place of the bundle's folder"),
        ((shipped.path, tmp_path / "a.png", "caption", "en"), 'several words is quoted: "caption en"'),
        ((shipped.path, tmp_path / "a.png", "detect star", "caption", "en"), 'quoted: "caption en"'),
        ((shipped.path, "absent", "caption en", "detect star"), "absent: no such picture"),
    ]:
        result = command(node, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr.splitlines()[-1]


def test_an_older_bundle_takes_one_picture(node, shipped, tmp_path):
    """Its graph has one picture a prompt: one it still answers about, of several it says so."""
    old = shutil.copytree(shipped.path, tmp_path / "old")
    graph = onnx.load(old / "prefill.onnx", load_external_data=False)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "B"
    onnx.save(graph, old / "prefill.onnx")
    description = json.loads((old / "bundle.json").read_text())
    description["graphs"]["prefill"]["inputs"][0]["shape"][0] = "B"
    size, digest = (old / "prefill.onnx").stat().st_size, bundle.sha256(old / "prefill.onnx")
    change(
        old,
        graphs=description["graphs"],
        files=description["files"] | {"prefill.onnx": {"bytes": size, "sha256": digest}},
    )
    engine, tokenizer = Session(bundle.load(old), "cpu"), Tokenizer.load(old, shipped.config)
    picture = open_image(checkpoint.SHIPPED / "example.png")
    picture.save(tmp_path / "a.png")
    found = answer(engine, tokenizer, picture, "caption en")
    assert json.loads(command(node, old, tmp_path / "a.png", "caption en", "--json").stdout)["tokens"] == found.tokens
    with pytest.raises(PaliGemmaError, match="old: it takes one picture a prompt; export the bundle again for more"):
        answer(engine, tokenizer, [picture, picture], "caption en")
    one_line(command(node, old, tmp_path / "a.png", tmp_path / "a.png", "caption en"), "takes one picture a prompt")


def test_hints_are_the_same_in_the_page(node):
    """JavaScript's reading of knows.json says what Python's says, and takes nothing that is wrong."""
    known = knows.load(checkpoint.SHIPPED)
    prompts = [
        "caption en",
        "detect star ; red ring",
        "detect star ; cat",
        "Caption en",
        "answer en what shape is red?",
        "",
    ]
    data = json.loads((checkpoint.SHIPPED / knows.FILE).read_text())
    wrong = [
        {**data, "about": 3},
        {**data, "prompts": ["{nothing}"]},
        {**data, "words": []},
        None,
        [],
        {**data, "prompts": []},
    ]
    found = run_node(node, "host_knows.mjs", data=data, prompts=prompts, wrong=wrong)
    assert found["hints"] == [known.hint(prompt) or "" for prompt in prompts]
    assert found["taken"] == [False] * len(wrong)
