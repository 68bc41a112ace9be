"""Loading Hugging Face directories: every layout that exists, and every difference named."""

import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import flatten, load, load_config, parameters, save, save_npz, saved_name, unflatten
from numpy_ref.checkpoint.blocks import bfloat16
from numpy_ref.checkpoint.hugging_face import from_hf, to_hf
from numpy_ref.checkpoint.layouts import pooling_head
from numpy_ref.config import VARIANTS
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.files import new_directory, new_file
from torch_impl.load import TorchEngine

from . import make_goldens
from .make_goldens import GOLDEN
from .models import CONFIGS, random_params

NAMES = ["paligemma1", "paligemma2"]


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """A checkpoint directory to break."""
    return shutil.copytree(GOLDEN / request.param, tmp_path / "checkpoint")


def same(a: dict, b: dict) -> bool:
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def refusal(function, *arguments) -> str | None:
    """The one line by which the arguments are refused, None if they are not; anything else is raised."""
    try:
        function(*arguments)
    except PaliGemmaError as error:
        return str(error) if "\n" not in str(error) else "more than one line"
    return None


# --- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    # Totals of keras-hub's presets; its 28B ones are given for 224 pixels alone.
    [("paligemma-3b-224", 2_923_335_408), ("paligemma2-3b-224", 3_032_094_960), ("paligemma2-10b-224", 9_662_409_456),
     ("paligemma2-28b-224", 27_650_192_112), ("paligemma2-28b-448", 27_651_076_848), ("paligemma2-28b-896", 27_654_615_792)],
)  # fmt: skip
def test_parameter_counts_of_the_releases(name, expected):
    from dataclasses import replace

    config = VARIANTS[name]
    config = replace(config, text=replace(config.text, vocab=257152))
    assert sum(np.prod(p.shape, dtype=np.int64) for p in parameters(config)) == expected


def test_flatten_and_back():
    params = random_params(CONFIGS["paligemma2"])
    assert same(unflatten(flatten(params)), params)
    assert isinstance(params["text"]["blocks"], list)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(name):
    from dataclasses import replace

    config = CONFIGS[name]
    assert from_hf(to_hf(config)) == replace(config, max_length=config.max_length)


@pytest.mark.parametrize("name", VARIANTS)
def test_release_configs_round_trip(name):
    assert from_hf(json.loads(json.dumps(to_hf(VARIANTS[name])))) == VARIANTS[name]


def test_the_released_config_file():
    """What google/paligemma-3b-pt-224 has in its config.json, with all that it leaves out."""
    hf = {
        "model_type": "paligemma", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 2048,
        "image_token_index": 257152, "projection_dim": 2048,
        "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
                        "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False},
    }  # fmt: skip
    assert from_hf(hf) == VARIANTS["paligemma-3b-224"]


def test_the_decoder_width_is_the_text_configs():
    """PaliGemma 2's top-level hidden_size says 2048 whatever the decoder has."""
    hf = to_hf(VARIANTS["paligemma2-3b-224"]) | {"hidden_size": 2048, "projection_dim": 2304}
    assert from_hf(hf).text.width == 2304


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "llava"}, "model_type"),
        ({"text_config": {"model_type": "llama"}}, "llama"),
        ({"text_config": {"model_type": "gemma", "hidden_act": "relu"}}, "relu"),
        ({"text_config": {"model_type": "gemma", "attention_bias": True}}, "attention_bias"),
        ({"text_config": {"model_type": "gemma", "num_hidden_layers": -1}}, "num_hidden_layers"),
        ({"text_config": {"model_type": "gemma", "rope_parameters": {"rope_type": "yarn"}}}, "yarn"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"vision_config": {"num_channels": 1}}, "num_channels"),
        ({"image_token_index": "x"}, "image_token_index"),
        ({"bos_token_id": [1, 107]}, r"bos_token_id is \[1, 107\]; one such token"),
        ({"text_config": {"model_type": "gemma2", "hidden_activation": "gelu"}}, "hidden_activation is 'gelu'"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(folder, change, word):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | change))
    with pytest.raises(PaliGemmaError, match=word):
        load(folder)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"image_token_index": None, "image_token_id": 7}, "image_token", 7),
        ({"image_token_index": 0}, "image_token", 0),
        ({"eos_token_id": [3]}, "eos", 3),
        ({"pad_token_id": -1}, "pad", 0),
    ],
)
def test_ids_as_transformers_takes_them(folder, change, field, value):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | change))
    assert getattr(load_config(folder), field) == value


