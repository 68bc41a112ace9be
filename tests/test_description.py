"""bundle.json as typed fields: what is written is read again, older bundles are, and what is wrong is named."""

import json

import pytest

from export import bundle
from export.bundle.description import Description
from export.model.layers import FUSED, PORTABLE
from numpy_ref import checkpoint
from numpy_ref.errors import PaliGemmaError


@pytest.fixture(scope="module")
def written():
    """The description of a new bundle."""
    return bundle.prepare(checkpoint.load()).description


@pytest.fixture
def data(written):
    """The same as its file has it."""
    return json.loads(json.dumps(written.to_json()))


def test_what_is_written_is_read(written, data):
    assert Description.from_json(data, "bundle.json") == written
    assert json.loads(json.dumps(Description.from_json(data, "bundle.json").to_json())) == data


def test_the_keys_of_the_file_are_a_contract(data):
    """Hosts in other languages read them."""
    assert list(data) == [
        "format", "version", "producer", "precision", "operators", "residual", "max_length", "config", "tokens",
        "prompt", "image", "opset", "graphs", "files", "parity",
    ]  # fmt: skip
    assert list(data["tokens"]) == ["image", "image_tokens", "bos", "eos", "stops", "pad", "newline", "known"]
    assert list(data["image"]) == ["size", "resize", "mean", "std"]
    assert list(data["graphs"]["prefill"]) == ["file", "inputs", "outputs"]
    assert data["graphs"]["decode"]["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["B", 1]}
    assert list(data["files"]["weights.bin"]) == ["bytes", "sha256"]


def test_older_bundles_have_fewer_fields(written, data):
    assert written.operators == FUSED
    for name in ("operators", "residual", "parity"):
        del data[name]
    del data["tokens"]["stops"]
    read = Description.from_json(data, "bundle.json")
    assert read.tokens.stops == [data["tokens"]["eos"]]
    assert (read.operators, read.residual, read.prepacked, read.parity) == (PORTABLE, None, None, None)


def test_newer_bundles_may_have_more(written, data):
    data |= {"adapters": ["a"]}
    data["tokens"]["padding_side"] = "right"
    data["graphs"]["forget"] = data["graphs"]["decode"]
    read = Description.from_json(data, "bundle.json")
    assert read.tokens == written.tokens
    assert read.graphs.keys() == {*written.graphs, "forget"}


def test_a_bundle_of_ids_alone_has_no_newline(written, data):
    data["tokens"]["newline"] = None
    assert Description.from_json(data, "bundle.json").tokens.newline is None


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("precision", "int3", r"precision is 'int3', not one that this program has \(float32, .*int8"),
        ("operators", "webgpu", r"operators is 'webgpu', not one .*\(portable, fused\)"),
        ("residual", 7, "residual is 7, not one"),
        ("max_length", True, "max_length is True, not a whole number from 1 to 256"),
        ("max_length", "100", "max_length is '100'"),
        ("max_length", 0, "max_length is 0"),
        ("config", [], r"config is \[\], not an object"),
        ("tokens.eos", None, r"tokens\.eos is None, not a whole number"),
        ("tokens.newline", "\n", r"tokens\.newline is '\\n', not a list of token ids"),
        ("tokens.known", [[0, 1, 2]], r"tokens\.known is .* pairs"),
        ("prompt", 1, "prompt is 1, not text"),
        ("image.resize", "lanczos", r"image\.resize is 'lanczos', not one .*\(bicubic, bilinear\)"),
        ("image.mean", [0.5], r"image\.mean is \[0\.5\], not a number"),
        ("opset", 24.0, r"opset is 24\.0, not a whole number"),
        ("graphs.decode", "decode.onnx", r"graphs\.decode is 'decode\.onnx', not an object"),
        ("graphs.decode.inputs", None, r"graphs\.decode\.inputs is None, not a list"),
        ("graphs.decode.outputs", [7], r"graphs\.decode\.outputs\.0 is 7, not an object"),
        ("graphs.decode.inputs.0.shape", [None], r"graphs\.decode\.inputs\.0\.shape is \[None\]"),
        ("files.weights.bin", 7, r"files\.weights\.bin is 7, not an object"),
        ("files.weights.bin.bytes", -1, r"files\.weights\.bin\.bytes is -1, not a whole number from 0"),
        ("files.weights.bin.sha256", None, r"files\.weights\.bin\.sha256 is None, not text"),
        ("prepacked", 1, "prepacked is 1, not text"),
    ],
)
def test_what_is_wrong_is_named(data, place, value, words):
    put(data, place, value)
    with pytest.raises(PaliGemmaError, match=rf"^here/bundle\.json is damaged \({words}.*\); export the bundle again$"):
        Description.from_json(data, "here/bundle.json")


def put(data, place, value):
    """Change one field; `place` is its dotted name, in which file names have dots too."""
    *keys, last = place.replace("weights.bin", "weights/bin").split(".")
    for key in keys:
        data = data[int(key) if isinstance(data, list) else key.replace("/", ".")]
    data[last.replace("/", ".")] = value


@pytest.mark.parametrize(
    "place",
    ["precision", "config", "tokens", "tokens.image", "image.size", "graphs", "graphs.sample", "files", "opset"],
)
def test_what_is_missing_is_named(data, place):
    *keys, last = place.split(".")
    holder = data
    for key in keys:
        holder = holder[key]
    del holder[last]
    with pytest.raises(PaliGemmaError, match=rf"^bundle\.json is damaged \({place} is missing\); export the bundle"):
        Description.from_json(data, "bundle.json")
