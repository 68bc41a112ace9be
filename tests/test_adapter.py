"""LoRA adapters: what `peft` makes of them with merge_and_unload is what a checkpoint with --adapter is."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export import bundle, verify
from export.bundle import weights
from export.cli import export_onnx
from export.session import Session
from numpy_ref import __main__ as numpy_command
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED, adapter, flatten, parameters
from numpy_ref.checkpoint.adapter import Merged, in_memory
from numpy_ref.checkpoint.layouts import canonical
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate, pad_prompts
from torch_impl import __main__ as torch_command
from torch_impl.load import TorchEngine, to_array

from . import make_goldens

peft = pytest.importorskip("peft", reason="adapters are made with peft")
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["gemma", "gemma2"]
VISION = r".*vision_tower.*(q_proj|out_proj|fc1)|.*multi_modal_projector\.linear"
KINDS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
        "rank_pattern": {"v_proj": 5, r"language_model\.layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 9, r"layers\.[12]\.self_attn\.v_proj": 1},
    },
    "rank-stabilized": {"target_modules": ["k_proj", "o_proj", "up_proj"], "use_rslora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "layer_norm1"]},
    "vision and projector": {"target_modules": VISION, "lora_bias": True, "bias": "lora_only"},
    "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "tables and convolution": {"target_modules": ["patch_embedding", "position_embedding", "q_proj"]},
    "some layers": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


def base_model(folder, kind, dtype=torch.float32, **changes):
    """A small random base in a directory; Gemma 2 with an untied head, so that both are there."""
    built = make_goldens.build(kind, tie_word_embeddings=kind == "gemma", **changes)
    built.to(dtype).save_pretrained(folder)
    return folder


def opened(base, dtype=torch.float32):
    import transformers

    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        base, attn_implementation="eager", dtype=dtype
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def adapted(base, folder, dtype=torch.float32, **settings):
    """Save an adapter with random weights, and return the folder and peft's model as loaded from it."""
    torch.manual_seed(7)
    model = peft.get_peft_model(opened(base, dtype), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder, peft.PeftModel.from_pretrained(opened(base, dtype), folder).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def lora(family, tmp_path):
    """The base, a plain adapter, and peft's model of both."""
    base = base_model(tmp_path / "base", family)
    return base, *adapted(base, tmp_path / "lora", **KINDS["plain"])


def edit_config(folder, **changes):
    file = folder / adapter.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = folder / adapter.WEIGHTS
    save_file(change(load_file(file)), file)


def tensors_of(loaded) -> dict:
    return flatten(in_memory(loaded.params))


def same(a, b) -> bool:
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def answers_of(model):
    """transformers' logits and greedy tokens for the examples of the goldens."""
    pixels = make_goldens.pixels(model.config, 2)
    rows = [make_goldens.row_ids(model.config, prefix) for prefix in make_goldens.PREFIXES]
    found = [make_goldens.answer(model, *pair, 9) for pair in zip(pixels, rows, strict=True)]
    return pixels, rows, np.stack([logits for logits, _ in found]), [tokens for _, tokens in found]


def assert_answers(engine, pixels, rows, logits, tokens):
    ours, _ = engine.prefill(pixels, *pad_prompts(rows, 0), 40)
    assert np.abs(ours - logits).max() <= 1e-4 * np.abs(logits).max(), engine.name
    engine.config, known = replace(engine.config, eos=2**30), np.ones(logits.shape[1], bool)  # it never stops
    drawn = np.stack(list(generate(engine, pixels, rows, known, 9)), 1)
    assert drawn.tolist() == tokens, engine.name


# --- equal to peft -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_logits_and_tokens_are_those_of_merge_and_unload(family, kind, tmp_path):
    base = base_model(tmp_path / "base", family)
    folder, model = adapted(base, tmp_path / "lora", **KINDS[kind])
    merged = model.merge_and_unload()
    loaded = checkpoint.load(base, folder)
    theirs = {canonical(name): tensor for name, tensor in merged.state_dict().items()}
    ours, plain = tensors_of(loaded), tensors_of(checkpoint.load(base))
    changed = 0
    for parameter in parameters(loaded.config):
        expected = parameter.hf.layout.read(to_array(theirs[parameter.hf.name]), parameter.shape)
        np.testing.assert_allclose(ours[parameter.path], expected, rtol=1e-6, atol=1e-6, err_msg=parameter.path)
        changed += not np.array_equal(ours[parameter.path], plain[parameter.path])
    assert changed == sum(len(roles.keys() & {"A", "whole", "copy", "addend"}) > 0 for roles in adapter.read_tensors(folder, adapter.read_settings(folder)).values())  # fmt: skip
    examples = answers_of(merged)
    assert_answers(NumpyEngine(loaded), *examples)
    assert_answers(TorchEngine(loaded), *examples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once_to_the_dtype_of_the_base(family, dtype, tmp_path):
    base = base_model(tmp_path / "base", family, dtype)
    folder, model = adapted(base, tmp_path / "lora", dtype, **KINDS["plain"])
    theirs = {canonical(name): tensor for name, tensor in model.merge_and_unload().state_dict().items()}
    loaded = checkpoint.load(base, folder)
    different = 0
    for parameter in parameters(loaded.config):
        ours = tensors_of(loaded)[parameter.path]
        expected = parameter.hf.layout.read(to_array(theirs[parameter.hf.name]), parameter.shape)
        assert ours.dtype == expected.dtype
        different += (ours != expected).sum()
    # The order of float32 sums may turn a rounding; nothing else does.
    assert different <= 3


@pytest.mark.parametrize(
    ("targets", "saved"),
    [(["embed_tokens", "q_proj"], None), (["lm_head"], None), (["q_proj"], ["embed_tokens"]),
     (["q_proj"], ["embed_tokens", "lm_head"]), (["embed_tokens", "lm_head"], None)],
)  # fmt: skip
def test_a_tied_table_that_is_adapted_is_parted_from_the_head(tmp_path, capsys, targets, saved):
    """As in training, where each of the two had its own change. (Merging in place puts that of one into both.)"""
    base = base_model(tmp_path / "base", "gemma")
    folder, model = adapted(base, tmp_path / "lora", target_modules=targets, modules_to_save=saved)
    loaded = checkpoint.load(base, folder)
    assert not loaded.config.text.tied
    assert "no longer the embedding table" in capsys.readouterr().err
    assert_answers(NumpyEngine(loaded), *answers_of(model))
    bundle.write(loaded, tmp_path / "bundle")
    assert_answers(Session(bundle.load(tmp_path / "bundle"), "cpu"), *answers_of(model))


def test_tables_that_were_saved_but_not_parted_stay_one(tmp_path, capsys):
    """As where peft saves the embedding layers because the vocabulary was resized."""
    base = base_model(tmp_path / "base", "gemma")
    folder, _ = adapted(base, tmp_path / "lora", **KINDS["plain"])
    table = np.random.default_rng(0).standard_normal((211, 42), np.float32)
    names = ["base_model.model.model.language_model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    for used in (names, names[:1], names[1:]):
        edit_tensors(folder, lambda t, used=used: {n: a for n, a in t.items() if n not in names} | dict.fromkeys(used, table))  # fmt: skip
        loaded = checkpoint.load(base, folder)
        assert loaded.config.text.tied
        assert np.array_equal(tensors_of(loaded)["text.embedding"], table)
    assert "embedding table" not in capsys.readouterr().err


def test_a_checkpoint_that_peft_merged_loads_as_base_and_adapter_do(lora, tmp_path):
    base, folder, model = lora
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert same(checkpoint.load(tmp_path / "merged"), checkpoint.load(base, folder))


def test_a_big_vision_base(shipped_adapter, tmp_path):
    """Names are Hugging Face's whatever the base is stored as."""
    folder, _ = shipped_adapter
    checkpoint.convert(SHIPPED, tmp_path / "base.npz")
    ours, expected = (tensors_of(checkpoint.load(base, folder)) for base in (tmp_path / "base.npz", SHIPPED))
    rows = len(ours["text.embedding"])  # a npz has none from the image token on
    expected["text.embedding"] = expected["text.embedding"][:rows]
    assert all(np.array_equal(ours[path], expected[path]) for path in expected)


# --- names -------------------------------------------------------------------------------------------------


def older(name):
    """A name as transformers before 4.52 had it."""
    name = name.replace("model.language_model.", "language_model.model.").replace("model.lm_head", "language_model.lm_head")  # fmt: skip
    name = name.replace("model.multi_modal_projector", "multi_modal_projector")
    return name.replace("model.vision_tower.", "vision_tower.vision_model.")


def with_adapter_name(name):
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.", f".{part}.default.")
    return name + ".default" if "lora_embedding" in name else name.replace("projector.linear", "projector.modules_to_save.default.linear")  # fmt: skip


@pytest.mark.parametrize(
    "spell",
    [older, with_adapter_name, lambda name: with_adapter_name(older(name)), lambda name: f"module.{name}",
     lambda name: f"_orig_mod.module.{name}", lambda name: name.removeprefix("base_model.model.")],
    ids=["before 4.52", ".default", "both", "module", "compiled", "no prefix"],
)  # fmt: skip
def test_every_spelling_of_the_names(family, tmp_path, spell):
    base = base_model(tmp_path / "base", family)
    settings = {
        "target_modules": ["q_proj", "v_proj", "position_embedding", "fc1"], "rank_pattern": {"v_proj": 4},
        "modules_to_save": ["multi_modal_projector"],
    }  # fmt: skip
    folder, _ = adapted(base, tmp_path / "lora", **settings)
    expected = checkpoint.load(base, folder)
    before = load_file(folder / adapter.WEIGHTS).keys()
    edit_tensors(folder, lambda tensors: {spell(name): array for name, array in tensors.items()})
    assert not before & load_file(folder / adapter.WEIGHTS).keys() - {n for n in before if spell(n) == n}
    assert any(spell(name) != name for name in before)
    assert same(checkpoint.load(base, folder), expected)


def test_patterns_match_the_end_of_a_name_or_all_of_it():
    settings = adapter.Settings(8, 8, {"q_proj": 2, "^model.x.v_proj": 3}, {}, False, (), False, None, None)
    ranks = {"model.x.q_proj": 2, "q_proj": 2, "model.x.xq_proj": 8, "model.x.v_proj": 3, "a.model.x.v_proj": 8}
    assert {name: settings.rank_of(name) for name in ranks} == ranks
    found = [peft.utils.other.get_pattern_key(settings.ranks, name) for name in ranks]
    assert [settings.ranks.get(key, 8) for key in found] == list(ranks.values())


# --- as it is read -----------------------------------------------------------------------------------------


def test_loading_merges_nothing(lora):
    base, folder, _ = lora
    loaded = checkpoint.load(base, folder)
    merged = [array for array in flatten(loaded.params).values() if isinstance(array, Merged)]
    assert len(merged) == 10
    for array in flatten(loaded.params).values():
        stored = array.base if isinstance(array, Merged) else array
        while isinstance(stored.base, np.ndarray):
            stored = stored.base
        assert isinstance(stored, np.memmap)


def test_any_part_of_a_merged_weight():
    random = np.random.default_rng(0)
    base, left, right = (random.standard_normal(shape, np.float32) for shape in [(13, 7), (13, 3), (3, 7)])
    merged, whole = Merged(base, left, right, 0.7), base + left @ right * np.float32(0.7)
    for array, expected in [(merged, whole), (merged.T, whole.T)]:
        assert (array.shape, array.ndim, array.size, array.nbytes) == (expected.shape, 2, 91, 364)
        assert len(array) == len(expected)
        np.testing.assert_allclose(np.asarray(array), expected, rtol=1e-6)
        np.testing.assert_allclose(array[2:5], expected[2:5], rtol=1e-6)
        np.testing.assert_allclose(array[:, 3:6], expected[:, 3:6], rtol=1e-6)
    assert np.asarray(merged, np.float64).dtype == np.float64


@pytest.mark.parametrize("precision", weights.PRECISIONS)
def test_a_bundle_is_that_of_the_merged_checkpoint(lora, tmp_path, monkeypatch, precision):
    """Byte for byte, and without ever holding more of a merged weight than a block of it."""
    base, folder, model = lora
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = weights.plan(checkpoint.load(base).config, precision)
    weights.write(tmp_path / "expected", expected, flatten(checkpoint.load(tmp_path / "merged").params))
    read = []
    get = Merged.__getitem__
    monkeypatch.setattr(Merged, "__getitem__", lambda self, key: read.append(get(self, key)) or read[-1])
    monkeypatch.setattr(Merged, "__array__", lambda *_: pytest.fail("a merged weight was made whole"))
    monkeypatch.setattr("numpy_ref.checkpoint.blocks.BLOCK", 1000)
    monkeypatch.setattr("export.bundle.forms.STEP", 250)
    weights.write(tmp_path / "ours", expected, flatten(checkpoint.load(base, folder).params))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "expected").read_bytes()
    assert max(array.nbytes for array in read) <= 2000  # where the smallest weight has 3360


def test_verify_compares_with_the_merged_reference(lora, tmp_path, capsys):
    base, folder, model = lora
    arguments = [str(base), "--adapter", str(folder), "--output", str(tmp_path / "bundle"), "--verify"]
    assert export_onnx(arguments) == 0
    assert "end to end" in capsys.readouterr().out
    assert_answers(Session(bundle.load(tmp_path / "bundle"), "cpu"), *answers_of(model.merge_and_unload()))
    with pytest.raises(PaliGemmaError, match="differs from the reference"):
        verify.verify(bundle.load(tmp_path / "bundle"), checkpoint.load(base))


# --- commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_adapter(tmp_path_factory):
    """An adapter of the model that ships, which names it as its base."""
    folder = tmp_path_factory.mktemp("shipped") / "lora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model = adapted(SHIPPED, folder, target_modules=["q_proj", "v_proj", "fc1"], lora_alpha=9)
    return folder, model.merge_and_unload()


def test_commands_answer_with_the_adapter(shipped_adapter, tmp_path, capsys):
    """Left out, the checkpoint is the base that the adapter names; tokens are transformers' own."""
    from numpy_ref.image import open_image, preprocess
    from numpy_ref.tokenizer import Tokenizer

    folder, model = shipped_adapter
    question = [str(SHIPPED / "example.png"), "caption en", "--json", "--max-new-tokens", "16"]
    found = []
    for command in (numpy_command, torch_command):
        for base in ([str(SHIPPED)], []):
            assert command.main([*base, *question, "--adapter", str(folder)]) == 0
            found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert export_onnx(["--adapter", str(folder), "--output", str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    ran = subprocess.run(
        [sys.executable, "-m", "export", str(tmp_path / "bundle"), *question], capture_output=True, text=True, check=True
    )  # fmt: skip
    found.append(json.loads(ran.stdout)["tokens"])
    config = checkpoint.load_config(SHIPPED)
    ids = Tokenizer.load(SHIPPED, config).prompt("caption en")
    picture = preprocess(open_image(SHIPPED / "example.png"), config.vision.image_size)[0]
    _, tokens = make_goldens.answer(model, picture, ids, 16)
    expected = tokens[: tokens.index(config.eos)] if config.eos in tokens else tokens
    assert found == [expected] * 5
    assert numpy_command.main(question) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] != expected


@pytest.mark.parametrize("command", [export_onnx, numpy_command.main, torch_command.main])
def test_help_tells_of_adapters(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command(["--help"])
    assert "--adapter DIR" in " ".join(capsys.readouterr().out.split())


def test_a_base_that_is_not_here(lora):
    _, folder, _ = lora
    for changes, words in [
        (
            {"base_model_name_or_path": "/gone/base"},
            "its base /gone/base is not on this machine; give it as CHECKPOINT",
        ),
        ({"base_model_name_or_path": None}, "names no base; give it as CHECKPOINT"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, not a string"),
    ]:
        edit_config(folder, **changes)
        with pytest.raises(PaliGemmaError, match=words):
            checkpoint.load(adapter=folder)


def test_the_base_may_be_a_revision_on_the_hub(lora, monkeypatch):
    _, folder, _ = lora
    edit_config(folder, base_model_name_or_path="google/paligemma-3b-pt-224", revision="bfloat16")
    assert adapter.base_of(folder) == "google/paligemma-3b-pt-224@bfloat16"
    edit_config(folder, revision=None)
    assert adapter.base_of(folder) == "google/paligemma-3b-pt-224"


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "kind 'IA3', not LORA; merge it first with peft"),
        ({"peft_type": "LOHA"}, "LOHA.*merge_and_unload"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING, which is no change of weights"),
        ({"peft_type": None}, "kind None"),
        ({"peft_type": []}, r"kind \[\]"),
        ({"use_dora": True}, r"DoRA \(use_dora\).*merge_and_unload"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [3]}, "trainable tokens"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's weights too"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": [True]}, "began as"),
        ({"use_tomorrows_lora": {"a": 1}}, "'use_tomorrows_lora', unknown here"),
        ({"r": 0}, "r is 0, not a whole number"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 1e300}, "lora_alpha is"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], not an object"),
        ({"rank_pattern": {"(": 3}}, "is no regular expression"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern of 'q' is 'x'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is no list"),
        ({"r": 4}, r"lora_A.weight has shape \[3, 42\]; base and adapter_config.json ask for \[4, 42\]"),
    ],
    ids=str,
)
def test_configs_that_are_refused(tmp_path_factory, plain_adapter, tmp_path, changes, words):
    base, source = plain_adapter
    folder = shutil.copytree(source, tmp_path / "lora")
    edit_config(folder, **changes)
    with pytest.raises(PaliGemmaError, match=words) as error:
        checkpoint.load(base, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model(folder / "base", "gemma")
        return base, adapted(base, folder / "lora", **KINDS["plain"])[0]


A = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {A: t[A][:, :-1].copy()}, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight has shape \[3, 41\]"),
        (lambda t: t | {B: t[B][:-1].copy()}, r"lora_B\.weight has shape \[59, 3\]"),
        (lambda t: t | {A: t[A][None].copy()}, r"has shape \[1, 3, 42\]"),
        (lambda t: {n: a for n, a in t.items() if n != A}, r"lora_B\.weight has no lora_A beside it"),
        (lambda t: {n: a for n, a in t.items() if n != B}, r"lora_A\.weight has no lora_B beside it"),
        (lambda t: t | {A: np.full_like(t[A], np.nan)}, r"lora_A\.weight holds nan at \[0, 0\]"),
        (lambda t: t | {B: np.full_like(t[B], np.inf)}, r"lora_B\.weight holds inf at \[0, 0\]"),
        (lambda t: t | {A.replace("lora_A", "lora_A.default"): t[A]}, "stored twice"),
        (lambda t: {n.replace("lora_", "lora_A.one.")[: -len(".weight")] if n == A else n: a for n, a in t.items()}, "."),
        (lambda t: {n.replace(".weight", ".x.weight") if ".0." in n else n.replace(".weight", ".y.weight"): a for n, a in t.items()}, r"several adapters \(x, y\)"),
        (lambda t: {n.replace("layers.0", "layers.9"): a for n, a in t.items()}, r"no place for 8 of the adapter's tensors: .*layers\.9\.self_attn"),
        (lambda t: t | {f"base_model.model.extra.{i}": t[A] for i in range(14)}, r"no place for 14 of .*extra\.5, and 4 more$"),
        (lambda t: t | {A.replace("q_proj", "norm"): t[A]}, "no place for 1 of"),
        (lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): t[A]}, "lora_magnitude_vector"),
        (lambda t: t | {B.replace("weight", "bias"): t[B][:, 0].copy()}, r"no place for 1 of .*lora_B\.bias"),
        (lambda t: t | {"base_model.model.model.language_model.norm.weight": np.ones(41, np.float32)}, r"norm\.weight has shape \[41\]"),
        (lambda t: t | {A: t[A].astype(np.int8)}, "dtype I8"),
        (lambda t: {}, "holds no tensors"),
    ],
    ids=range(18),
)  # fmt: skip
def test_tensors_that_are_refused(plain_adapter, tmp_path, change, words):
    base, source = plain_adapter
    folder = shutil.copytree(source, tmp_path / "lora")
    edit_tensors(folder, change)
    with pytest.raises(PaliGemmaError, match=words) as error:
        checkpoint.load(base, folder)
    assert str(folder) in str(error.value)