def test_a_pooling_head_is_checked_and_left_alone(folder):
    """transformers saves SigLIP's head where vision_use_head is not false; every tensor of it must still be right."""
    params = load(folder).params
    tensors = load_file(folder / "model.safetensors")
    head = pooling_head(load_config(folder).vision)
    ours = {name.replace("vision_tower.", "vision_tower.vision_model."): shape for name, shape in head.items()}
    some = next(iter(tensors.values())).dtype
    save_file(tensors | {name: np.ones(shape, some) for name, shape in ours.items()}, folder / "model.safetensors")
    assert same(load(folder).params, params)
    name = "vision_tower.vision_model.head.probe"
    wrong = {n: np.ones(shape if n != name else (1, 2, 3), some) for n, shape in ours.items()}
    save_file(tensors | wrong, folder / "model.safetensors")
    with pytest.raises(PaliGemmaError, match=r"head\.probe has shape \[1, 2, 3\], config\.json asks for \[1, 1, 15\]"):
        load(folder)
    save_file(tensors | {name: np.ones((1, 1, 15), some)}, folder / "model.safetensors")
    with pytest.raises(PaliGemmaError, match=r"missing vision_tower\.vision_model\.head\.attention\.in_proj_bias"):
        load(folder)


def places(tree, path=()):
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))


ODD_VALUES = [None, True, -1, 1.5, float("nan"), "x", "", [], [1], [[]], {}, {"a": 1}, 10**30, 2**31 - 1, {"rope_theta": "x"}]  # fmt: skip


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-3b-224"])
def test_any_value_of_a_config_is_taken_or_refused(name):
    """Whatever stands at whatever place, there is a config or one clear error, and at once."""
    whole = to_hf(VARIANTS[name]) | {"image_token_id": 5}
    whole["text_config"] |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attention_bias": False}
    refusals = []
    for path in places(whole):
        for value in ODD_VALUES:
            changed = json.loads(json.dumps({"root": whole}))
            parent = changed
            for key in ("root", *path)[:-1]:
                parent = parent[key]
            parent[("root", *path)[-1]] = value
            refusals.append(refusal(from_hf, changed["root"]))
    assert all(text is None or text.startswith("config.json: ") for text in refusals)
    assert sum(text is not None for text in refusals) > 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_missing_fields_default_as_in_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    full = transformers.PaliGemmaConfig(
        text_config={"model_type": kind}, vision_config={"model_type": "siglip_vision_model"}
    )
    bare = {"model_type": "paligemma", "text_config": {"model_type": kind}, "vision_config": {}}
    assert from_hf(bare) == from_hf(json.loads(full.to_json_string()))
    assert from_hf({"model_type": "paligemma"}) == from_hf(json.loads(transformers.PaliGemmaConfig().to_json_string()))


# --- layouts that exist ------------------------------------------------------------------------------------


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def spellings(name: str) -> list[str]:
    name = checkpoint.canonical(name)
    in_memory = name if name.startswith("lm_head.") else f"model.{name}"
    return [name, saved_name(name), in_memory]


@pytest.mark.parametrize("spelling", range(3))
def test_every_spelling_of_the_names(folder, spelling):
    expected = load(folder).params
    rewrite(folder, lambda tensors: {spellings(name)[spelling]: array for name, array in tensors.items()})
    assert same(load(folder).params, expected)


def test_two_spellings_of_one_tensor(folder):
    rewrite(folder, lambda tensors: tensors | {spellings(n)[0]: a for n, a in list(tensors.items())[:1]} | {spellings(n)[1]: a for n, a in list(tensors.items())[:1]})  # fmt: skip
    with pytest.raises(PaliGemmaError, match="stored twice"):
        load(folder)


def test_a_tied_head_may_be_present(folder):
    expected = load(folder).params

    def add(tensors):
        table = next(array for name, array in tensors.items() if "embed_tokens" in name)
        padding = table.copy()
        padding[-4:] = 7  # the image token's row and those behind it are drawn separately for both
        return tensors | {"lm_head.weight": padding}

    rewrite(folder, add)
    assert same(load(folder).params, expected)


