"""The graphs around the model that a bundle holds for hosts without NumPy and Pillow: pictures in, tokens out."""

import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export import bundle
from export.model import graphs
from numpy_ref import checkpoint
from numpy_ref.config import PaliGemmaConfig, SiglipConfig
from numpy_ref.image import RESIZES, preprocess
from numpy_ref.model.sampling import log_probability, sample
from numpy_ref.tokenizer import Json, Tokenizer

from .test_sampling import frequencies

STEP = 2 / 255
KNOWN = (np.arange(300) < 280) & (np.arange(300) != 7)


def open_model(model):
    return onnxruntime.InferenceSession(graphs.serialize(model), providers=["CPUExecutionProvider"])


def pictures(width, height):
    """Noise, the worst case, and something smooth."""
    rng = np.random.default_rng(width * 10_000 + height)
    yield Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    yield coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [96, 224])
def test_pictures_are_pillows(resize, size):
    """Up, down, and either side of where Pillow changes the order of its two passes: equal, but for a step of 255."""
    session = open_model(graphs.preprocess_model(PaliGemmaConfig(vision=SiglipConfig(image_size=size)), resize))
    shapes = [
        (97, 131),
        (20, 300),
        (640, 480),
        (96, 96),
        (224, 224),
        (7, 5),
        (1, 1),
        (1000, 30),
        (150, 204),
        (150, 205),
    ]
    shapes += [(480, 736), (480, 737), (480, 864), (480, 865), (50, 3000)]
    for width, height in shapes:
        for picture in pictures(width, height):
            (pixels,) = session.run(None, {"image": np.asarray(picture)})
            expected = preprocess(picture, size, resize=resize)
            assert pixels.shape == expected.shape
            assert pixels.dtype == np.float32
            difference = np.abs(pixels - expected)
            # Ties between two bytes fall apart now and then; the second pass can make two steps of one.
            assert difference.max() <= 2.001 * STEP, (width, height)
            assert (difference > 1.001 * STEP).mean() < 2e-5, (width, height)
            if resize == "bicubic":
                assert (difference > STEP / 2).mean() < 2e-3, (width, height)


@pytest.fixture(scope="module")
def sampler():
    return open_model(graphs.sample_model(KNOWN))


def draw(sampler, logits, temperature, top_k, top_p, uniform):
    feeds = {
        "logits": logits, "temperature": np.array(temperature, np.float32), "top_k": np.array(top_k, np.int64),
        "top_p": np.array(top_p, np.float32), "uniform": uniform,
    }  # fmt: skip
    token, logprob = sampler.run(None, feeds)
    assert (token.dtype, logprob.dtype) == (np.int64, np.float32)
    assert np.abs(logprob - log_probability(logits, token)).max() <= 1e-5
    return token


@pytest.mark.parametrize("uniform", [0.25, 0.5, 0.75])
def test_an_exact_tie_goes_to_the_next(sampler, uniform):
    """As in the reference (tests/test_sampling.py): four tokens of a quarter each."""
    logits = np.full((1, len(KNOWN)), -np.inf, np.float32)
    logits[0, np.flatnonzero(KNOWN)[:4]] = 0
    token = draw(sampler, logits, 1.0, 4, 1.0, np.array([uniform], np.float32))
    assert token.tolist() == [np.flatnonzero(KNOWN)[round(4 * uniform)]]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([0, 1, 5, 299, 1000]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.booleans(),
)  # fmt: skip
def test_the_same_draw_as_the_reference(sampler, seed, temperature, top_k, top_p, ties):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((4, 300))).astype(np.float32)
    logits = np.round(logits) if ties else logits
    uniform = rng.random(4, np.float32)
    token = draw(sampler, logits, temperature, top_k, top_p, uniform)
    assert np.array_equal(token, sample(logits, KNOWN, temperature, top_k, top_p, uniform))
    assert KNOWN[token].all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8)])
