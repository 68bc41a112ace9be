"""big_vision's npz: a file written with its names from its own shapes, and conversion both ways."""

import io
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from numpy_ref import checkpoint, paligemma, storage
from numpy_ref.checkpoint import flatten, load, save_npz, unflatten
from numpy_ref.errors import PaliGemmaError

from .models import CONFIGS, random_batch, random_params

NAMES = list(CONFIGS)


def as_big_vision(config):
    """The config as a npz can say it: square patches that fill the picture, tied, no caps but 50, no windows."""
    text = replace(config.text, tied=True, final_softcap=None, windows=(), rope_base=10000.0, vocab=52)
    if text.post_norms:
        text = replace(text, attn_softcap=50.0)
    text = replace(text, query_scalar=float(text.head_dim))
    return replace(config, vision=replace(config.vision, image_size=21), text=text, max_length=8192)


def by_hand(config, params, dtype) -> dict[str, np.ndarray]:
    """big_vision's arrays, made from ours with its shapes as `models/ppp/gemma.py` and `models/vit.py` give them."""
    v, t, vision, text = config.vision, config.text, params["vision"], params["text"]
    N, K, H, D = t.heads, t.kv_heads, t.head_dim, t.width  # noqa: N806
    n, h, d, s = v.heads, v.width // v.heads, v.width, v.patch_size

    def stack(blocks, get):
        return np.stack([get(block) for block in blocks])

    def heads(kernel, count):  # [D, count*H] -> [count, D, H]
        return np.stack([kernel[:, i * H : (i + 1) * H] for i in range(count)])

    out = {
        "img/embedding/kernel": np.stack([vision["patch_embed"]["kernel"][c * s * s : (c + 1) * s * s].reshape(s, s, d) for c in range(3)], 2),
        "img/embedding/bias": vision["patch_embed"]["bias"],
        "img/pos_embedding": vision["position_embedding"][None],
        "img/head/kernel": params["projector"]["kernel"], "img/head/bias": params["projector"]["bias"],
        "llm/embedder/input_embedding": text["embedding"], "llm/final_norm/scale": text["norm"]["scale"],
        "llm/layers/attn/q_einsum/w": stack(text["blocks"], lambda b: heads(b["attention"]["query"]["kernel"], N)),
        "llm/layers/attn/kv_einsum/w": stack(text["blocks"], lambda b: np.stack([heads(b["attention"][x]["kernel"], K) for x in ("key", "value")])),
        "llm/layers/attn/attn_vec_einsum/w": stack(text["blocks"], lambda b: b["attention"]["output"]["kernel"].reshape(N, H, D)),
        "llm/layers/mlp/gating_einsum": stack(text["blocks"], lambda b: np.stack([b["mlp"]["gate"]["kernel"], b["mlp"]["up"]["kernel"]])),
        "llm/layers/mlp/linear": stack(text["blocks"], lambda b: b["mlp"]["down"]["kernel"]),
    }  # fmt: skip
    for side in ("scale", "bias"):
        out[f"img/Transformer/encoder_norm/{side}"] = vision["norm"][side]
        for i, name in enumerate(["attention_norm", "mlp_norm"]):
            out[f"img/Transformer/encoderblock/LayerNorm_{i}/{side}"] = stack(
                vision["blocks"], lambda b, name=name, side=side: b[name][side]
            )
    for i, name in enumerate(["up", "down"]):
        for side in ("kernel", "bias"):
            out[f"img/Transformer/encoderblock/MlpBlock_0/Dense_{i}/{side}"] = stack(
                vision["blocks"], lambda b, name=name, side=side: b["mlp"][name][side]
            )
    attention = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        out[f"{attention}/{name}/kernel"] = stack(
            vision["blocks"], lambda b, name=name: b["attention"][name]["kernel"].reshape(d, n, h)
        )
        out[f"{attention}/{name}/bias"] = stack(
            vision["blocks"], lambda b, name=name: b["attention"][name]["bias"].reshape(n, h)
        )
    out[f"{attention}/out/kernel"] = stack(
        vision["blocks"], lambda b: b["attention"]["output"]["kernel"].reshape(n, h, d)
    )
    out[f"{attention}/out/bias"] = stack(vision["blocks"], lambda b: b["attention"]["output"]["bias"])
    norms = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}
    if t.post_norms:
        norms |= {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_mlp_norm"}
    for foreign, ours in norms.items():
        out[f"llm/layers/{foreign}/scale"] = stack(text["blocks"], lambda b, ours=ours: b[ours]["scale"])
    return {name: np.ascontiguousarray(array).astype(dtype) for name, array in out.items()}


def model(name, dtype="float32"):
    config = as_big_vision(CONFIGS[name])
    dtype = storage.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    params = unflatten({path: array.astype(dtype) for path, array in flatten(random_params(config)).items()})
    return config, params, by_hand(config, params, dtype)


def write(file, arrays, prefix="", compressed=False):
    """As NumPy itself writes it: bfloat16 becomes two-byte void."""
    raw = {prefix + name: array.view("V2") if array.dtype.itemsize == 2 else array for name, array in arrays.items()}
    (np.savez_compressed if compressed else np.savez)(file, **raw)
    return file


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_loads(tmp_path, name, dtype, prefix, compressed):
    config, params, arrays = model(name, dtype)
    loaded = load(write(tmp_path / "model.npz", arrays, prefix, compressed))
    assert loaded.config == config
    assert loaded.dtype.name == dtype
    assert loaded.resize == "bilinear"
    expected = flatten(params)
    actual = flatten(loaded.params)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert np.array_equal(actual[path], array), path


@pytest.mark.parametrize("name", NAMES)
def test_the_same_logits(tmp_path, name):
    config, params, arrays = model(name)
    loaded = load(write(tmp_path / "model.npz", arrays))
    pixel_values, input_ids, lengths = random_batch(replace(config, text=replace(config.text, vocab=50)))
    arguments = pixel_values[..., :21, :21], input_ids, lengths, 20
    expected, _ = paligemma.prefill(params, config, *arguments)
    actual, _ = paligemma.prefill(loaded.params, loaded.config, *arguments)
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()  # equal weights, other memory layouts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    _, _, arrays = model(name, dtype)
    first = write(tmp_path / "first.npz", arrays)
    convert(first, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "second.npz")
    with np.load(first) as a, np.load(tmp_path / "second.npz") as b:
        assert set(a.files) == set(b.files)
        for key in a.files:
            assert a[key].dtype == b[key].dtype
            assert a[key].tobytes() == b[key].tobytes(), key
    # And once more, into the very same file.
    convert(tmp_path / "second.npz", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "third.npz")
    assert (tmp_path / "second.npz").read_bytes() == (tmp_path / "third.npz").read_bytes()


def convert(source, target, *options):
    command = [sys.executable, "-m", "numpy_ref.checkpoint", "convert", str(source), str(target), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {target}\n"


def test_what_travels_along(tmp_path):
    convert(checkpoint.SHIPPED, tmp_path / "model.npz")
    convert(tmp_path / "model.npz", tmp_path / "hf", "--tokenizer", checkpoint.SHIPPED / "tokenizer.model")
    loaded = load(tmp_path / "hf")
    assert loaded.resize == "bilinear"  # remembered through preprocessor_config.json
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (checkpoint.SHIPPED / "tokenizer.model").read_bytes()
    shipped = load(checkpoint.SHIPPED)
    rows = shipped.config.image_token  # big_vision has no row for the image token, nor padding
    assert np.array_equal(loaded.params["text"]["embedding"], shipped.params["text"]["embedding"][:rows])


@pytest.mark.filterwarnings("ignore")
def test_transformers_takes_the_conversion(tmp_path):
    """Its logits for a converted npz are the reference's, although the image token lies past the table."""
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    from .make_goldens import answer, pixels

    config, _, arrays = model("paligemma2")
    convert(write(tmp_path / "model.npz", arrays), tmp_path / "hf")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    ids = [config.image_token] * 9 + [2, 7, 11, 13]
    image = pixels(theirs.config, 1)
    logits, _ = answer(theirs.eval(), image[0], ids, 1)
    ours, _ = paligemma.prefill(load(tmp_path / "hf").params, config, image, np.array([ids]), np.array([13]), 13)
    assert np.abs(ours[0] - logits).max() <= 1e-5 * np.abs(logits).max()


def test_28b_scales_its_queries_by_width_over_heads(monkeypatch):
    """Only the shapes matter here, so the arrays are empty of memory."""
    shapes = checkpoint._npz_shapes(replace(checkpoint.VARIANTS["paligemma2-28b-224"]))
    stored = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config = checkpoint._config_of_npz("x.npz", stored)
    assert config.text.query_scalar == 144
    released = checkpoint.VARIANTS["paligemma2-28b-224"]
    assert config.text == replace(released.text, final_softcap=None, windows=())
    assert config.vision == released.vision


# --- differences, named ------------------------------------------------------------------------------------

ARRAYS = [(name, array) for name in NAMES for array in model(name)[2]]


@pytest.mark.parametrize(("name", "array"), ARRAYS)
def test_any_mutation_is_named(tmp_path, name, array):
    _, _, arrays = model(name)
    mutations = {
        "missing": {key: value for key, value in arrays.items() if key != array},
        "name": {("x" + key if key == array else key): value for key, value in arrays.items()},
        "dtype": arrays | {array: arrays[array].astype(np.float64)},
        "rank": arrays | {array: arrays[array][None]},
    }
    for mutated in mutations.values():
        with pytest.raises(PaliGemmaError) as error:
            load(write(tmp_path / "model.npz", mutated))
        assert array in str(error.value)
    # A changed size may be taken for another config, whose other tensors are then wrong; it is refused either way.
    with pytest.raises(PaliGemmaError):
        load(write(tmp_path / "model.npz", arrays | {array: arrays[array][..., :-1]}))


def test_files_that_are_none(tmp_path):
    _, _, arrays = model("paligemma1")
    file = write(tmp_path / "model.npz", arrays)
    contents = file.read_bytes()
    for broken in (b"", b"hello", contents[: len(contents) // 2], contents[:-10]):
        file.write_bytes(broken)
        with pytest.raises(PaliGemmaError, match=r"model\.npz: not a whole"):
            load(file)
    with pytest.raises(PaliGemmaError, match="no such checkpoint"):
        load(tmp_path / "absent.npz")


def test_nothing_is_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("img/embedding/kernel.npy", buffer.getvalue())
    with pytest.raises(PaliGemmaError, match="not a plain"):
        load(tmp_path / "model.npz")


def test_existing_outputs_are_kept(tmp_path):
    _, _, arrays = model("paligemma1")
    file = write(tmp_path / "model.npz", arrays)
    before = file.read_bytes()
    with pytest.raises(PaliGemmaError, match="exists already"):
        checkpoint.convert(file, file)
    with pytest.raises(PaliGemmaError, match="untied"):
        save_npz(tmp_path / "new.npz", CONFIGS["paligemma2"], random_params(CONFIGS["paligemma2"]))
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.npz"]


def test_plain_members_are_mapped(tmp_path):
    _, _, arrays = model("paligemma1")
    loaded = storage.map_npz(write(tmp_path / "model.npz", arrays))
    for array in loaded.values():
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
