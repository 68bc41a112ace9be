"""What is given in place of a checkpoint or a bundle: the message says what the thing is and what to do."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from export import bundle
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED, kinds, load
from numpy_ref.errors import PaliGemmaError

from .make_goldens import GOLDEN


@pytest.fixture
def folder(tmp_path):
    """A checkpoint directory to break."""
    return shutil.copytree(GOLDEN / "paligemma1", tmp_path / "checkpoint")


def put(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: put(t, "pt_224.npz.part0") / "pt_224.npz.part0",
         r"one part of a \.npz that was split: join them all \(cat pt_224\.npz\.part\* > pt_224\.npz\) and give that"),
        (lambda t: put(t, "a.npz.partaa") / "a.npz.partaa", r"one part of a \.npz"),
        (lambda t: put(t, "m.gguf") / "m.gguf", "GGUF, weights for llama.cpp.* take the float checkpoint"),
        (lambda t: put(t, "m.gguf", "mmproj.gguf"), "GGUF"),
        (lambda t: put(t, "x.npz"), r"a folder; a big_vision checkpoint is the \.npz in it"),
        (lambda t: put(t, "x.bin") / "x.bin", "a pickle of PyTorch's, which could run anything and is not opened"),
        (lambda t: put(t, "config.json", "pytorch_model.bin"), "a pickle of PyTorch's.*save_pretrained writes safetensors"),
        (lambda t: put(t, "config.json", "pytorch_model.bin.index.json"), "a pickle"),
        (lambda t: put(t, "model.safetensors") / "model.safetensors", r"one file of a checkpoint: give its folder, .*made"),
        (lambda t: put(t, "prefill.onnx") / "prefill.onnx", "one graph of a bundle"),
        (lambda t: put(t, "bundle.json", "weights.bin"), "a bundle, not a checkpoint: run-onnx answers with it"),
        (lambda t: put(t, "photo.png") / "photo.png", "a file; a checkpoint is a Hugging Face directory"),
        (lambda t: put(t), "config.json is missing"),
        (lambda t: t / "gone", "no such checkpoint directory"),
        (lambda t: t / "gone.npz", "no such checkpoint file"),
    ],
    ids=range(15),
)  # fmt: skip
def test_in_place_of_a_checkpoint(tmp_path, make, words):
    path = make(tmp_path / "made")
    with pytest.raises(PaliGemmaError, match=words) as error:
        load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("path", [SHIPPED, GOLDEN / "paligemma1"])
def test_a_checkpoint_in_place_of_a_bundle(path):
    with pytest.raises(
        PaliGemmaError, match=r"a checkpoint, not a bundle: export-onnx .* --output DIR makes one of it"
    ):
        bundle.load(path)


def test_a_npz_in_place_of_a_bundle(tmp_path):
    file = put(tmp_path, "x.npz") / "x.npz"
    with pytest.raises(PaliGemmaError, match="a checkpoint, not a bundle"):
        bundle.load(file)


def test_a_pickle_beside_safetensors_is_left_alone(folder):
    put(folder, "pytorch_model.bin", "model.gguf")
    load(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, nf4"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, "bitsandbytes, fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, int8"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, int8"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "AWQ, 4 bits"),
        ({"quant_method": "fp8"}, "float8"),
        ({"quant_method": "tomorrow's"}, "tomorrow"),
        ({"quant_method": [3]}, "unknown method"),
        (True, "unknown method"),
    ],
    ids=str,
)
def test_quantized_by_config(folder, settings, words):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    with pytest.raises(PaliGemmaError, match=f"weights are quantized .*{words}.* take the float checkpoint"):
        checkpoint.load(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": None}))
    checkpoint.load(folder)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(np.uint8, "bitsandbytes or packed in 4 bits"), (np.int8, "int8"), (np.int32, "GPTQ or AWQ")],
)
def test_quantized_by_its_tensors(folder, dtype, words):
    save_file({"language_model.model.norm.weight": np.ones(3, dtype)}, folder / "model.safetensors")
    with pytest.raises(PaliGemmaError, match=rf"quantized weights \({words}\); take the float checkpoint"):
        load(folder)


def test_kinds_of_what_is_nothing(tmp_path):
    assert kinds.kind(tmp_path) is None
    assert kinds.kind(tmp_path / "gone") is None
    assert kinds.kind(put(tmp_path, "notes.txt") / "notes.txt") is None