def test_frequencies_follow_the_distribution(sampler, temperature, top_k, top_p):
    rng = np.random.default_rng(1)
    logits = np.where(np.arange(300) < 8, rng.standard_normal(300), -30).astype(np.float32)
    expected = frequencies(logits, KNOWN, temperature, top_k, top_p)
    count = 100_000
    token = draw(sampler, np.tile(logits, (count, 1)), temperature, top_k, top_p, rng.random(count, np.float32))
    observed = np.bincount(token, minlength=300) / count
    assert np.abs(observed - expected).max() < 4.5 * np.sqrt(0.25 / count)


def test_a_bundle_alone_answers(tmp_path):
    """The loop of a host: the five graphs, their numbers, and nothing of this project but the tokenizer."""
    loaded = checkpoint.load()
    bundle.write(loaded, tmp_path / "bundle")
    opened = bundle.load(tmp_path / "bundle")
    run = {
        name: onnxruntime.InferenceSession(opened.graph_file(name), providers=["CPUExecutionProvider"])
        for name in opened.description.graphs
    }
    for name, session in run.items():
        listed = opened.description.graphs[name]
        assert [value.name for value in listed.inputs] == [value.name for value in session.get_inputs()]
        assert [value.name for value in listed.outputs] == [value.name for value in session.get_outputs()]
    tokenizer = Tokenizer.load(opened.path, opened.config)
    prompt = tokenizer.prompt("caption en")
    with Image.open(checkpoint.SHIPPED / "example.png") as picture:
        (pixels,) = run["preprocess"].run(None, {"image": np.asarray(picture.convert("RGB"))})
    names = [value.name for value in run["prefill"].get_outputs()]
    feeds = {
        "pixel_values": pixels, "input_ids": np.array([prompt]), "lengths": np.array([len(prompt)], np.int32),
        "capacity": np.array(120),
    }  # fmt: skip
    values = dict(zip(names, run["prefill"].run(None, feeds), strict=True))
    tokens, length = [], len(prompt)
    while len(tokens) < 40:
        settings = {"temperature": np.float32(0), "top_k": 0, "top_p": np.float32(1), "uniform": [np.float32(0.5)]}
        token, _ = run["sample"].run(
            None, {"logits": values["logits"], **{name: np.array(value) for name, value in settings.items()}}
        )
        if token[0] == opened.description.tokens.eos:
            break
        tokens.append(int(token[0]))
        past = {name.replace("present", "past_key_values"): values[name] for name in names[1:]}
        step = {"input_ids": token[:, None], "lengths": np.array([length], np.int32), **past}
        values = dict(zip(names, run["decode"].run(None, step), strict=True))
        length += 1

    from export.session import Session
    from numpy_ref.generate import answers, generate
    from numpy_ref.image import open_image

    engine = Session(opened, "cpu")
    pixels = preprocess(open_image(checkpoint.SHIPPED / "example.png"), opened.config.vision.image_size)
    expected = answers(list(generate(engine, pixels, [prompt], tokenizer.known(), 40)), opened.config.eos)[0]
    assert tokens == expected


def test_big_vision_pictures_go_through_its_filter(tmp_path):
    loaded = replace(checkpoint.load(), resize="bilinear")
    bundle.write(loaded, tmp_path / "bundle")
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "preprocess.onnx", providers=["CPUExecutionProvider"])
    picture = next(pictures(131, 97))
    (pixels,) = session.run(None, {"image": np.asarray(picture)})
    assert np.abs(pixels - preprocess(picture, 96, resize="bilinear")).max() <= 1.001 * STEP


def test_a_bundle_brings_the_tokenizer_that_hosts_read(tmp_path, capsys):
    """A checkpoint with tokenizer.model alone gets the same text and ids out of a tokenizer.json that is made of it."""
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.SHIPPED, source)
    (source / "tokenizer.json").unlink()
    bundle.write(checkpoint.load(source), tmp_path / "bundle")
    assert capsys.readouterr().err == ""
    opened = bundle.load(tmp_path / "bundle")
    made = Tokenizer(Json((opened.path / "tokenizer.json").read_bytes()), opened.config)
    text = "detect red star ; <loc0001> naïve"
    assert made.prompt(text) == Tokenizer.load(source, opened.config).prompt(text)
    assert bundle.plan(checkpoint.load(source))["files"].keys() == {*opened.description.files, "bundle.json"}
