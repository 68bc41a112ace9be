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


def triangle(size, target):
    """The weights [target, size] of TensorFlow's antialiased bilinear resize: a triangle as wide as the shrinkage."""
    ratio = size / target
    width = max(ratio, 1)
    centres = (np.arange(target) + 0.5) * ratio
    weights = np.maximum(1 - np.abs(np.arange(size)[None] + 0.5 - centres[:, None]) / width, 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(97, 131), (20, 300), (65, 63), (7, 5)])
def test_bilinear_is_a_triangle(size):
    """Against the filter written out, in float64: equal but where a value lies within 1e-3 of a whole number."""
    image = noise(*size)
    pixels = np.asarray(image).astype(float)
    exact = np.einsum("yh,hwc,xw->yxc", triangle(size[1], 64), pixels, triangle(size[0], 64))
    decided = np.abs(exact - np.round(exact)) > 1e-3
    actual = RESIZES["bilinear"](image, 64)
    assert np.array_equal(actual[decided], np.floor(exact[decided]))
    assert decided.mean() > 0.9


@pytest.mark.parametrize("resize", RESIZES)
def test_flat_colours_stay(resize):
    """A sum of weights a little below one must not lose a step where values are cut off."""
    for width, height, value in [(500, 333, 201), (1, 1, 254), (1023, 7, 255), (5, 5, 0), (448, 449, 1)]:
        pixels = preprocess(Image.new("RGB", (width, height), (value,) * 3), 56, resize=resize)
        assert np.unique(np.round((pixels + 1) * 127.5, 3)).tolist() == [value]


def test_the_range_is_minus_one_to_one():
    for value in (0, 255):
        pixels = preprocess(Image.new("RGB", (5, 5), (value,) * 3), 8)
        assert np.array_equal(pixels, np.full((1, 3, 8, 8), value / 127.5 - 1, np.float32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    noise(9, 7, "L").convert(mode).save(tmp_path / "image.tiff")
    assert open_image(tmp_path / "image.tiff").mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, mode):
    """Pillow's own conversion would make nearly all of it white."""
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.int32)).save(tmp_path / "deep.tif")
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.tif"))[..., 1], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    """A telephone writes the sensor's picture and how it was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    sensor = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8))
    sensor.save(tmp_path / "held.png", exif=exif)
    upright = {
        1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90,
    }[orientation](np.asarray(sensor))  # fmt: skip
    assert np.array_equal(open_image(tmp_path / "held.png"), upright)


def test_settings_round_trip():
    vision = checkpoint.load_config(GOLDEN / "paligemma1").vision
    for name in RESIZES:
        assert resize_from_hf(resize_to_hf(name, vision)) == name
        assert resize_from_hf(resize_to_hf(name, vision), vision.image_size) == name
    assert resize_from_hf({}, 23) == "bicubic"
    assert resize_from_hf({"size": 23, "resample": None, "do_convert_rgb": None}, 23) == "bicubic"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"resample": 0}, "resample"), ({"image_mean": [0.48, 0.45, 0.4]}, "image_mean"), ({"do_normalize": False}, "do_normalize"),
     ({"rescale_factor": 1.0}, "rescale_factor"), ({"do_resize": False}, "do_resize"), ({"do_center_crop": True}, "do_center_crop"),
     ({"do_convert_rgb": False}, "do_convert_rgb"), ({"size": {"height": 20, "width": 21}}, "size"),
     ({"size": {"shortest_edge": 21}}, "size"), ({"size": 448}, "size"), ([], "does not hold")],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path, change, word):
    folder = shutil.copytree(GOLDEN / "paligemma1", tmp_path / "checkpoint")
    (folder / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(PaliGemmaError, match=f"preprocessor_config.json:? {word}"):
        checkpoint.load(folder)


def test_the_checkpoint_selects(tmp_path):
    folder = shutil.copytree(GOLDEN / "paligemma1", tmp_path / "checkpoint")
    assert checkpoint.load(folder).resize == "bicubic"
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 2}))
    assert checkpoint.load(folder).resize == "bilinear"
    # transformers 5 puts it inside the processor's file, which then counts; older ones have nothing of it there.
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "PaliGemmaProcessor"}))
    assert checkpoint.load(folder).resize == "bilinear"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"resample": 3}}))
    assert checkpoint.load(folder).resize == "bicubic"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"resample": 5}}))
    with pytest.raises(PaliGemmaError, match=r"checkpoint: processor_config\.json: resample is 5"):
        checkpoint.load(folder)


@pytest.mark.filterwarnings("ignore")
def test_transformers_writes_what_selects(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    folder = shutil.copytree(checkpoint.SHIPPED, tmp_path / "checkpoint")
    processor = transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
    processor.image_processor.resample = 2
    processor.save_pretrained(folder)
    assert checkpoint.load(folder).resize == "bilinear"


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PaliGemmaError, match=r"big\.png"):
        open_image(tmp_path / "big.png")
