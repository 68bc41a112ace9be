"""big_vision's npz: a file written with its names from its own shapes, and conversion both ways."""

import io
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from numpy_ref import checkpoint
from numpy_ref.checkpoint import flatten, layouts, load, npz, save_npz, unflatten
from numpy_ref.checkpoint.__main__ import PROG
from numpy_ref.checkpoint.__main__ import main as convert_main
from numpy_ref.checkpoint.blocks import bfloat16
from numpy_ref.cli import run
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import paligemma

from .models import CONFIGS, random_batch, random_params
from .test_checkpoint import refusal

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
    dtype = bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
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


@pytest.mark.parametrize("compressed", [False, True])
def test_transposed_arrays(tmp_path, compressed):
    """NumPy saves the transpose of an array as it lies, in Fortran's order."""
    _, params, arrays = model("paligemma2")
    turned = {name: np.asfortranarray(array) for name, array in arrays.items()}
    loaded = load(write(tmp_path / "model.npz", turned, compressed=compressed))
    expected, actual = flatten(params), flatten(loaded.params)
    assert all(np.array_equal(actual[path], array) for path, array in expected.items())


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


def fused(name="paligemma1"):
    """A model where each head has its own key, whose three projections big_vision keeps in one array."""
    config = as_big_vision(CONFIGS[name])
    config = replace(config, text=replace(config.text, kv_heads=config.text.heads))
    params = unflatten({path: array.astype("f4") for path, array in flatten(random_params(config)).items()})
    arrays = by_hand(config, params, np.float32)
    query, key_value = (arrays.pop(f"llm/layers/attn/{part}_einsum/w") for part in ("q", "kv"))
    arrays["llm/layers/attn/qkv_einsum/w"] = np.concatenate([query[:, None], key_value], axis=1)
    return config, params, arrays


