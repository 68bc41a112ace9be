"""Other people's libraries on the folders that are made for them: transformers.js in Node and in Chromium, onnxruntime-genai.

Each is asked what Python is asked, offline, and has to give its greedy tokens. A machine without Node, Chromium or the
libraries skips and says so; where REQUIRE_HOSTS is set, as in CI, that is a failure.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file

import export
from export import bundle, cli, layouts
from export.layouts import GENAI, TRANSFORMERS_JS
from export.layouts import verify as verification
from export.layouts.session import Cache, LayoutSession
from export.model import graphs, layers, merged, paligemma, quantized
from export.session import Session
from export.verify import example
from numpy_ref import checkpoint, files
from numpy_ref.cli import run
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.model.sampling import Sampling
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer

from .make_goldens import GOLDEN, PREFIXES
from .models import CONFIGS, random_params
from .test_golden import NAMES
from .test_hosts import TASKS, browser, case, need, node  # noqa: F401 - fixtures among them

SUITE = suite_of()  # what the shipped model is measured on
CLIENTS = Path(export.__file__).parent / "clients"
STEPS = 24
DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8", "int4": "q4"}
#: Of 50 answers, how many may differ from float32's: measured 0, 1 and 6 (float16 0); int8's own bundle has the same 50.
MAY_DIFFER = {"float32": 0, "float16": 0, "int8": 3, "int4": 12}


@pytest.fixture(scope="module")
def library(node):  # noqa: F811
    need((CLIENTS / "node_modules").is_dir(), f"npm ci --prefix {CLIENTS}")
    return node


@pytest.fixture(scope="module")
def genai():
    need(importlib.util.find_spec("onnxruntime_genai"), "pip install --no-deps onnxruntime-genai")
    return [sys.executable, "-m", "export.clients.genai"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """50 pictures, a prompt each, and Python's greedy answers."""
    folder, opened = tmp_path_factory.mktemp("questions"), bundle.shipped()
    engine, tokenizer, found = Session(opened, "cpu"), Tokenizer.load(opened.path, opened.config), []
    for i, question in enumerate(
        question for task, count in TASKS.items() for question in SUITE.held_out(7, count, task)
    ):
        evaluate.picture(question).save(folder / f"{i}.png")
        found.append(case(engine, tokenizer, folder / f"{i}.png", question.prefix, Sampling()))
    assert len(found) == 50
    return {
        "cases": [{name: each["asked"][name] for name in ("picture", "prompt")} for each in found],
        "tokens": [each["tokens"] for each in found],
        "ids": [tokenizer.prompt(each["asked"]["prompt"]) for each in found],
        "texts": [each["text"] for each in found],
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped model for both libraries, in all precisions, each by a command of its own."""
    folder = tmp_path_factory.mktemp("exported")
    for precision in layouts.PRECISIONS:
        arguments = ["--precision", precision, "--output"]
        assert not run("export-onnx", cli.export_onnx, [*arguments, str(folder / "js"), "--layout", TRANSFORMERS_JS])
        assert not run("export-onnx", cli.export_onnx, [*arguments, str(folder / precision), "--layout", GENAI])
    return folder


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """Both golden models, with windows and soft caps; they have no tokenizer, so they are asked by ids."""
    return [golden(name, tmp_path_factory.mktemp(name)) for name in NAMES]


def golden(name, folder):
    """A model's layouts, and Python's tokens for ids and pictures in bytes."""
    loaded = checkpoint.load(GOLDEN / name)
    config, engine = loaded.config, NumpyEngine(loaded)
    size, pixels = config.vision.image_size, load_file(GOLDEN / name / "golden.safetensors")["pixel_values"]
    raw, tokens = [], []
    for picture, prefix in zip(pixels, PREFIXES, strict=True):
        shown = np.rint((picture + 1) * 127.5)
        ids = [config.image_token] * config.vision.patches + prefix
        known, values = np.ones(config.text.vocab, bool), ((shown / 255 - 0.5) / 0.5).astype(np.float32)[None]
        tokens.append([int(token[0]) for token in generate(engine, values, [ids], known, STEPS)])
        raw.append({"pixels": shown.ravel().tolist(), "size": [size, size], "ids": ids, "count": STEPS})
    assert len({token for answer in tokens for token in answer}) > 5
    for layout in (TRANSFORMERS_JS, GENAI):
        layouts.write(loaded, folder / layout, layout)
    return {"folder": folder, "raw": raw, "tokens": tokens, "patches": config.vision.patches}


def asked(command, **arguments):
    """What a client says."""
    result = subprocess.run(
        [str(part) for part in command], input=json.dumps(arguments, default=str), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def differing(expected, found):
    return sum(a != b for a, b in zip(found, expected, strict=True))


# --- transformers.js ---------------------------------------------------------------------------------------


def test_transformers_js_in_node(library, exported, questions, goldens):
    """Float32, of the first export, is what it takes unless told otherwise."""
    dtypes = [{} if precision == "float32" else {"dtype": DTYPES[precision]} for precision in layouts.PRECISIONS]
    runs = [{"folder": exported / "js", "cases": questions["cases"], **dtype} for dtype in dtypes]
    runs += [{"folder": each["folder"] / TRANSFORMERS_JS, "raw": each["raw"]} for each in goldens]
    found = asked([library, CLIENTS / "node.mjs"], runs=runs)["runs"]
    for precision, answered in zip(layouts.PRECISIONS, found[:4], strict=True):
        assert [each["prompt"] for each in answered["answers"]] == questions["ids"]
        tokens = [each["tokens"] for each in answered["answers"]]
        assert differing(questions["tokens"], tokens) <= MAY_DIFFER[precision], precision
    assert [answered["raw"] for answered in found[4:]] == [each["tokens"] for each in goldens]


def test_transformers_js_in_a_browser(browser, library, exported, questions, goldens):  # noqa: F811
    """Where its own default would be eight bits, the folder says float32. It fetches nothing from elsewhere."""
    some = slice(0, None, 5)
    runs = [{"folder": exported / "js", "cases": questions["cases"]}]
    runs += [{"folder": exported / "js", "cases": questions["cases"][some], "dtype": dtype} for dtype in ("q8", "q4")]
    runs += [{"folder": each["folder"] / TRANSFORMERS_JS, "raw": each["raw"]} for each in goldens]
    found = asked([library, CLIENTS / "page.mjs"], runs=runs)
    assert not found["refused"]
    tokens = [[each["tokens"] for each in answered["answers"]] for answered in found["runs"][:3]]
    assert tokens[0] == questions["tokens"]
    for precision, answered in zip(("int8", "int4"), tokens[1:], strict=True):
        assert differing(questions["tokens"][some], answered) <= MAY_DIFFER[precision], precision
    assert [answered["raw"] for answered in found["runs"][3:]] == [each["tokens"] for each in goldens]


# --- onnxruntime-genai -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", layouts.PRECISIONS)
def test_genai(genai, exported, questions, precision):
    patches = checkpoint.load().config.vision.patches
    command = [*genai, exported / precision]
    found = asked(command, cases=questions["cases"], image_tokens=patches)["answers"]
    ends = checkpoint.load().config.ends
    assert [each["prompt"] for each in found] == questions["ids"]
    answers = [[token for token in each["tokens"] if token not in ends] for each in found]
    assert differing(questions["tokens"], answers) <= MAY_DIFFER[precision]
    if precision == "float32":
        assert [each["text"] for each in found] == questions["texts"]


def test_golden_models_in_genai(genai, goldens):
    for each in goldens:
        command = [*genai, each["folder"] / GENAI]
        found = asked(command, cases=each["raw"], image_tokens=each["patches"])["answers"]
        assert [answer["tokens"] for answer in found] == each["tokens"]


# --- the folders -------------------------------------------------------------------------------------------


def test_what_is_in_the_folders(exported):
    written = {file.relative_to(exported / "js").as_posix() for file in (exported / "js").rglob("*") if file.is_file()}
    settings = {"config.json", "generation_config.json", "preprocessor_config.json"}
    settings |= {"tokenizer.json", "tokenizer_config.json", layouts.RECORD}
    graphs = {
        f"onnx/{name}{suffix}.onnx{data}"
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        for suffix in ("", "_fp16", "_quantized", "_q4")
        for data in ("", "_data")
    }
    assert written == settings | graphs
    client = json.loads((exported / "js" / "config.json").read_text())["transformers.js_config"]
    assert client["dtype"] == "fp32"
    assert {f"onnx/{name}" for name in client["use_external_data_format"]} == {
        name for name in graphs if name.endswith(".onnx")
    }
    record = json.loads((exported / "js" / layouts.RECORD).read_text())
    for entry in record["precisions"].values():
        for name, listed in entry["files"].items():
            assert listed == {
                "bytes": (exported / "js" / name).stat().st_size, "sha256": bundle.sha256(exported / "js" / name),
            }  # fmt: skip
    checkpoint.load_config(exported / "js")  # transformers' files are this project's too


@pytest.mark.parametrize("precision", layouts.PRECISIONS)
def test_their_graphs_are_for_older_runtimes_too(exported, precision):
    for file in [*(exported / precision).glob("*.onnx"), *(exported / "js").rglob("*.onnx")]:
        model = onnx.load(file, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
        assert "TensorScatter" not in {each.op_type for each in model.graph.node}


def test_another_precision_comes_beside(tmp_path, capsys):
    loaded, folder = checkpoint.load(), tmp_path / "js"
    layouts.write(loaded, folder, TRANSFORMERS_JS, "int8")
    before = {file: file.read_bytes() for file in (folder / "onnx").iterdir()}
    layouts.write(loaded, folder, TRANSFORMERS_JS, "int4")
    assert all(file.read_bytes() == contents for file, contents in before.items())
    assert json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"] == "q8"
    assert {*json.loads((folder / layouts.RECORD).read_text())["precisions"]} == {"int8", "int4"}
    everything = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(PaliGemmaError, match="has int8 already"):
        layouts.write(loaded, folder, TRANSFORMERS_JS, "int8")
    with pytest.raises(PaliGemmaError, match="is of another checkpoint"):
        layouts.write(checkpoint.load(GOLDEN / "paligemma1"), folder, TRANSFORMERS_JS, "float32")
    with pytest.raises(PaliGemmaError, match="exists already"):
        layouts.write(loaded, folder, GENAI)

    def fail(*_):
        raise PaliGemmaError("no")

    with pytest.raises(PaliGemmaError, match="no"):
        layouts.write(loaded, folder, TRANSFORMERS_JS, "float32", verify=fail)
    assert everything == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert [each.name for each in tmp_path.iterdir()] == ["js"]


def test_added_files_come_whole_or_not(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")

    def fail():
        with files.added_files(tmp_path / "there") as folder:
            (folder / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "there" / "a").read_text() == "old"
    with files.added_files(tmp_path / "there") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("new")
        (folder / "a").write_text("new")
    assert sorted(each.name for each in (tmp_path / "there").rglob("*")) == ["a", "b", "inner"]
    assert (tmp_path / "there" / "a").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(("options", "words"), [
    (["--precision", "bfloat16"], "in float32, float16, int8, int4, not in bfloat16"),
    (["--precision", "float16", "--operators", "fused"], "not with --layout genai in float16"),
    (["--prepack"], "argument --prepack: not with --layout genai"),
    (["--residual", "float32"], "argument --residual: not with --layout genai"),
    (["--max-length", "3"], "--max-length 3"),
])  # fmt: skip
def test_what_does_not_go_with_a_layout(options, words, tmp_path, capsys):
    arguments = ["--layout", GENAI, "--output", str(tmp_path / "out"), *options]
    try:
        code = run("export-onnx", cli.export_onnx, arguments)
    except SystemExit as ended:
        code = ended.code
    assert code in (1, 2)
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [TRANSFORMERS_JS, GENAI])
def test_a_plan_names_the_files_and_their_sizes(name, tmp_path):
    layouts.write(checkpoint.load(), tmp_path / "out", name, "int4")
    planned = layouts.plan(checkpoint.load(), name, "int4", None, None)["files"]
    found = {file.relative_to(tmp_path / "out").as_posix(): file.stat().st_size
             for file in (tmp_path / "out").rglob("*") if file.is_file()}  # fmt: skip
    del found[layouts.RECORD]
    assert planned.keys() == found.keys()
    assert all(planned[path] == found[path] for path in found if path != "config.json")


# --- verified ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operators", ["portable", "fused"])
@pytest.mark.parametrize("name", [TRANSFORMERS_JS, GENAI])
@pytest.mark.parametrize("model", CONFIGS)
def test_verify_passes_and_is_kept(model, name, operators, tmp_path, capsys):
    layouts.write(small(tmp_path, model), tmp_path / "out", name, operators=operators, verify=verification.verify)
    rows = json.loads((tmp_path / "out" / layouts.RECORD).read_text())["precisions"]["float32"]["parity"]
    assert max(row["error"] for row in rows) < 1e-5
    parts = {(row["stage"], row["part"]) for row in rows}
    assert {("prefill", "vision.blocks.0"), ("prefill", "projector"), ("decode", "text.blocks.1"), ("decode", "cache"),
            ("prefill", "logits"), ("end to end", "decode 4 logits")} <= parts  # fmt: skip
    assert ("prefill", "embed" if name == TRANSFORMERS_JS else "embed_prefix") in parts


def test_verify_prints_what_eight_bits_cost(tmp_path, capsys):
    layouts.write(checkpoint.load(), tmp_path / "out", GENAI, "int8", verify=verification.verify)
    assert "int8 against float32 over" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["mask", "cache", "last token"])
def test_verify_notices(wrong, tmp_path, monkeypatch):
    """A mask without the padding, a cache that is written in front, logits of the token before the last."""
    if wrong == "mask":
        right = merged.mask
        monkeypatch.setattr(merged, "mask", lambda op, mask, *rest: right(op, op.Max(mask, 1), *rest))
    elif wrong == "cache":
        in_front = {layers.write_cache: lambda op, cache, update, start: op.Concat(update, cache, axis=2)}
        monkeypatch.setattr(merged, "INSTEAD", merged.INSTEAD | in_front)
    else:
        right = paligemma.last_position.portable
        before = lambda op, x, lengths: right(op, x, op.Max(op.Sub(lengths, 1), 1))  # noqa: E731
        monkeypatch.setattr(paligemma.last_position, "portable", before)
    with pytest.raises(PaliGemmaError, match="differs from the reference"):
        layouts.write(small(tmp_path), tmp_path / "out", TRANSFORMERS_JS, verify=verification.verify)
    assert not (tmp_path / "out").exists()


def small(folder, name="paligemma2", seed=5):
    """With windows and soft caps."""
    config = CONFIGS[name]
    return checkpoint.Checkpoint(folder, config, random_params(config, seed), np.dtype("f8"))


def opened(folder):
    """The same for transformers.js, opened."""
    layouts.write(small(folder), folder / "out", TRANSFORMERS_JS)
    return LayoutSession(layouts.prepare(small(folder), TRANSFORMERS_JS), folder / "out")


def test_padding_on_either_side_changes_nothing(tmp_path):
    """A batch of unequal rows, padded on the left as libraries do, gives what each row gives alone."""
    session = opened(tmp_path)
    inputs, text = example(session.config), session.config.text
    rng, size = np.random.default_rng(0), inputs.input_ids.shape[1]
    rows = [rng.standard_normal((length, text.width), np.float32) for length in inputs.lengths]

    def logits(embeddings, mask):
        empty = np.zeros((len(mask), text.kv_heads, 0, text.head_dim), np.float32)
        past = {f"{i}.{kind}": empty for i in range(text.depth) for kind in ("key", "value")}
        return session._step(embeddings, Cache(mask, past))[0]

    alone = [logits(row[None], np.ones((1, len(row)), np.int64))[0] for row in rows]
    for place in (lambda length: slice(size - length, size), slice):
        embeddings, mask = rng.standard_normal((2, size, text.width), np.float32), np.zeros((2, size), np.int64)
        for i, row in enumerate(rows):
            embeddings[i, place(len(row))], mask[i, place(len(row))] = row, 1
        assert not mask.all()
        assert np.abs(logits(embeddings, mask) - np.stack(alone)).max() < 1e-5 * np.abs(alone).max()


def test_several_tokens_behind_a_cache_are_causal(tmp_path):
    """Libraries that go on from a cache give several: as many as one by one, in windows too."""
    session = opened(tmp_path)
    inputs = example(session.config)
    _, cache = _, at_once = session.prefill(*inputs.prefill(np.float32))
    for step in inputs.steps:
        logits, cache = session.decode(step, inputs.lengths, cache)
    found, at_once = session.decode(np.concatenate(inputs.steps, axis=1), inputs.lengths, at_once)
    assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max()
    for name, array in cache.numpy().items():
        assert np.abs(at_once.numpy()[name] - array).max() < 1e-5 * np.abs(array).max()


def test_an_image_token_that_was_drawn_is_no_picture(exported):
    """Libraries draw from the whole vocabulary; such a token has its embedding, as in transformers.js."""
    ids, options = np.array([[checkpoint.load().config.image_token]]), {"providers": ["CPUExecutionProvider"]}
    alone = onnxruntime.InferenceSession(exported / "js" / "onnx" / "embed_tokens.onnx", **options)
    with_features = onnxruntime.InferenceSession(exported / "float32" / "embedding.onnx", **options)
    (expected,) = alone.run(None, {"input_ids": ids})
    features = np.zeros((1, 0, expected.shape[-1]), np.float32)
    (found,) = with_features.run(None, {"input_ids": ids, "image_features": features})
    assert np.array_equal(found, expected)


def test_pictures_of_one_size_may_come_together(exported):
    """As transformers.js gives several: their features are those of each alone."""
    file = exported / "float32" / "vision.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, 130, 70)).astype(np.float32)
    (together,) = session.run(None, {"pixel_values": pictures})
    for picture, features in zip(pictures, together, strict=True):
        (alone,) = session.run(None, {"pixel_values": picture[None]})
        assert np.abs(alone[0] - features).max() < 1e-4 * np.abs(features).max()


def test_other_weights_of_the_same_shapes_do_not_mix(tmp_path):
    layouts.write(small(tmp_path, "paligemma1", 5), tmp_path / "out", TRANSFORMERS_JS)
    with pytest.raises(PaliGemmaError, match="is of another checkpoint"):
        layouts.write(small(tmp_path, "paligemma1", 6), tmp_path / "out", TRANSFORMERS_JS, "int8")


def test_a_tokenizer_of_sentencepiece_alone_is_converted(tmp_path):
    source = shutil.copytree(checkpoint.SHIPPED, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    made = layouts.prepare(checkpoint.load(source), TRANSFORMERS_JS).made
    assert json.loads(made["tokenizer_config.json"])["bos_token"] == "<bos>"
    pieces = json.loads((checkpoint.SHIPPED / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(json.loads(made["tokenizer.json"])["model"]["vocab"]) == len(pieces)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_in_standard_operators_are_the_same(bits):
    """As the reference dequantizes them, for one id and for many."""
    table = np.random.default_rng(0).standard_normal((11, 64), np.float32)
    values, scales = quantized.quantize_blocks(table, bits)
    ids = np.array([[3, 0, 10], [7, 7, 1]])
    tensors = (ir.tensor(values, name="values"), None, ir.tensor(scales, name="scales"))

    def rows(op, ids):
        blocks = quantized.Blocks(*tensors, bits).declare(op.builder)
        return quantized.table_rows_in_standard_operators(op, blocks, ids)

    model, feeds = graphs.trace(rows, {"ids": ids})
    session = onnxruntime.InferenceSession(graphs.serialize(model), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    assert np.array_equal(found, quantized.dequantize_blocks(values, scales, bits)[ids])
