# ruff: noqa: F401, F811  (fixtures of another file)
"""The C++ host: built against what packages provide, and held to the same golden set as Python.

ONNX Runtime's library is that of the Python package. Its headers are in no such package: Debian has them from version 13
on, and elsewhere ONNXRUNTIME_INCLUDE_DIR says where they are. Without headers, CMake or the libraries the tests are
skipped and say so; where REQUIRE_CPP_HOST is set, as in CI where the headers can be had, that is a failure.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from export.session import HostSession
from numpy_ref import checkpoint, detection
from numpy_ref.image import open_image
from numpy_ref.model import segmentation
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import SentencePiece, Tokenizer

from .test_hosts import (
    DETECTIONS,
    HOSTS,
    TESTS,
    TEXTS,
    broken_bundles,
    golden,
    pictures,
    same_answers,
    shipped,
)
from .test_tokenizer import behind, train

HEADERS = "onnxruntime_cxx_api.h"
PLACES = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
LIBRARY = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
DRAWN = 10


def need(there, what):
    """Go on if something is there; where the C++ host is required its absence is a failure, else a reason to skip."""
    if not there:
        (pytest.fail if os.environ.get("REQUIRE_CPP_HOST") else pytest.skip)(f"the tests of the C++ host need {what}")


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A folder with the host, and with the driver of its functions, built by its own CMakeLists.txt."""
    include = next((place for place in PLACES if place and (Path(place) / HEADERS).is_file()), None)
    need(shutil.which("cmake") and shutil.which("c++"), "CMake and a C++ compiler")
    need(include, f"{HEADERS} of ONNX Runtime (its folder in ONNXRUNTIME_INCLUDE_DIR)")
    need(LIBRARY, "libonnxruntime.so, which ONNX Runtime's Python package has on Linux")
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so.1", "libonnxruntime.so"):  # what a program asks for, and what CMake does
        (folder / name).symlink_to(LIBRARY[-1])
    found = [f"-DONNXRUNTIME_INCLUDE_DIR={include}", f"-DONNXRUNTIME_LIBRARY={folder / 'libonnxruntime.so'}"]
    built = [
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror",
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DDRIVER={TESTS / 'host_cpp.cpp'}",
    ]
    made = run("cmake", "-S", HOSTS / "cpp", "-B", folder, *found, *built)
    need(made.returncode == 0, f"libraries that CMake does not find here: {made.stderr[-500:]}")
    made = run("cmake", "--build", folder, "--parallel", "2")
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def host(build):
    """Ask the host."""
    return lambda *arguments: run(build / "paligemma", *arguments)


def asked_of(host, bundle, picture, prompt, *options):
    """What the host answers, in the form of `same_answers`."""
    ended = host(bundle, picture, prompt, "--json", *options)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert list(found) == ["text", "tokens", "logprobs", "boxes", "masks"]
    return {**found, "streamed": found["text"]}


def test_one_file_that_can_be_read():
    lines = (HOSTS / "cpp" / "paligemma.cpp").read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120


def test_it_answers_as_python(host, shipped, golden):
    greedy = [case for case in golden if not case["asked"]["temperature"]]
    assert len(greedy) == 50
    assert sum(bool(case["masks"]) for case in greedy) >= 10
    same_answers(
        greedy, [asked_of(host, shipped.path, case["asked"]["picture"], case["asked"]["prompt"]) for case in greedy]
    )


def drawn(engine, tokenizer, picture, prompt, sampling, most):
    """Tokens that Python draws with the numbers of NumPy's Mersenne twister."""
    twister = np.random.MT19937()
    twister._legacy_seeding(sampling.seed)
    numbers, ids, tokens = np.random.Generator(twister), tokenizer.prompt(prompt), []
    length = np.array([len(ids)], np.int32)
    pixels = engine.preprocess(open_image(picture))
    logits, cache = engine.prefill(pixels, np.array([ids]), length, len(ids) + most)
    while len(tokens) < most:
        token, _ = engine.draw(logits, tokenizer.known(), sampling, numbers.random(1, np.float32))
        if token[0] in engine.config.ends:
            break
        tokens.append(int(token[0]))
        logits, cache = engine.decode(token[:, None], length, cache)
        length = length + 1
    return tokens


