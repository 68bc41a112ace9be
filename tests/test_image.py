"""Pictures: against Pillow by hand, and the settings that a checkpoint selects."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from numpy_ref import checkpoint
from numpy_ref.checkpoint.hugging_face import resize_from_hf, resize_to_hf
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import (
    MAX_SIDE,
    RESIZES,
    TRANSPARENCIES,
    decode_image,
    open_image,
    preprocess,
)

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


# --- transparency ------------------------------------------------------------------------------------------


def transparent(mode):
    """A picture whose pixels are transparent to different degrees, in a mode that can say so."""
    image = Image.merge("RGBA", [noise(19, 14, "L").rotate(90 * turn) for turn in range(4)])
    if mode == "P":
        return image.quantize(32)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_as_in_transformers(tmp_path, mode):
    from transformers import SiglipImageProcessor

    transparent(mode).save(tmp_path / "image.png")
    processor = SiglipImageProcessor(size={"height": 21, "width": 21})
    expected = processor(Image.open(tmp_path / "image.png"), return_tensors="np")["pixel_values"]
    actual = preprocess(open_image(tmp_path / "image.png"), 21)
    assert np.abs(actual - expected).max() < 1.1 / 127.5  # its own resize is a step off here and there
    flat = np.asarray(open_image(tmp_path / "image.png"))
    rgba = np.asarray(Image.open(tmp_path / "image.png").convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(flat - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_transparency_can_be_dropped(tmp_path):
    transparent("RGBA").save(tmp_path / "image.png")
    dropped = open_image(tmp_path / "image.png", transparency="drop")
    assert np.array_equal(dropped, np.asarray(transparent("RGBA"))[..., :3])
    assert TRANSPARENCIES == ("white", "drop")


def test_a_black_square_on_nothing(tmp_path):
    """The picture that is all black where the alpha channel is dropped: two icons in three are drawn so."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    image.save(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png").getcolors() == [(48, (255, 255, 255)), (16, (0, 0, 0))]


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "floating-point numbers, which have no fixed range"),
        (np.arange(64, dtype=np.int32).reshape(8, 8), "32-bit whole numbers below 256, which have no fixed range"),
    ],
)
def test_numbers_without_a_range_are_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "image.tiff")
    with pytest.raises(PaliGemmaError, match=message):
        open_image(tmp_path / "image.tiff")


def test_sixteen_bits_of_every_format(tmp_path):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(pixels / 257).astype(np.uint8)
    for name in ("image.tiff", "image.png"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], expected)
    (tmp_path / "image.pgm").write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(open_image(tmp_path / "image.pgm"))[..., 0], expected)


def test_a_side_is_bounded_too(tmp_path):
    (tmp_path / "thin.pgm").write_bytes(b"P5 %d 1 255\n" % (MAX_SIDE + 1) + bytes(MAX_SIDE + 1))
    with pytest.raises(PaliGemmaError, match=f"{MAX_SIDE + 1} by 1 pixels; a side may have {MAX_SIDE}"):
        open_image(tmp_path / "thin.pgm")


def test_what_is_no_picture_file_is_named(tmp_path):
    with pytest.raises(PaliGemmaError, match="a folder, not a picture; run-onnx-batch"):
        open_image(tmp_path)
    with pytest.raises(PaliGemmaError, match="pictures are not fetched from the net"):
        open_image("https://example.com/cat.png")


# --- HEIC --------------------------------------------------------------------------------------------------


@pytest.fixture
def heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(tmp_path / "image.heic")
    return tmp_path / "image.heic"


def test_heic_is_read_where_its_reader_is_installed(heic):
    image = open_image(heic)
    assert (image.size, image.mode) == ((64, 48), "RGB")
    assert np.abs(np.asarray(image).mean((0, 1)) - [200, 30, 40]).max() < 4


def test_heic_names_its_reader_where_it_is_not(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (lambda: open_image(heic), lambda: decode_image(io.BytesIO(heic.read_bytes()), "name")):
        with pytest.raises(
            PaliGemmaError, match=r"a HEIC picture, which takes pillow-heif \(the extra `heic`\): pip install"
        ):
            read()