def test_a_tied_head_must_be_the_table(folder):
    def add(tensors):
        table = next(array for name, array in tensors.items() if "embed_tokens" in name)
        return tensors | {"lm_head.weight": table + 1}

    rewrite(folder, add)
    with pytest.raises(PaliGemmaError, match=r"lm_head.*differs.*tie_word_embeddings"):
        load(folder)


def test_a_tied_head_may_stand_in_for_the_table(folder):
    """As in transformers, whichever of the two is there counts."""
    if not load(folder).config.text.tied:
        pytest.skip("untied")
    expected = load(folder).params
    rewrite(
        folder, lambda t: {"lm_head.weight" if "embed_tokens" in name else name: array for name, array in t.items()}
    )
    assert same(load(folder).params, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sub_config_says", [None, True, False])
def test_the_top_level_decides_whether_the_head_is_tied(tied, sub_config_says):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    text = {"model_type": "gemma"} | ({} if sub_config_says is None else {"tie_word_embeddings": sub_config_says})
    hf = {"model_type": "paligemma", "tie_word_embeddings": tied, "text_config": text}
    assert from_hf(hf).text.tied == transformers.PaliGemmaConfig.from_dict(hf).tie_word_embeddings == tied


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 4])
def test_dtypes_and_shards(tmp_path, monkeypatch, dtype, shards):
    config, dtype = CONFIGS["paligemma2"], bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    params = unflatten({path: array.astype(dtype) for path, array in flatten(random_params(config)).items()})
    total = sum(array.nbytes for array in flatten(params).values())
    monkeypatch.setattr("numpy_ref.checkpoint.safetensors.SHARD", total // shards + 1 if shards > 1 else total)
    save(tmp_path / "out", config, params)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    loaded = load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert loaded.config == config
    assert same(loaded.params, params)


@pytest.mark.filterwarnings("ignore")
def test_transformers_writes_shards_that_load(tmp_path):
    pytest.importorskip("transformers", reason="the live comparison needs transformers")
    model = make_goldens.build("gemma2")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(load(tmp_path / "sharded").params, load(tmp_path / "whole").params)


def test_a_whole_file_counts_before_shards(folder):
    """As in transformers, where both are."""
    expected = load(folder).params
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert same(load(folder).params, expected)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PaliGemmaError, match=r"gone\.safetensors: no such file"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(PaliGemmaError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)


def test_loading_copies_nothing():
    loaded = load(GOLDEN / "paligemma1")
    for path, array in flatten(loaded.params).items():
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap), path
        assert not array.flags.writeable


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_wraps_every_name_is_taken_off(folder, capsys, prefix):
    expected = load(folder).params
    rewrite(folder, lambda tensors: {prefix + name: array for name, array in tensors.items()})
    assert same(load(folder).params, expected)
    message = capsys.readouterr().err
    assert f"every tensor's name begins with {prefix}, which is taken off" in message
    assert message.count("\n") == 1
    rewrite(folder, lambda t: {n.removeprefix(prefix) if n.endswith("norm.weight") else n: a for n, a in t.items()})
    with pytest.raises(PaliGemmaError, match=f"unexpected {prefix}"):  # not all of them share it
        load(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_mixed_dtypes_are_kept_and_compute_as_in_transformers(kind, tmp_path):
    """What merging leaves: kernels in bfloat16, norms and biases in float32, a projector in float16."""
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    torch = pytest.importorskip("torch")
    make_goldens.build(kind).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_torch(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            tensors[name] = tensor.float() + 1e-4 * torch.randn(tensor.shape)
        if "projector.linear.weight" in name:
            tensors[name] = tensor.half()
    save_torch(tensors, file, {"format": "pt"})
    loaded = load(tmp_path / "hf")
    assert loaded.dtype.name == "bfloat16"
    stored = {path: array.dtype.name for path, array in flatten(loaded.params).items()}
    assert stored["text.norm.scale"] == stored["vision.norm.bias"] == "float32"
    assert (stored["projector.kernel"], stored["text.embedding"]) == ("float16", "bfloat16")

    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    bundle.write(loaded, tmp_path / "bundle")
    save(tmp_path / "again", loaded.config, loaded.params)
    engines = [NumpyEngine(loaded), NumpyEngine(load(tmp_path / "again")), TorchEngine(loaded)]
    for engine in (*engines, Session(bundle.load(tmp_path / "bundle"), "cpu")):
        for image, prefix in zip(make_goldens.pixels(model.config, 2), make_goldens.PREFIXES, strict=True):
            row = make_goldens.row_ids(model.config, prefix)
            expected, _ = make_goldens.answer(model, image, row, 1)
            logits, _ = engine.prefill(image[None], np.array([row]), np.array([len(row)], np.int32), len(row))
            assert np.abs(logits[0] - expected).max() <= 1e-4 * np.abs(expected).max(), engine.name


def test_layers_of_mixed_dtypes_are_stacked_in_the_wider(tmp_path):
    """A npz keeps a weight of all layers in one array, which has one dtype."""
    from .test_big_vision import model

    config, params, _ = model("paligemma1")
    flat = {path: array.astype(bfloat16()) for path, array in flatten(params).items()}
    flat["text.blocks.1.attention.query.kernel"] = flatten(params)["text.blocks.1.attention.query.kernel"]
    save_npz(tmp_path / "mixed.npz", config, unflatten(flat))
    read = load(tmp_path / "mixed.npz")
    assert {array.dtype.name for array in flatten(read.params).values()} == {"bfloat16", "float32"}
    flat["text.embedding"] = flat["text.embedding"][: config.image_token]
    assert all(np.array_equal(array, flat[path]) for path, array in flatten(read.params).items())


# --- differences, named ------------------------------------------------------------------------------------

TENSORS = [(name, tensor) for name in NAMES for tensor in load_file(GOLDEN / name / "model.safetensors")]


@pytest.mark.parametrize(("name", "tensor"), TENSORS)
def test_any_mutation_of_a_tensor_is_named(name, tensor, tmp_path):
    known = saved_name(checkpoint.canonical(tensor))
    mutations = {
        "name": lambda t: {("x" + key if key == tensor else key): array for key, array in t.items()},
        "missing": lambda t: {key: array for key, array in t.items() if key != tensor},
        "kind": lambda t: t | {tensor: t[tensor].astype(np.int32)},
        "shape": lambda t: t | {tensor: t[tensor][..., :-1].copy()},
        "rank": lambda t: t | {tensor: t[tensor][None].copy()},
    }
    for kind, mutate in mutations.items():
        folder = shutil.copytree(GOLDEN / name, tmp_path / kind)
        rewrite(folder, mutate)
        with pytest.raises(PaliGemmaError) as error:
            load(folder)
        assert known in str(error.value) or tensor in str(error.value), kind


def test_a_list_of_differences_is_cut_at_ten(folder):
    rewrite(folder, lambda tensors: {f"x{name}": array for name, array in tensors.items()})
    count = len(parameters(load_config(folder)))
    with pytest.raises(PaliGemmaError) as error:
        load(folder)
    problems = str(error.value).partition("the model: ")[2].split("; ")
    assert [problem.split()[0] for problem in problems] == ["missing", "unexpected"] * 5 + ["and"]
    assert problems[-1] == f"and {2 * count - 10} more"


def sharded(tmp_path, monkeypatch):
    monkeypatch.setattr("numpy_ref.checkpoint.safetensors.SHARD", 100_000)
    config = CONFIGS["paligemma1"]
    save(tmp_path / "out", config, unflatten({k: v.astype("f4") for k, v in flatten(random_params(config)).items()}))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    return tmp_path / "out", files


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_named(tmp_path, monkeypatch, keep):
    folder, files = sharded(tmp_path, monkeypatch)
    for file in files:
        contents = file.read_bytes()
        file.write_bytes(contents[:keep])
        with pytest.raises(PaliGemmaError, match=file.name):
            load(folder)
        file.write_bytes(contents)
    load(folder)


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
    folder, files = sharded(tmp_path, monkeypatch)
    files[1].unlink()
    with pytest.raises(PaliGemmaError, match=f"{files[1].name}: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].update(extra="../../etc/passwd"), "not a file name"),
        (lambda index: index["weight_map"].update(extra=3), "no weight_map"),
        (lambda index: index["weight_map"].popitem(), "disagree about"),
        (lambda index: index["weight_map"].update(extra=index["weight_map"].popitem()[1]), "extra"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, monkeypatch, change, word):
    folder, _ = sharded(tmp_path, monkeypatch)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(PaliGemmaError, match=word):
        load(folder)


@pytest.mark.parametrize(
    "contents",
    [b"", b"\0" * 7, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}',
     struct.pack("<Q", 2) + b"{}"],
    ids=["empty", "short", "huge header", "a list", "no offsets", "no tensors"],
)  # fmt: skip
def test_a_header_that_is_none(folder, contents):
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(PaliGemmaError):
        load(folder)


def write_header(folder, header: bytes, body: bytes):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)


@pytest.mark.parametrize(
    ("header", "size", "word"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "not a whole"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "not a whole"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "not a whole"),
        ('{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', 1, "tensor a has dtype F8_E4M3"),
        ('{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "tensor a has dtype I8"),
        ('{"a":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]}}', 0, r"unexpected a \[0, 5\]"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"k":"v"}}', 4, r"unexpected a \[1\]"),
    ],
    ids=["one name twice", "size", "a hole", "float8", "integers", "no bytes", "metadata"],
)  # fmt: skip
def test_headers_that_are_refused(folder, header, size, word):
    write_header(folder, header.encode(), bytes(size))
    with pytest.raises(PaliGemmaError, match=word):
        load(folder)