def test_a_merged_weight_that_is_not_finite(plain_adapter, tmp_path):
    """Each addend is; the sum is not."""
    base, source = plain_adapter
    folder = shutil.copytree(source, tmp_path / "lora")
    edit_tensors(folder, lambda t: t | {name: np.full_like(t[name], 1e30) for name in (A, B)})
    loaded = checkpoint.load(base, folder)
    for use in (NumpyEngine, TorchEngine, lambda loaded: bundle.write(loaded, tmp_path / "bundle")):
        with pytest.raises(PaliGemmaError, match=r"text\.blocks\.0\.attention\.query\.kernel holds inf at \[0, 0\]"):
            use(loaded)
    with pytest.raises(PaliGemmaError, match=r"self_attn\.q_proj\.weight holds inf at \[0, 0\]"):
        checkpoint.save(tmp_path / "merged", loaded.config, loaded.params)


def test_folders_that_are_no_adapter(plain_adapter, tmp_path):
    base, source = plain_adapter
    with pytest.raises(PaliGemmaError, match=r"gone: no such adapter directory"):
        checkpoint.load(base, tmp_path / "gone")
    with pytest.raises(PaliGemmaError, match=r"adapter_config\.json is missing; it is a checkpoint"):
        checkpoint.load(base, base)
    folder = shutil.copytree(source, tmp_path / "lora")
    (folder / adapter.WEIGHTS).rename(folder / adapter.PICKLE)
    with pytest.raises(PaliGemmaError, match=r"adapter_model\.bin is a pickle, .* not opened"):
        checkpoint.load(base, folder)
    (folder / adapter.PICKLE).unlink()
    with pytest.raises(PaliGemmaError, match=r"adapter_model\.safetensors: no such file"):
        checkpoint.load(base, folder)
    for contents in (b"", b"[]", b"{", b"[" * 100_000):
        (folder / adapter.CONFIG).write_bytes(contents)
        with pytest.raises(PaliGemmaError, match=r"adapter_config\.json"):
            checkpoint.load(base, folder)


def test_an_adapter_in_place_of_a_checkpoint_or_a_bundle(plain_adapter):
    _, folder = plain_adapter
    with pytest.raises(PaliGemmaError, match="an adapter, not a model: give its base as CHECKPOINT, and --adapter"):
        checkpoint.load(folder)
    with pytest.raises(PaliGemmaError, match="an adapter, not a bundle: export-onnx BASE --adapter"):
        bundle.load(folder)


def test_an_adapter_beside_a_model_is_pointed_out(plain_adapter, tmp_path, capsys):
    base, source = plain_adapter
    folder = shutil.copytree(base, tmp_path / "both")
    for file in Path(source).glob("adapter_*"):
        shutil.copy(file, folder)
    assert same(checkpoint.load(folder), checkpoint.load(base))
    assert "there is an adapter beside the model" in capsys.readouterr().err
    assert same(checkpoint.load(folder, folder), checkpoint.load(base, source))