@pytest.mark.parametrize("name", NAMES)
def test_three_projections_in_one(tmp_path, name):
    config, params, arrays = fused(name)
    loaded = load(write(tmp_path / "model.npz", arrays))
    assert loaded.config == config
    for path, array in flatten(params).items():
        assert np.array_equal(flatten(loaded.params)[path], array), path
    save_npz(tmp_path / "again.npz", config, loaded.params)
    with np.load(tmp_path / "again.npz") as again:
        assert set(again.files) == set(arrays)
        assert all(np.array_equal(again[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("mutation", ["two", "rank", "width", "both"])
def test_three_projections_in_one_that_are_refused(tmp_path, mutation):
    _, _, arrays = fused()
    name = "llm/layers/attn/qkv_einsum/w"
    whole = arrays[name]
    arrays |= {
        "two": {name: whole[:, :2]}, "rank": {name: whole[0]}, "width": {name: whole[:, :, :, 1:]},
        "both": {"llm/layers/attn/q_einsum/w": whole[:, 0]},
    }[mutation]  # fmt: skip
    with pytest.raises(PaliGemmaError, match=name):
        load(write(tmp_path / "model.npz", arrays))


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


def test_28b_scales_its_queries_by_width_over_heads():
    released = VARIANTS["paligemma2-28b-224"]
    config = layouts.config_of_npz("x.npz", layouts.npz_shapes(released))
    assert config.text.query_scalar == 144
    assert config.text == replace(released.text, final_softcap=None, windows=())
    assert config.vision == released.vision


# --- differences, named ------------------------------------------------------------------------------------

# No other array has these sizes: another vocabulary and another number of key heads are another model.
FREE = [("llm/embedder/input_embedding", 0), ("llm/layers/attn/kv_einsum/w", 2)]
ARRAYS = [(name, array) for name in NAMES for array in model(name)[2]]


@pytest.mark.parametrize(("name", "array"), ARRAYS)
def test_any_mutation_is_named(tmp_path, name, array):
    _, _, arrays = model(name)
    mutations = {
        "missing": {key: value for key, value in arrays.items() if key != array},
        "name": {("x" + key if key == array else key): value for key, value in arrays.items()},
        "dtype": arrays | {array: arrays[array].astype(np.int64)},
        "rank": arrays | {array: arrays[array][None]},
    }
    for axis, count in enumerate(arrays[array].shape):
        if (array, axis) not in FREE:
            mutations[f"axis {axis}"] = arrays | {array: np.take(arrays[array], range(count - 1), axis)}
            mutations[f"longer axis {axis}"] = arrays | {array: np.take(arrays[array], [0, *range(count)], axis)}
    for mutation, mutated in mutations.items():
        text = refusal(load, write(tmp_path / "model.npz", mutated))
        assert array in str(text), mutation


def test_sizes_that_do_not_belong_together(tmp_path):
    config = as_big_vision(CONFIGS["paligemma1"])
    config = replace(config, text=replace(config.text, kv_heads=4))
    file = write(tmp_path / "model.npz", by_hand(config, random_params(config), np.float32))
    with pytest.raises(PaliGemmaError, match=r"model\.npz: 4 key/value heads do not divide 6 heads"):
        load(file)


def test_a_name_with_and_without_its_prefix(tmp_path):
    _, _, arrays = model("paligemma1")
    with pytest.raises(PaliGemmaError, match=r"llm/final_norm/scale is stored twice"):
        load(write(tmp_path / "model.npz", arrays | {"params/llm/final_norm/scale": arrays["llm/final_norm/scale"]}))


@pytest.mark.parametrize(
    ("descr", "shape"),
    [("'O'", "(1,)"), ("'V0'", "(1,)"), ("'<f4'", "(True,)"), ("'<f4'", "(-1,)"), ("'<f4'", "(1.5,)"), ("'<f4'", f"({2**70},)"),
     ("'zz'", "(1,)"), ("[('a', '<f4')]", "(1,)"), ("'>f4'", "(1,)"), ("'<f4'", "(0,)"),
     ("(" * 9000, "(1,)"), ("(", "(1,)")],
)  # fmt: skip
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_array_headers_that_are_refused(tmp_path, descr, shape, compression):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    contents = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(4)
    with zipfile.ZipFile(tmp_path / "model.npz", "w", compression) as archive:
        archive.writestr("img/embedding/kernel.npy", contents)
    assert str(tmp_path / "model.npz") in refusal(load, tmp_path / "model.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files(tmp_path, compressed):
    """Whatever is damaged, it is refused in one line, or lies in a tensor that is stored plainly."""
    _, _, arrays = model("paligemma2")
    file = write(tmp_path / "model.npz", arrays, compressed=compressed)
    contents = file.read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(150):
        damaged = bytearray(contents)
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(len(damaged)) if rng.random() < 0.5 else len(damaged) - 1 - rng.integers(4000)
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        refusals.append(refusal(load, file))
    assert all(text is None or str(file) in text for text in refusals)
    assert sum(text is not None for text in refusals) > 70


def test_compressed_arrays_need_room_on_disk(tmp_path, monkeypatch):
    _, _, arrays = model("paligemma1")
    file = write(tmp_path / "model.npz", arrays, compressed=True)
    usage = npz.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(npz.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PaliGemmaError, match=r"model\.npz: its compressed arrays take .* TMPDIR"):
        load(file)
    load(write(tmp_path / "plain.npz", arrays))


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
    with pytest.raises(PaliGemmaError, match="holds objects"):
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


@pytest.mark.parametrize(
    ("change", "word"),
    [({"rope_base": 37.0}, r"text\.rope_base 37.0 \(it means 10000.0\)"), ({"eps": 1e-5}, r"text\.eps"),
     ({"attn_softcap": 5.0}, r"text\.attn_softcap"), ({"query_scalar": 13.0}, r"text\.query_scalar")],
)  # fmt: skip
def test_what_a_npz_cannot_say_is_refused(tmp_path, change, word):
    config, params, _ = model("paligemma2")
    config = replace(config, text=replace(config.text, **change))
    with pytest.raises(PaliGemmaError, match=f"cannot say {word}"):
        save_npz(tmp_path / "new.npz", config, params)
    assert not list(tmp_path.iterdir())


def test_what_a_npz_omits_is_reported(tmp_path):
    config, params, _ = model("paligemma2")
    text = replace(config.text, final_softcap=30.0, windows=(7, None, 7))
    checkpoint.save(tmp_path / "hf", replace(config, text=text), params)
    assert checkpoint.convert(tmp_path / "hf", tmp_path / "new.npz") == [
        "final softcap 30.0",
        "sliding window 7",
        "resize bicubic",
    ]
    assert load(tmp_path / "new.npz").config == config
    assert checkpoint.convert(tmp_path / "new.npz", tmp_path / "again") == []


def test_rows_behind_the_image_token_are_not_lost(tmp_path):
    """The image token and up to 63 rows of noise are left out; more rows are tokens."""
    config, params, _ = model("paligemma1")
    text = params["text"]
    for rows, fine in [(64, True), (65, False)]:
        noise = np.ones((rows, config.text.width), np.float32)
        padded = {**params, "text": {**text, "embedding": np.concatenate([text["embedding"], noise])}}
        wide = replace(config, text=replace(config.text, vocab=config.text.vocab + rows))
        if fine:
            save_npz(tmp_path / "new.npz", wide, padded)
            assert np.array_equal(load(tmp_path / "new.npz").params["text"]["embedding"], text["embedding"])
        else:
            with pytest.raises(PaliGemmaError, match="65 rows follow it"):
                save_npz(tmp_path / "other.npz", wide, padded)


def test_tokenizers_of_a_conversion(tmp_path):
    source = tmp_path / "model.npz"
    checkpoint.convert(checkpoint.SHIPPED, source)
    with pytest.raises(PaliGemmaError, match="no room for a tokenizer"):
        checkpoint.convert(checkpoint.SHIPPED, tmp_path / "new.npz", checkpoint.SHIPPED / "tokenizer.model")
    for tokenizer, word in [(source, "not a SentencePiece model"), (tmp_path / "absent", "cannot read the tokenizer")]:
        with pytest.raises(PaliGemmaError, match=word):
            checkpoint.convert(source, tmp_path / "new", tokenizer)
    assert list(tmp_path.iterdir()) == [source]
    checkpoint.convert(source, tmp_path / "json", checkpoint.SHIPPED / "tokenizer.json")
    names = {file.name for file in (tmp_path / "json").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    # One that lies beside the npz is found; the one that is given replaces both forms of what is there.
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint.SHIPPED / name).read_bytes())
    checkpoint.convert(source, tmp_path / "found")
    assert {"tokenizer.model", "tokenizer.json"} <= {file.name for file in (tmp_path / "found").iterdir()}
    checkpoint.convert(tmp_path / "found", tmp_path / "given", tmp_path / "tokenizer.model")
    assert not (tmp_path / "given" / "tokenizer.json").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_mapped(tmp_path, compressed):
    """Also compressed ones, from a file without a name: a model that is read need not fit in memory."""
    _, _, arrays = model("paligemma1")
    loaded = npz.map_npz(write(tmp_path / "model.npz", arrays, compressed=compressed))
    for array in loaded.values():
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)


def test_what_has_to_lie_beside_a_npz_is_named(tmp_path, capsys):
    assert run(PROG, convert_main, ["convert", str(checkpoint.SHIPPED), str(tmp_path / "model.npz")]) == 0
    errors = capsys.readouterr().err
    assert "a .npz cannot record these settings of the model: longest sequence 256" in errors
    assert "a .npz holds weights alone; keep tokenizer.model, tokenizer.json, vae.npz beside it" in errors
    for name in ("tokenizer.model", "tokenizer.json", "vae.npz"):
        shutil.copy(checkpoint.SHIPPED / name, tmp_path)
    assert run(PROG, convert_main, ["convert", str(checkpoint.SHIPPED), str(tmp_path / "again.npz")]) == 0
    assert "beside it" not in capsys.readouterr().err


@pytest.mark.parametrize(("stops", "spelled"), [((1, 107), r"\[1, 107\]"), ((), "none")])
def test_several_stop_tokens_are_named_and_left_out(tmp_path, stops, spelled):
    """A fine-tune whose generation_config.json has a list of them converts all the same."""
    shipped = load()
    checkpoint.save(tmp_path / "model", replace(shipped.config, stops=stops), shipped.params)
    (omitted,) = [
        each for each in checkpoint.convert(tmp_path / "model", tmp_path / "model.npz") if "stop tokens" in each
    ]
    assert re.fullmatch(f"stop tokens {spelled}", omitted)
    assert load(tmp_path / "model.npz").config.stops is None
