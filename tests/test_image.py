"""Pictures: against Pillow by hand, and the settings that a checkpoint selects."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from numpy_ref import checkpoint
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import RESIZES, open_image, preprocess, resize_from_hf, resize_to_hf

from .make_goldens import GOLDEN


def noise(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("size", [(97, 131), (20, 300), (64, 64), (7, 5)])
def test_bicubic_is_pillows(size):
    image = noise(*size)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(np.float64)
    actual = preprocess(image, 64)
    assert actual.shape == (1, 3, 64, 64)
    assert actual.dtype == np.float32
    assert np.abs(actual[0].transpose(1, 2, 0) - (expected / 127.5 - 1)).max() < 1e-6


def test_bilinear_cuts_off_instead_of_rounding():
    image = noise(97, 131)
    rounded = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    cut = RESIZES["bilinear"](image, 64).astype(int)
    assert set(np.unique(rounded - cut)) <= {0, 1}
    assert 0.3 < (rounded - cut).mean() < 0.7  # about half of all values round up


def test_the_range_is_minus_one_to_one():
    for value in (0, 255):
        pixels = preprocess(Image.new("RGB", (5, 5), (value,) * 3), 8)
        assert np.array_equal(pixels, np.full((1, 3, 8, 8), value / 127.5 - 1, np.float32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    noise(9, 7, "L").convert(mode).save(tmp_path / "image.tiff")
    assert open_image(tmp_path / "image.tiff").mode == "RGB"


def test_settings_round_trip():
    vision = checkpoint.load_config(GOLDEN / "paligemma1").vision
    for name in RESIZES:
        assert resize_from_hf(resize_to_hf(name, vision)) == name
    assert resize_from_hf({}) == "bicubic"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"resample": 0}, "resample"), ({"image_mean": [0.48, 0.45, 0.4]}, "image_mean"), ({"do_normalize": False}, "do_normalize"),
     ({"rescale_factor": 1.0}, "rescale_factor"), ({"do_resize": False}, "do_resize")],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path, change, word):
    folder = shutil.copytree(GOLDEN / "paligemma1", tmp_path / "checkpoint")
    (folder / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(PaliGemmaError, match=f"preprocessor_config.json: {word}"):
        checkpoint.load(folder)


def test_the_checkpoint_selects(tmp_path):
    folder = shutil.copytree(GOLDEN / "paligemma1", tmp_path / "checkpoint")
    assert checkpoint.load(folder).resize == "bicubic"
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 2}))
    assert checkpoint.load(folder).resize == "bilinear"


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PaliGemmaError, match=r"big\.png"):
        open_image(tmp_path / "big.png")