@pytest.mark.parametrize("mutation", ["dtype", "other dtype", "shape", "end"])
def test_a_header_that_was_edited_names_the_tensor(folder, mutation):
    """The bytes stay as they are; only what the header says of one tensor changes."""
    file, name = folder / "model.safetensors", "language_model.model.norm.weight"
    contents = file.read_bytes()
    size = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + size])
    entry = header[name]
    if mutation == "end":
        entry["data_offsets"][1] += 4 * 10**6
        entry["shape"] = [entry["shape"][0] + 10**6]
    elif mutation == "shape":
        entry["shape"] = [entry["shape"][0] + 1]
    else:
        entry["dtype"] = {"dtype": "F16", "other dtype": "F8_E4M3"}[mutation]
    write_header(folder, json.dumps(header).encode(), contents[8 + size :])
    with pytest.raises(PaliGemmaError, match=f"model.safetensors: .*{name}"):
        load(folder)


@given(
    st.lists(st.tuples(st.integers(0, 5999), st.sampled_from(b'0123456789[]{},":-FBIU\0\xff')), min_size=1, max_size=4)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers(tmp_path, changes):
    """Whatever a damaged header says, it is refused in one line, or says the same."""
    contents = bytearray((GOLDEN / "paligemma1" / "model.safetensors").read_bytes())
    for place, byte in changes:
        contents[place] = byte
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "paligemma1" / "config.json", folder)
    (folder / "model.safetensors").write_bytes(contents)
    text = refusal(load, folder)
    assert text is None or str(folder) in text


