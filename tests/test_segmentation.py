"""Masks: the codec, its files, and the way into a picture and back."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from numpy_ref import detection, scenes
from numpy_ref.checkpoint import SHIPPED, flatten
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import segmentation
from torch_impl.load import to_tensor
from torch_impl.model.segmentation import Codec, CodecConfig, Speller, random_masks, save

from .cases import random_like


@pytest.fixture(scope="module")
def shipped():
    return segmentation.load(segmentation.find(SHIPPED))


def test_a_mask_survives_its_sixteen_tokens(shipped):
    """Of masks that training did not see: mean overlap over union 0.98 when this was written."""
    masks = random_masks(np.random.default_rng(12345), 200)
    painted = segmentation.decode(shipped, segmentation.encode(shipped, masks))
    inside, found = masks > 0, painted > 0
    overlap = (inside & found).sum((1, 2)) / (inside | found).sum((1, 2))
    assert overlap.mean() > 0.96
    assert overlap.min() > 0.8


def test_tokens_are_the_same_in_torch(shipped):
    masks = random_masks(np.random.default_rng(1), 20)
    codec = Codec()
    codec.load_state_dict({name: to_tensor(array) for name, array in flatten(shipped).items()})
    with torch.inference_mode():
        codes = codec.encode(torch.from_numpy(masks))
    assert np.array_equal(codes.numpy(), segmentation.encode(shipped, masks))


def test_the_nearest_code_word():
    rng = np.random.default_rng(0)
    vectors, book = rng.standard_normal((3, 4, 5)), rng.standard_normal((7, 5))
    expected = ((vectors[:, :, None] - book) ** 2).sum(-1).argmin(-1)
    assert np.array_equal(segmentation.quantize(vectors, book), expected)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_the_official_structure(part):
    """The same layers written as torch's own Sequential, which numbers them as `vae-oid.npz` does."""

    class Res(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            conv, relu = torch.nn.Conv2d, torch.nn.ReLU()
            self.net = torch.nn.Sequential(
                conv(width, width, 3, padding=1), relu, conv(width, width, 3, padding=1), relu, conv(width, width, 1)
            )

        def forward(self, x):
            return x + self.net(x)

    config, relu = CodecConfig(16, 6), torch.nn.ReLU()
    params = random_like(Codec(config))
    if part == "decoder":
        widths, layers = (16, 16, 8, 4, 2), [torch.nn.Conv2d(6, 16, 1), relu, Res(16), Res(16)]
        for a, b in itertools.pairwise(widths):
            layers += [torch.nn.ConvTranspose2d(a, b, 4, 2, 1), relu]
        layers.append(torch.nn.Conv2d(2, 1, 1))
    else:
        widths, layers = (1, 4, 8, 16, 16), []
        for a, b in itertools.pairwise(widths):
            layers += [torch.nn.Conv2d(a, b, 4, 2, 1), relu]
        layers += [Res(16), Res(16), torch.nn.Conv2d(16, 6, 1)]
    official = torch.nn.Sequential(*layers).double()
    flat, table = flatten(params), segmentation.names()
    prefix = f"{part}."
    state = {name[len(prefix) :]: to_tensor(flat[path]) for path, name in table.items() if name.startswith(prefix)}
    official.load_state_dict(state)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        if part == "decoder":
            words = rng.standard_normal((2, 4, 4, 6))
            expected = official(to_tensor(words.transpose(0, 3, 1, 2)))[:, 0].numpy()
            actual = segmentation.decoder(params["decoder"], words)
        else:
            masks = rng.standard_normal((2, 64, 64))
            expected = official(to_tensor(masks[:, None])).numpy().transpose(0, 2, 3, 1)
            actual = segmentation.encoder(params["encoder"], masks)
    assert np.abs(actual - expected).max() < 1e-12 * np.abs(expected).max()


# --- files -------------------------------------------------------------------------------------------------


@pytest.fixture
def weights():
    return random_like(Codec(CodecConfig(8, 5)))


def test_files_come_back(weights, tmp_path):
    save(tmp_path / "vae-oid.npz", weights)
    assert segmentation.find(tmp_path) == tmp_path / "vae-oid.npz"
    loaded = flatten(segmentation.load(tmp_path / "vae-oid.npz"))
    assert loaded.keys() == flatten(weights).keys()
    assert all(np.array_equal(loaded[path], array) for path, array in flatten(weights).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoder.3.net.2.bias"), "missing decoder.3.net.2.bias"),
        (lambda t: t.update({"decoder.0.weight": t["decoder.0.weight"][:, :3]}), "not the weights of a mask codec"),
        (lambda t: t.update({"_vq_vae._embedding": t["_vq_vae._embedding"][:99]}), "99 code words"),
        (lambda t: t.update({"decoder.12.bias": np.array([np.nan], np.float32)}), "not to finite"),
    ],
)
def test_a_wrong_file_is_named(weights, tmp_path, change, words):
    flat = flatten(weights)
    tensors = {name: flat[path] for path, name in segmentation.names().items()}
    change(tensors)
    np.savez(tmp_path / "vae.npz", **tensors)  # our own writer refuses what is not finite
    with pytest.raises(PaliGemmaError, match=words):
        segmentation.load(tmp_path / "vae.npz")


