"""The path that CUDA takes, on the CPU provider: one copy of the weights, logits and sampling beside them.

What is special to CUDA is in `test_cuda.py`.
"""

import gc
import weakref

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from export import bundle
from export.cli import run_onnx
from export.session import Session, cuda, device
from export.session.device import DeviceSession
from numpy_ref import checkpoint
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.image import open_image, preprocess
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer, known_ids

PROMPTS = ("caption en", "answer en how many shapes are there?")


@pytest.fixture(scope="module", params=["float32", "float16"])
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device") / request.param
    bundle.write(checkpoint.load(), folder, request.param)
    return bundle.load(folder)


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(device, "SHARED_FROM", 1024)


def draw(engine, sampling, count=12):
    config = engine.config
    tokenizer = Tokenizer.load(engine.bundle.path, config)
    picture = preprocess(open_image(checkpoint.SHIPPED / "example.png"), config.vision.image_size)
    pictures, prompts = np.repeat(picture, len(PROMPTS), 0), [tokenizer.prompt(prompt) for prompt in PROMPTS]
    return np.stack(list(generate(engine, pictures, prompts, known_ids(config, tokenizer.size), count, sampling)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=40, top_p=0.95, seed=7)])
def test_the_same_tokens(opened, sampling):
    """As with logits on the host and NumPy's sampling."""
    assert np.array_equal(draw(DeviceSession(opened, "cpu"), sampling), draw(Session(opened, "cpu"), sampling))


def test_logits_stay_where_they_are(opened):
    engine = DeviceSession(opened, "cpu")
    config = engine.config
    ids = np.array([[config.image_token] * config.vision.patches + [config.bos, 5, 6]])
    pixels, lengths = np.zeros((1, 3, config.vision.image_size, config.vision.image_size)), np.array([ids.shape[1]])
    logits, cache = engine.prefill(pixels, ids, lengths, 80)
    assert isinstance(logits, onnxruntime.OrtValue)
    place = logits.data_ptr()
    logits, cache = engine.decode(ids[:, -1:], lengths, cache)
    assert logits.data_ptr() == place
    assert not np.array_equal(logits.numpy(), 0 * logits.numpy())


def test_weights_are_uploaded_once_with_their_values(opened):
    """What both graphs use has one place, and its bytes are the file's."""
    values = DeviceSession(opened, "cpu")._shared
    weights = checkpoint.flatten(checkpoint.load().params)
    assert {name for name in values if "query_key_value" not in name} <= weights.keys()
    for name in ("text.embedding", "vision.blocks.0.mlp.up.kernel", "text.blocks.3.attention.output.kernel"):
        found = values[name].numpy()
        assert np.array_equal(found, np.asarray(weights[name], found.dtype))


@pytest.mark.parametrize("opened", ["float32"], indirect=True)  # float16 the CPU widens ahead of time, from the file
def test_the_uploaded_weights_are_what_runs(opened, monkeypatch):
    """Others there, other numbers."""
    usual, original = draw(DeviceSession(opened, "cpu"), Sampling(), 3), device.upload

    def other(*arguments):
        values = original(*arguments)
        for name in ("text.blocks.0.mlp.down.kernel", "text.blocks.1.mlp.down.kernel"):
            values[name].update_inplace(-10 * values[name].numpy())
        return values

    monkeypatch.setattr(device, "upload", other)
    assert not np.array_equal(draw(DeviceSession(opened, "cpu"), Sampling(), 3), usual)


def test_bfloat16_goes_up_as_its_bits(tmp_path):
    bundle.write(checkpoint.load(), tmp_path / "out", "bfloat16")
    values = device.upload(bundle.load(tmp_path / "out"), "cpu")
    assert values["text.embedding"].data_type() == "tensor(bfloat16)"
    embedding = checkpoint.flatten(checkpoint.load().params)["text.embedding"]
    assert np.array_equal(cuda.on_host(values["text.embedding"]), np.asarray(embedding, ml_dtypes.bfloat16))


def test_options_are_for_cuda(opened, capsys):
    with pytest.raises(PaliGemmaError, match="--provider-option device_id: options are for CUDA"):
        Session(opened, "cpu", provider_options={"device_id": "1"})
    arguments = [str(checkpoint.SHIPPED / "example.png"), "caption en", "--provider", "cpu", "--provider-option"]
    with pytest.raises(SystemExit):
        run_onnx([*arguments, "device_id"])
    assert "argument --provider-option" in capsys.readouterr().err


def test_a_generation_leaves_nothing_behind(opened):
    """What sampling made for a generation goes with its cache."""
    engine, made = DeviceSession(opened, "cpu"), []
    original = device.Draw.__init__

    def counted(self, *arguments):
        made.append(weakref.ref(self))
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.Draw, "__init__", counted)
        for _ in range(3):
            draw(engine, Sampling(), 4)
        gc.collect()
    assert len(made) == 3
    assert not any(reference() for reference in made)
    assert len(engine._owners) == 0


def test_logits_that_are_no_numbers_draw_an_id_that_exists(opened):
    """A wrong answer, but nothing outside of the buffers is read."""
    engine = DeviceSession(opened, "cpu")
    vocab = engine.config.text.vocab
    logits = onnxruntime.OrtValue.ortvalue_from_numpy(np.full((2, vocab), np.nan, np.float32), "cpu", 0)
    for temperature, top_k in ((0.0, 0), (1.0, 8)):
        token, _ = engine.draw(logits, None, Sampling(temperature, top_k), np.array([0.3, 0.9], np.float32))
        assert ((token >= 0) & (token < vocab)).all()