def test_json_that_is_none(folder):
    for contents in (b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000):
        (folder / "config.json").write_bytes(contents)
        with pytest.raises(PaliGemmaError, match=r"config\.json"):
            load(folder)


def test_saving_refuses_what_config_json_cannot_say(tmp_path):
    """Attention's soft cap belongs to Gemma 2; a Gemma 1 directory would lose it without a word."""
    config = CONFIGS["paligemma1"]
    config = replace(config, text=replace(config.text, attn_softcap=30.0))
    with pytest.raises(PaliGemmaError, match=r"config\.json has no words"):
        save(tmp_path / "out", config, random_params(config))
    assert not list(tmp_path.iterdir())


def test_a_final_softcap_of_gemma_1_is_kept(tmp_path):
    config = CONFIGS["paligemma1"]
    config = replace(config, text=replace(config.text, final_softcap=30.0))
    save(tmp_path / "out", config, random_params(config))
    assert load(tmp_path / "out").config == config


def test_folders_that_were_made_are_taken_away_again(tmp_path):
    """Only those: what was there before stays."""
    (tmp_path / "old").mkdir()
    for make in (new_directory, new_file):
        for error, expected in [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "no space"), PaliGemmaError)]:
            with pytest.raises(expected):
                _write_half(make, tmp_path / "old" / "new" / "newer" / "out", error)
            assert not list((tmp_path / "old").iterdir())


def _write_half(make, path, error):
    with make(path) as output:
        (output / "half" if output.is_dir() else output).write_text("half")
        raise error


def test_saving_refuses_other_tensors(tmp_path):
    params = random_params(CONFIGS["paligemma1"])
    with pytest.raises(PaliGemmaError, match=r"parameters: .*missing text\.head\.kernel"):
        save(tmp_path / "out", CONFIGS["paligemma2"], params)
    assert not list(tmp_path.iterdir())