def test_no_file(tmp_path):
    assert segmentation.find(tmp_path) is None
    with pytest.raises(PaliGemmaError, match="no such file"):
        segmentation.load(tmp_path / "vae.npz")


# --- in a picture ------------------------------------------------------------------------------------------


def test_cut_out_and_put_back():
    scene = scenes.random_scene(np.random.default_rng(3), most=1)
    mask = scene.visible(0, 224)
    box = scene.things[0].box
    again = segmentation.paste(segmentation.crop(mask, box), [224 * side for side in box], 224, 224)
    assert (mask & again).sum() / (mask | again).sum() > 0.95


@pytest.mark.parametrize("box", [(-5, 3, 4, 9), (6, 2, 30, 9), (2, -9, 5, 40), (0, 0, 10, 12), (2.9, 3.9, 6.9, 7.9)])
def test_boxes_over_the_edge(box):
    mask = segmentation.paste(np.ones((64, 64), np.float32), box, 10, 12)
    assert mask.shape == (12, 10)
    rows, columns = np.nonzero(mask)
    x1, y1, x2, y2 = map(int, box)
    assert (columns.min(), rows.min()) == (max(0, x1), max(0, y1))
    assert (columns.max(), rows.max()) == (min(10, x2) - 1, min(12, y2) - 1)


@pytest.mark.parametrize("box", [(3, 3, 3, 9), (3, 3, 9, 3.9), (3.1, 3.1, 3.9, 9), (9, 9, 3, 3), (5, 5, 5, 5)])
def test_boxes_without_a_pixel(box):
    """Flat, inverted, or within one pixel: big_vision counts an overlap of zero; the mask is empty."""
    assert not segmentation.paste(np.ones((64, 64), np.float32), box, 10, 12).any()


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 1023)] * 4), st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32))
def test_masks_are_pasted_as_big_vision_compares_them(locations, width, height, seed):
    """Its evaluator's steps, from tokens to pixels (`evaluators/proj/paligemma/transfers/segmentation.py`)."""
    from PIL import Image

    mask = np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)
    text = "".join(f"<loc{number:04d}>" for number in locations)
    (box,) = detection.parse(f"{text} thing", width, height)
    found = segmentation.paste(mask, box.corners, width, height)

    top, left, bottom, right = np.array(locations) / 1023
    top, left, bottom, right = map(int, (top * height, left * width, bottom * height, right * width))
    expected = np.zeros((height, width), bool)
    if right > left and bottom > top:
        size = [right - left, bottom - top]
        expected[top:bottom, left:right] = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR)) > 0
    assert np.array_equal(found, expected)


@settings(deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 4), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_masks_are_cut_out_at_whole_pixels(corners, width, height, seed):
    """big_vision rounds the corners, halves to even, cuts, and resizes in floating point to 64 x 64 (antialiased)."""
    from torch.nn.functional import interpolate

    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    x1, y1, x2, y2 = corners
    found = segmentation.crop(mask, corners)
    assert (found.shape, found.dtype) == ((64, 64), np.float32)
    left, top, right, bottom = (int(np.rint(side)) for side in (x1 * width, y1 * height, x2 * width, y2 * height))
    if left < right and top < bottom:
        cut = torch.from_numpy(mask[None, None, top:bottom, left:right].astype(np.float32))
        expected = interpolate(cut, (64, 64), mode="bilinear", antialias=True)[0, 0].numpy() * 2 - 1
        assert np.abs(found - expected).max() < 1e-5


@settings(deadline=None)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=7)))
def test_run_lengths_come_back(mask):
    counts = segmentation.run_lengths(mask)
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
    assert np.array_equal(values.reshape(mask.shape, order="F"), mask)
    assert all(counts[1:])


@settings(deadline=None)
@given(st.lists(st.integers(0, 127), min_size=16, max_size=16))
def test_spelling(codes):
    from numpy_ref.detection import parse

    text = f"<loc0000><loc0000><loc0100><loc0100>{segmentation.spell(codes)} thing"
    assert list(parse(text, 10, 10)[0].codes) == codes


def test_masks_are_spelled_once(shipped):
    masks = Speller(shipped)
    scene = scenes.random_scene(np.random.default_rng(5))
    seen, box = scene.visible(0, 256), scene.things[0].box
    assert masks(seen, box) == masks(seen, box)
    assert masks(seen, box).count("<seg") == 16