def test_it_draws_as_python(host, shipped, golden):
    """For the same random numbers: both have a Mersenne twister."""
    engine, tokenizer, differing = HostSession(shipped, "cpu"), Tokenizer.load(shipped.path, shipped.config), 0
    options = ["--temperature", 2.5, "--top-k", 50, "--top-p", 0.95, "--max-new-tokens", 24, "--seed"]
    for seed, case in enumerate(golden[:: len(golden) // DRAWN][:DRAWN]):
        picture, prompt = case["asked"]["picture"], case["asked"]["prompt"]
        expected = drawn(engine, tokenizer, picture, prompt, Sampling(2.5, 50, 0.95, seed), 24)
        found = asked_of(host, shipped.path, picture, prompt, *options, seed)
        assert found["tokens"] == expected
        assert found["text"] == tokenizer.decode(expected)
        differing += expected != case["tokens"]
    assert differing >= DRAWN // 2


def test_it_checks_itself_by_the_example(host, shipped, tmp_path):
    """As anyone who writes a host would: what example.json says of its picture and prompt is what comes out."""
    example = json.loads((shipped.path / "example.json").read_text())
    (tmp_path / "example.png").write_bytes(base64.b64decode(example["image"]["png"]))
    found, expected = asked_of(host, shipped.path, tmp_path / "example.png", example["prompt"]), example["answer"]
    assert (found["text"], found["tokens"]) == (expected["text"], expected["tokens"])
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    ((box, mask), (expected_box, expected_mask)) = ((each["boxes"][0], each["masks"][0]) for each in (found, expected))
    near = {name: pytest.approx(expected_box[name], abs=1e-4) for name in ("score", "mask_score")}
    assert box == expected_box | near
    assert mask == expected_mask | near


# --- its functions, one by one -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def functions(build, tmp_path_factory):
    """Ask the driver: texts and answers, with the tokenizer of a file, and masks."""
    picture = tmp_path_factory.mktemp("picture") / "640x480.png"
    Image.new("RGB", (640, 480)).save(picture)

    def ask(tokenizer, texts=(), answers=(), masks=(), pictures=()):
        asked = {"tokenizer": tokenizer, "picture": picture, "texts": texts, "answers": answers, "masks": masks}
        asked["pictures"] = pictures
        ended = run(build / "driver", input=json.dumps(asked, default=str))
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return ask


def test_it_reads_answers_as_python(functions, shipped):
    found = functions(shipped.path / "tokenizer.model", answers=[case["text"] for case in DETECTIONS])["boxes"]
    assert len(found) == len(DETECTIONS) > 50
    for case, boxes in zip(DETECTIONS, found, strict=True):
        expected = [box.as_json() for box in detection.parse(case["text"], 640, 480)]
        scores = ("score", "mask_score")
        plain = [{name: value for name, value in box.items() if name not in scores} for box in boxes]
        assert plain == json.loads(json.dumps(expected)), case["what"]


def test_it_spells_as_python(functions, shipped):
    tokenizer = Tokenizer.load(shipped.path, shipped.config)
    found = functions(shipped.path / "tokenizer.model", TEXTS)
    assert found["encoded"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["decoded"] == [tokenizer.decode(ids) for ids in found["encoded"]]


def test_it_sees_what_pillow_sees(functions, shipped, pictures):
    """Every kind of picture that its library reads; to turn one as EXIF data ask is the caller's."""
    read = [file for file in pictures if file.suffix != ".webp" and file.name != "turned.png"]
    assert len(read) >= 9
    found = functions(shipped.path / "tokenizer.model", pictures=read)["pixels"]
    for file, rgb in zip(read, found, strict=True):
        image = np.asarray(open_image(file))
        off = np.abs(np.reshape(rgb, image.shape) - image.astype(int))
        if file.suffix == ".jpg":  # decoders differ in rounding, and in how they widen the colors
            assert off.mean() < 1, file.name
        else:
            assert not off.any(), file.name


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (64, 64), (65, 40), (200, 7), (333, 128)])
def test_it_stretches_masks_as_pillow(functions, shipped, size):
    width, height = size
    mask = np.random.default_rng(width).standard_normal((64, 64)).astype(np.float32)
    asked = {"values": mask.ravel().tolist(), "width": width, "height": height}
    (found,) = functions(shipped.path / "tokenizer.model", masks=[asked])["masks"]
    expected = segmentation.paste(mask, (0, 0, width, height), width, height)
    assert (np.reshape(found, expected.shape) != expected).sum() <= 2  # a value at the very edge of zero


def test_ids_behind_a_tokenizer_that_ends_before_them(functions, tmp_path):
    """As Gemma's own does, whose 256,000 pieces have no location tokens."""
    contents = train()
    (tmp_path / "tokenizer.model").write_bytes(contents)
    tokenizer = Tokenizer(SentencePiece(contents), behind(330))
    texts = ["detect cat", "<loc0000><loc1023>cat<seg000> ; <seg127>", "<loc1024><seg128> the <bos>\n"]
    found = functions(tmp_path / "tokenizer.model", texts)
    assert found["encoded"] == [tokenizer.encode(text) for text in texts]
    assert found["encoded"][1][:2] == [330, 330 + 1023]
    assert found["decoded"] == texts


# --- what can be wrong -------------------------------------------------------------------------------------


def one_line(ended, *words):
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("paligemma: error: ")
    for word in words:
        assert word in line


def test_it_names_what_is_wrong(host, shipped, broken_bundles, tmp_path):
    picture = checkpoint.SHIPPED / "example.png"
    words = {
        "version": "version 1", "evil.onnx": "lists no checksum for ../evil.onnx", "not JSON": "not a bundle",
        "lists no checksum": "weights.bin",
    }  # fmt: skip
    for word, path in broken_bundles.items():
        one_line(host(path, picture, "segment star"), words.get(word, word))
    one_line(host(tmp_path, picture, "caption en"), str(tmp_path), "not a bundle")
    (tmp_path / "notes.png").write_text("not a picture")
    one_line(host(shipped.path, tmp_path / "notes.png", "caption en"), "notes.png", "not a picture")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:2000])
    one_line(host(shipped.path, tmp_path / "half.png", "caption en"), "half.png")
    one_line(host(shipped.path, picture, "star " * 300), "exceeds the capacity of 256")


@pytest.mark.parametrize(
    "options", [(), ("--seed",), ("--seed", "x"), ("--top-p", "-1"), ("--nothing", "1"), ("-",), ("detect star",)]
)
def test_a_wrong_command_line(host, shipped, options):
    given = ["caption en", *options] if options else [""]
    ended = host(shipped.path, checkpoint.SHIPPED / "example.png", *given)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: paligemma BUNDLE IMAGE PROMPT")


def test_plain_text(host, shipped, golden):
    asked = golden[0]["asked"]
    ended = host(shipped.path, asked["picture"], asked["prompt"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, golden[0]["text"] + "\n", "")
