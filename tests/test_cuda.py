"""Bundles on CUDA, as far as that can be seen without a GPU: ONNX Runtime's own provider over a stub of the libraries.

Where its nodes are put, what it launches, copies, waits for and captures are the provider's own; values are not there,
since kernels compute nothing (`python -m export.gpu_check` compares them on a device).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export import bundle
from export.bundle.weights import FILE
from numpy_ref import checkpoint
from numpy_ref.checkpoint import Checkpoint, parameters, unflatten
from numpy_ref.config import VARIANTS

from . import cuda_stub
from .cuda_stub.log import Copy, Kernel, Product

ON_CUDA = [
    ("float32", "portable"), ("float16", "portable"), ("float16", "fused"), ("bfloat16", "portable"),
    ("bfloat16", "fused"), ("int4-float16", "fused"), ("int4-float16", "portable"), ("int4-bfloat16", "fused"),
]  # fmt: skip
NOT_ON_CUDA = [("float32", "fused"), ("int8", "portable"), ("int8", "fused"), ("int4", "portable"), ("int4", "fused")]
BATCHES = (1, 3)
STEPS = 4
TF32 = 3  # of cublasMath_t
#: What the provider leaves to the host: sizes, which kernels want there.
SIZES = {"Shape", "Squeeze", "Unsqueeze", "Cast", "Sub", "Add", "Concat", "Slice", "Gather", "Reshape", "Min", "Range"}

BEGIN = """
import json, sys
from pathlib import Path
import numpy as np
from export import bundle, session
from export.session.engine import ON_DEVICE
from export.gpu_check import placement
from numpy_ref.generate import pad_prompts
from numpy_ref.model.sampling import Sampling
from tests.cuda_stub.inside import *

def open_bundle(folder, **options):
    return session.open_session(bundle.load(folder), "cuda", provider_options=options)

def answer(engine, batch, steps, name="", temperature=0.0, capacity=None):
    config = engine.config
    image = [config.image_token] * config.vision.patches
    ids, lengths = pad_prompts([[*image, config.bos, *range(5, 8 + 3 * row)] for row in range(batch)], config.pad)
    size = config.vision.image_size
    mark(f"{name}prefill")
    logits, cache = engine.prefill(np.zeros((batch, 3, size, size)), ids, lengths, ids.shape[1] + steps)
    uniform = np.linspace(0.1, 0.9, batch, dtype=np.float32)
    for step in range(steps):
        mark(f"{name}sample {step}")
        number = uniform + np.float32(step / 100)
        token, logprob = engine.draw(logits, None, Sampling(temperature, 40 * bool(temperature), 0.9), number)
        mark(f"{name}decode {step}")
        logits, cache = engine.decode(token[:, None], lengths + step, cache)
    mark("after")
"""


@pytest.fixture(scope="module", autouse=True)
def _stub():
    cuda_stub.require()


def few_layers(name, layers=2):
    """The shape of a released model, but narrow, with few layers and a small vocabulary."""
    config = VARIANTS[name]
    text = replace(config.text, width=256, mlp=512, vocab=3000, depth=layers, windows=config.text.windows[:layers])
    vision = replace(config.vision, width=144, heads=2, mlp=256, image_size=56, depth=layers)
    return replace(config, text=text, vision=vision, image_token=2999)


def random_model(config):
    random = np.random.default_rng(0)
    arrays = {p.path: (random.standard_normal(p.shape) * 0.05).astype(np.float32) for p in parameters(config)}
    return Checkpoint(Path("."), config, unflatten(arrays), np.dtype("f4"))


MODELS = {
    "shipped": checkpoint.load,
    "paligemma": lambda: random_model(few_layers("paligemma-3b-224")),
    "paligemma2": lambda: random_model(few_layers("paligemma2-3b-224")),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """name, precision, operators -> the folder of a bundle, made once."""
    root = tmp_path_factory.mktemp("bundles")

    def folder(name, precision, operators, **options):
        path = root / "-".join([name, precision, operators, *map(str, options.values())])
        if not path.exists():
            bundle.write(MODELS[name](), path, precision, operators=operators, **options)
        return path

    return folder


@pytest.fixture(scope="module", params=[*((name, *kind) for name in ("shipped",) for kind in ON_CUDA),
                                        *((name, *kind) for name in ("paligemma", "paligemma2")
                                          for kind in ON_CUDA if kind[1] == "fused")], ids=" ".join)  # fmt: skip
def run(request, bundles):
    """A bundle that was run: its name, what was printed, and the log of both batches, greedy and drawn."""
    folder = bundles(*request.param)
    script = """
from export.session import device
device.SHARED_FROM = 1024  # the weights of a model this small too
mark("open")
engine = open_bundle(sys.argv[1])
for batch in (1, 3):
    answer(engine, batch, 4, f"{batch} first ")  # libraries and buffers are made when first wanted
    answer(engine, batch, 4, f"{batch} ")
    answer(engine, batch, 4, f"{batch} drawn ", temperature=1.0)
placed = {name: placement.placed(engine.bundle.graph_file(name), True) for name in ON_DEVICE}
print(json.dumps(placed))
"""
    printed, log = cuda_stub.run(BEGIN + script, folder)
    return request.param, folder, json.loads(printed), log


def test_no_graph_leaves_the_device(run):
    """No node but those for sizes is the host's, no value is copied between the two, and decode's own are all there."""
    _, _, placed, _ = run
    for name, graph in placed.items():
        assert set(graph["on_cpu"]) <= SIZES, name
        assert graph["memcpy"] == 0, name
    assert {*placed["decode"]["inputs"].values(), *placed["decode"]["outputs"].values()} == {"Cuda"}
    assert set(placed["prefill"]["outputs"].values()) == {"Cuda"}


def test_a_step_waits_once_for_its_token(run):
    _, _, _, log = run
    for batch in BATCHES:
        for name in (f"{batch} ", f"{batch} drawn "):
            for step in range(1, STEPS):
                decode, sample = log[f"{name}decode {step}"], log[f"{name}sample {step}"]
                assert decode.waits == []
                assert decode.copies("D2H") == []
                assert [copy.bytes for copy in decode.copies("H2D")] == [8 * batch, 4 * batch]  # tokens, lengths
                (token,) = sample.waits
                assert (token.direction, token.bytes) == ("D2H", (8 + 4) * batch)  # and log-probabilities
                assert sample.copies("D2H") == [token]
                sent = sample.copied("H2D")
                assert sent == (4 * batch if "drawn" in name else 0)  # the uniform numbers, where they matter
                assert decode.allocations == sample.allocations == []


def test_prefill_does_not_wait_within(run):
    """Its picture and prompt are copied before the first kernel, and nothing is read back."""
    _, _, _, log = run
    for batch in BATCHES:
        prefill = log[f"{batch} prefill"]
        assert prefill.copies("D2H") == []
        events = [event for _, event in prefill.events]
        kernels = [i for i, event in enumerate(events) if isinstance(event, Kernel)]
        within = events[kernels[0] : kernels[-1]]
        assert not any(event is wait for wait in prefill.waits for event in within)
        assert not any(isinstance(event, Copy) and event.direction == "H2D" for event in within)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_features_stay_on_the_device(bundles, precision):
    """A picture goes there once, for any number of prompts; nothing of it comes back, and the weights are there once."""
    script = """
from export.session import device
device.SHARED_FROM = 1024
mark("open")
engine = open_bundle(sys.argv[1])
config = engine.config
pixels = np.zeros((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
ids, lengths = pad_prompts([[*[config.image_token] * config.vision.patches, config.bos, 5, 6]] * 3, config.pad)
for round in ("first ", ""):
    mark(f"{round}encode")
    features = engine.encode(pixels)
    mark(f"{round}prefill")
    logits, cache = engine.prefill(features * 3, ids, lengths, ids.shape[1] + 1)
    mark("after")
print(config.vision.patches * config.text.width, engine._prefill)
"""
    folder = bundles("paligemma", precision, "fused")
    printed, log = cuda_stub.run(BEGIN + script, folder)
    size = bundle.load(folder).config.vision.image_size
    encode, prefill = log["encode"], log["prefill"]
    assert encode.copied("H2D") == 4 * 3 * size**2
    assert encode.copies("D2H") == prefill.copies("D2H") == []
    features, whole = printed.split()[-2:]
    assert whole == "None"
    assert [copy.bytes for copy in prefill.copies("D2D")][:3] == [4 * int(features)] * 3
    assert prefill.copied("H2D") < 4 * int(features)
    assert launches(encode) > 5
    assert launches(prefill) > 5
    for phase in (encode, prefill):
        assert launched_on(phase) == launched_on(encode)
    assert len(launched_on(encode)) == 1
    opened = bundle.load(folder)
    table = 2 * 2 * opened.config.max_length * opened.config.text.head_dim // 2  # of rotary positions, in three graphs
    sent = log["open"].copied("H2D") + log["first encode"].copied("H2D")
    assert sent < 1.1 * opened.weight_bytes + 3 * table + 2**19
    assert log.violations == []


def test_all_launches_are_on_one_stream(run):
    _, _, _, log = run
    phases = [f"{b} {graph} 1" for b in BATCHES for graph in ("decode", "sample")] + [f"{b} prefill" for b in BATCHES]
    streams = {stream for phase in phases for stream in launched_on(log[phase])}
    assert len(streams) == 1
    assert streams != {(0, 0)}  # not the default one, which waits for all others


def launched_on(log):
    return {(event.device, event.stream) for kind in (Kernel, Product) for event in log.of(kind)}


def test_weights_are_uploaded_once(run):
    """What both graphs use once; of a model this small the tables of rotary positions weigh as much, in each graph."""
    (_, _, operators), folder, _, log = run
    config = bundle.load(folder).config
    tables = 2 * 2 * 2 * config.max_length * config.text.head_dim // 2 if operators == "fused" else 0
    size = (folder / FILE).stat().st_size
    assert size < log["open"].copied("H2D") + 2**18 < 1.1 * size + tables + 2**19


def test_nothing_forbidden_is_called(run):
    _, _, _, log = run
    assert log.violations == []


def test_products_of_float32_are_of_float32(run):
    (_, precision, _), _, _, log = run
    assert precision != "float32" or all(product.math != TF32 for product in log.of(Product))


@pytest.mark.parametrize("capture", ["0", "1"])
@pytest.mark.parametrize("kind", [("shipped", "float32", "portable"), ("shipped", "float16", "fused"),
                                  ("paligemma2", "bfloat16", "fused"), ("paligemma", "int4-float16", "fused")],
                         ids=" ".join)  # fmt: skip
def test_several_tokens_and_a_grammar_stay_on_the_device(bundles, kind, capture):
    """Of several tokens at once, and of what each row may draw alone, the tokens are what comes back, in one copy."""
    script = """
engine = open_bundle(sys.argv[1], enable_cuda_graph=sys.argv[2])
config, batch = engine.config, 3
vocab, size = config.text.vocab, config.vision.image_size
ids, lengths = pad_prompts([[config.image_token] * config.vision.patches + [config.bos, 5 + row] for row in range(3)], 0)
for name in ("first ", ""):  # graphs and buffers are made when first wanted
    logits, cache = engine.prefill(np.zeros((batch, 3, size, size)), ids, lengths, ids.shape[1] + 9)
    for step in range(2):
        given = np.full((batch, 4), 7 + step)
        mark(f"{name}extend {step}")
        logits, cache = engine.extend(given, lengths + 4 * step, cache)
        mark(f"{name}draw {step}")
        token, _ = engine.draw(logits, np.ones(vocab, bool), Sampling(1.0, 40), np.full(12, 0.5 + step / 9, np.float32))
        allowed = np.arange(vocab) % (5 + step) == np.arange(12)[:, None] % 5
        mark(f"{name}constrain {step}")
        token, _ = engine.draw(logits, allowed, Sampling(1.0, 40), np.full(12, 0.5 + step / 9, np.float32))
    mark("after")
    logits, cache = engine.decode(token[:3, None], lengths + 8, cache)
print(vocab)
"""
    printed, log = cuda_stub.run(BEGIN + script, bundles(*kind), capture)
    vocab = int(printed.splitlines()[-1])
    assert log.violations == []
    extend = log["extend 1"]
    assert extend.waits == extend.copies("D2H") == extend.captures == extend.replays == []
    assert [copy.bytes for copy in extend.copies("H2D")] == [8 * 12, 4 * 3]  # tokens, lengths
    for name, sent in (("draw 1", 4 * 12), ("constrain 1", 4 * 12 + 12 * vocab)):  # uniform numbers, what is allowed
        drawn = log[name]
        assert [copy.bytes for copy in drawn.copies("D2H")] == [(8 + 4) * 12]
        assert len(drawn.waits) == 1
        assert drawn.copied("H2D") == sent
        assert drawn.captures == drawn.replays == drawn.allocations == []


# --- how much is launched ----------------------------------------------------------------------------------


def launches(log) -> int:
    return len(log.kernels) + len(log.products)


def decode_step(folder):
    _, log = cuda_stub.run(BEGIN + "answer(open_bundle(sys.argv[1]), 1, 3)", folder)
    return log["decode 2"]


@pytest.mark.parametrize(
    ("name", "precision", "residual", "flash", "xqa"),
    [
        ("paligemma-3b-224", "bfloat16", None, 186, 222), ("paligemma-3b-224", "float16", "float16", 186, 222),
        ("paligemma-3b-224", "float16", None, 260, 296), ("paligemma2-3b-224", "bfloat16", None, 321, 321),
        ("paligemma-3b-224", "int4-bfloat16", None, 186, 222),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_xqa", ["0", "1"])
def test_launches_of_a_step_at_full_depth(tmp_path, monkeypatch, name, precision, residual, flash, xqa, with_xqa):
    """Kernels and products of all layers of a 3B, by the kernels of attention; portable graphs have 1004, and 72 copies.

    The stub has no attention of cuDNN's, so that the runtime takes flash kernels; of a short cache they are one a layer.
    """
    monkeypatch.setenv("ORT_ENABLE_XQA", with_xqa)
    config = few_layers(name, VARIANTS[name].text.depth)
    config = replace(config, vision=replace(config.vision, depth=1))
    bundle.write(random_model(config), tmp_path / "out", precision, residual=residual)
    step = decode_step(tmp_path / "out")
    assert launches(step) <= (xqa if with_xqa == "1" else flash)
    assert step.copies("D2D") == []


def test_attention_is_in_few_kernels(bundles):
    """Flash kernels in prefill, in the vision tower too, with a soft cap and without; scores are never whole."""
    for name in ("paligemma", "paligemma2"):
        for precision in ("float16", "bfloat16"):
            folder = bundles(name, precision, "fused")
            _, log = cuda_stub.run(BEGIN + "answer(open_bundle(sys.argv[1]), 3, 1)", folder)
            kernels = log["prefill"].kernels
            layers = MODELS[name]().config
            flash = sum(kernel.startswith("flash_fwd") and "combine" not in kernel for kernel in kernels)
            assert flash == layers.text.depth + layers.vision.depth
            assert not any("oftmax" in kernel for kernel in kernels)


# --- captured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ON_CUDA, ids=" ".join)
def test_captured_steps_are_replayed(bundles, kind):
    """Batches 1, 3, 1 again, and a short answer behind a long one: after the first of its kind a step is two launches."""
    script = """
engine = open_bundle(sys.argv[1], enable_cuda_graph="1")
for name, batch, steps in (("a", 1, 4), ("b", 3, 4), ("c", 1, 4), ("d", 1, 2), ("e", 3, 3)):
    answer(engine, batch, steps, f"{name} ")
"""
    _, log = cuda_stub.run(BEGIN + script, bundles("shipped", *kind))
    assert log.violations == []
    for name, batch, steps in (("c", 1, 4), ("d", 1, 2), ("e", 3, 3)):
        for step in range(steps):
            decode, sample = log[f"{name} decode {step}"], log[f"{name} sample {step}"]
            assert decode.captures == sample.captures == []
            assert len(decode.replays) == len(sample.replays) == 1
            assert decode.kernels == sample.kernels == decode.products == decode.waits == []
            assert decode.copied("H2D") == 12 * batch
            (token,) = sample.waits
            assert token.bytes == (8 + 4) * batch
    assert len({decode.graph for name in "acd" for decode in log[f"{name} decode 1"].replays}) == 1
    replay = log["c decode 1"].replays[0]
    assert replay.product + replay.kernel > 40  # of four layers


def test_an_answer_that_is_longer_takes_another_cache(bundles):
    """Its capture is another too: the first one's buffers stay as they are."""
    script = """
engine = open_bundle(sys.argv[1], enable_cuda_graph="1")
answer(engine, 1, 4, "short ")
answer(engine, 1, 70, "long ")
answer(engine, 1, 4, "again ")
print([size for _, size in engine._caches], engine.max_length)
"""
    printed, log = cuda_stub.run(BEGIN + script, bundles("shipped", "float16", "fused"))
    assert printed.strip() == "[128, 256] 256"
    graphs = [log[f"{name} decode 3"].replays[0].graph for name in ("short", "long", "again")]
    assert graphs[0] == graphs[2] != graphs[1]


# --- devices, and what CUDA cannot have --------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["0", "1"])
def test_the_second_of_two_devices_is_used_alone(bundles, capture):
    script = """
engine = open_bundle(sys.argv[1], device_id="1", enable_cuda_graph=sys.argv[2])
answer(engine, 3, 4)
"""
    _, log = cuda_stub.run(BEGIN + script, bundles("shipped", "float16", "fused"), capture, devices=2)
    assert log.devices == {1}
    assert log.violations == []


def command(*arguments, **options):
    """run-onnx over the stub: its status, standard output and error."""
    script = """
import contextlib, io, sys
from export.cli import run_main
out, err = io.StringIO(), io.StringIO()
sys.argv[0] = "run-onnx"
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        run_main()
    except SystemExit as end:
        status = end.code
print(__import__("json").dumps([status, out.getvalue(), err.getvalue()]))
"""
    printed, log = cuda_stub.run(script, *arguments, **options)
    return *json.loads(printed.splitlines()[-1]), log


EXAMPLE = checkpoint.SHIPPED / "example.png"


@pytest.mark.parametrize("kind", NOT_ON_CUDA, ids=" ".join)
def test_what_cannot_run_there_runs_on_the_cpu(bundles, kind):
    """Under auto, told in one line, with the right answer; under cuda it is refused with what to do."""
    folder = bundles("shipped", *kind)
    status, out, err, log = command(folder, EXAMPLE, "answer en how many shapes are there?", "--provider", "auto")
    assert (status, out.strip()) == (0, "5")
    assert err.count("\n") == 1
    assert err.startswith("running on the CPU: ")
    assert "for CUDA export it with" in err
    assert not log.kernels
    status, out, err, _ = command(folder, EXAMPLE, "caption en", "--provider", "cuda")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"run-onnx: error: {folder}: --provider cuda: ")
    assert "for CUDA export it with --precision" in err


def test_the_shipped_model_runs_on_the_device():
    """Its cached bundle is made for the provider, and decode's values are all there."""
    script = """
engine, _ = session.load(provider="auto")
infos = [*engine._decode.get_input_memory_infos(), *engine._decode.get_output_memory_infos()]
print(engine.name, engine.device, engine.bundle.operators, {info.name for info in infos})
cpu, _ = session.load(provider="cpu")
print(cpu.device, cpu.bundle.operators)
answer(engine, 1, 3)
"""
    printed, log = cuda_stub.run(BEGIN + script)
    assert printed.splitlines()[-2:] == ["onnx cuda portable {'Cuda'}", "cpu fused"]
    assert log["decode 1"].kernels


def test_a_device_that_is_not_there(bundles):
    folder = bundles("shipped", "float16", "fused")
    for wanted in ("2", "first"):
        status, _, err, _ = command(
            folder, EXAMPLE, "caption en", "--provider-option", f"device_id={wanted}", devices=2
        )
        assert status == 1
        assert f"device_id={wanted}: this machine has the devices 0 to 1" in err


def test_the_graphs_for_hosts_stay_on_the_host(bundles):
    """With --host-graphs pictures are prepared and tokens drawn on the CPU; captures are refused."""
    folder = bundles("shipped", "float16", "fused")
    arguments = (folder, EXAMPLE, "caption en", "--host-graphs", "--max-new-tokens", "3", "--provider", "cuda")
    status, _, err, log = command(*arguments)
    assert (status, err) == (0, "")
    assert log.kernels
    assert not any("TopK" in kernel for kernel in log.kernels)
    status, _, err, _ = command(*arguments, "--provider-option", "enable_cuda_graph=1")
    assert (status, err.count("\n")) == (1, 1)
    assert "not with --host-graphs" in err


def test_a_bundle_of_an_older_export(bundles, tmp_path):
    """It has no graph that samples on the device: refused under cuda with what to do, and run on the CPU under auto."""
    folder = shutil.copytree(bundles("shipped", "float16", "portable"), tmp_path / "old")
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    del description["graphs"]["sample_device"], description["files"]["sample_device.onnx"]
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))
    status, _, err, _ = command(folder, EXAMPLE, "caption en", "--provider", "cuda")
    assert (status, err.count("\n")) == (1, 1)
    assert "for CUDA export it again" in err
    status, out, err, _ = command(folder, EXAMPLE, "answer en how many shapes are there?")
    assert (status, out.strip(), err.count("\n")) == (0, "5", 1)


def test_libraries_that_do_not_load(bundles):
    """Auto says so in one line and takes the CPU; cuda is refused."""
    script = """
import onnxruntime
def fails(*arguments):
    raise RuntimeError("libcublasLt.so.13: cannot open shared object file")
onnxruntime.OrtValue.ortvalue_from_shape_and_type = staticmethod(fails)
print(session.choose_provider("auto"))
try:
    session.choose_provider("cuda")
except Exception as error:
    print(error)
"""
    printed, _ = cuda_stub.run(BEGIN + script)
    first, second = printed.splitlines()
    assert first == "CPUExecutionProvider"
    assert "its libraries do not load (libcublasLt.so.13: cannot open" in second
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in second


def test_an_upload_that_fails_is_reported(bundles):
    """With the memory of the device full the session does not go on without its weights."""
    folder = bundles("shipped", "float16", "fused")
    with pytest.raises(
        cuda_stub.ScriptFailed,
        match=r"PaliGemmaError: .*there is no room for it on device 0|PaliGemmaError: .*Failed to allocate memory",
    ):
        cuda_stub.run(BEGIN + "open_bundle(sys.argv[1])", folder, memory=2**20)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_batch_workers_keep_the_same_rules(bundles, tmp_path, workers):
    """A bundle that is for the CPU runs there, told once, whatever the number of workers."""
    shutil.copy(EXAMPLE, tmp_path / "a.png")
    shutil.copy(EXAMPLE, tmp_path / "b.png")
    script = """
import contextlib, io, sys
from export.cli import batch_main
if __name__ == "__main__":
    sys.argv[0], err = "run-onnx-batch", io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            batch_main()
        except SystemExit as end:
            print(end.code)
    print(err.getvalue().count("running on the CPU: "))
"""
    folder, out = bundles("shipped", "float32", "fused"), tmp_path / "out.jsonl"
    arguments = ["--input", tmp_path, "--prompt", "answer en how many shapes are there?", "--output", out]
    printed, _ = cuda_stub.run(script, folder, *arguments, "--workers", workers, "--batch-size", "1")
    assert printed.split()[-2:] == ["0", "1"]
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["5", "5"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_batch_workers_take_the_device_that_is_asked_for(bundles, tmp_path, workers):
    shutil.copy(EXAMPLE, tmp_path / "a.png")
    shutil.copy(EXAMPLE, tmp_path / "b.png")
    script = """
from export.cli import batch_main
if __name__ == "__main__":
    batch_main()
"""
    arguments = ["--input", tmp_path, "--prompt", "caption en", "--output", tmp_path / "out.jsonl", "--provider", "cuda",
                 "--provider-option", "device_id=1", "--max-new-tokens", "2", "--batch-size", "1"]  # fmt: skip
    _, log = cuda_stub.run(script, bundles("shipped", "float16", "fused"), *arguments, "--workers", workers, devices=2)
    assert log.devices == {1}
    assert log.kernels


def test_an_option_that_the_provider_does_not_know(bundles):
    folder = bundles("shipped", "float16", "fused")
    status, _, err, _ = command(folder, EXAMPLE, "caption en", "--provider-option", "nonsense=1")
    assert status == 1
    assert "does not start it with the options use_tf32=0, nonsense=1" in err


# --- mutants -----------------------------------------------------------------------------------------------

WRITE = """
from export.model import fused_half, sampling
from numpy_ref import checkpoint
"""
PLACED = """
made = Path(sys.argv[1])
bundle.write(checkpoint.load(), made, sys.argv[2])
opened = bundle.load(made)
print(json.dumps({name: placement.placed(opened.graph_file(name), True) for name in ON_DEVICE}))
"""
TOTAL = """
from onnx_ir import DataType
mask = fused_half.decode_mask
def on_the_device(op, lengths, capacity, window=None, size=1):
    if not isinstance(size, int):  # extend's, which has no such value
        return mask(op, lengths, capacity, window, size)
    total = op.Cast(op.Add(op.ReduceMax(lengths, keepdims=0), 1), to=DataType.INT32)
    return fused_half.replace(mask(op, lengths, capacity, window), total=total)
fused_half.replace = __import__("dataclasses").replace
from export.model import paligemma
fused_half.INSTEAD[paligemma.decode_mask] = on_the_device
"""
ARGMAX = """
from onnx_ir import DataType
def with_argmax(op, weights, uniform):
    cumulated = op.CumSum(weights, 1)
    total = op.Slice(cumulated, [-1], [2**31 - 1], [1])
    beyond = op.Greater(cumulated, op.Mul(op.Unsqueeze(uniform, [1]), total))
    return op.ArgMax(op.Cast(beyond, to=DataType.INT32), axis=1, keepdims=0)
sampling.invert_cdf = with_argmax
"""


def test_a_total_length_from_the_device_is_noticed(tmp_path):
    printed, _ = cuda_stub.run(BEGIN + WRITE + TOTAL + PLACED, tmp_path / "out", "float16")
    assert json.loads(printed.splitlines()[-1])["decode"]["memcpy"] > 0


def test_an_argmax_of_whole_numbers_is_noticed(tmp_path):
    printed, _ = cuda_stub.run(BEGIN + WRITE + ARGMAX + PLACED, tmp_path / "out", "float16")
    placed = json.loads(printed.splitlines()[-1])["sample_device"]
    assert placed["memcpy"] > 0
    assert "ArgMax" in placed["on_cpu"]


def test_attention_without_a_kernel_is_noticed(bundles):
    """GroupQueryAttention of float32, where nothing says beforehand that it has none."""
    script = """
bundle.Bundle.only_for_cpu = ""
try:
    open_bundle(sys.argv[1])
except Exception as error:
    print(error)
"""
    printed, _ = cuda_stub.run(BEGIN + script, bundles("shipped", "float32", "fused"))
    assert "decode.onnx: CUDA has no kernels for all of it" in printed


# --- the check for a GPU -----------------------------------------------------------------------------------


def test_gpu_check_runs_to_its_end(tmp_path):
    """Every stage is answered; numbers differ, since kernels compute nothing."""
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from export.gpu_check import command
from export.gpu_check.stage import Settings
from tests.test_cuda import few_layers
settings = Settings(Path(sys.argv[1]), "cuda", "narrow", few_layers("paligemma-3b-224"), steps=4, generations=6)
print(__import__("json").dumps(command.plain(command.check(settings))))
"""
    printed, _ = cuda_stub.run(script, tmp_path / "work", timeout=600)
    answers = json.loads(printed.splitlines()[-1])
    assert list(answers) == [
        "environment", "placement", "numbers", "capture", "speed", "peer", "kernels", "compiled"
    ]  # fmt: skip
    statuses = {name: answer["status"] for name, answer in answers.items()}
    for name in ("environment", "placement", "capture", "speed"):
        assert statuses[name] == "ok", answers[name]
    assert statuses["numbers"] == "differs"
    for answer in answers.values():
        assert answer["parts"]
        for part in answer["parts"].values():
            assert part["status"] in ("ok", "differs", "not here"), part
    assert answers["placement"]["parts"]["float16 fused"]["wholly"]
    assert not answers["placement"]["parts"]["float32 fused"]["wholly"]


# --- a search ----------------------------------------------------------------------------------------------

SEARCH = """
engine = open_bundle(sys.argv[1], **({"enable_cuda_graph": sys.argv[2]} if sys.argv[2] == "1" else {}))
config, size = engine.config, engine.config.vision.image_size
ids = np.array([[*[config.image_token] * config.vision.patches, config.bos, 5, 6]])
lengths, known = np.array([ids.shape[1]], np.int32), np.ones(config.text.vocab, bool)
ends, locations = np.array([config.eos]), np.arange(5, 1029)
for turn in ("first ", ""):
    logits, cache = engine.prefill(np.zeros((1, 3, size, size)), ids, lengths, ids.shape[1] + 8)
    for step in range(4):
        mark(f"{turn}rank {step}")
        engine.likeliest(logits, known, 3, ends)
        mark(f"{turn}spread {step}")
        engine.location_spread(logits, locations)
        mark(f"{turn}reorder {step}")
        cache = engine.reorder(cache, np.array([2, 0, 0]) if step else np.array([0, 0, 0]))
        mark(f"{turn}decode {step}")
        logits, cache = engine.decode(np.full((3, 1), 7), lengths.repeat(3) + step, cache)
    mark(f"{turn}repeat")
    engine.repeat(logits, cache, 2)
    mark("after")
"""


@pytest.mark.parametrize("kind", ON_CUDA, ids=" ".join)
@pytest.mark.parametrize("capture", ["0", "1"])
def test_a_search_stays_on_the_device(bundles, kind, capture):
    """Of a step only the likeliest tokens come to the host; caches go from one place on the device to another."""
    _, log = cuda_stub.run(BEGIN + SEARCH, bundles("shipped", *kind), capture)
    layers = checkpoint.load_config(checkpoint.SHIPPED).text.depth
    assert log.violations == []
    for step in range(4):
        rows = 3 if step else 1
        assert log[f"rank {step}"].copied("D2H") == rows * (8 * 3 + 4 * 3 + 4)  # ids, log-probabilities, the end's
        assert log[f"spread {step}"].copied("D2H") == 4 * rows
        reorder = log[f"reorder {step}"]
        assert reorder.copied("D2H") == 0
        assert reorder.copied("H2D") == 8 * 3  # which rows
        assert len(reorder.kernels) == 2 * layers
        assert log[f"decode {step}"].copied("D2H") == 0
        if capture == "1":  # each of the two caches that the search goes between has a graph of its own
            assert len(log[f"decode {step}"].replays) == 1
    assert log["repeat"].copied("D2H") == 0
    if capture == "1":
        first, second, third, fourth = (log[f"decode {step}"].replays[0].graph for step in range(4))
        assert first == third != second == fourth


# --- a service ---------------------------------------------------------------------------------------------

SERVICE = """
from export.service.slots import Slots
from numpy_ref.answer import Picture
engine = open_bundle(sys.argv[1], enable_cuda_graph=sys.argv[2])
config, size = engine.config, engine.config.vision.image_size
slots, known = Slots(engine, 4, 80), np.ones(config.text.vocab, bool)
prompt = [config.image_token] * config.vision.patches + [config.bos, 5]
pictures = [Picture(np.zeros((1, 3, size, size), np.float32), size, size) for _ in range(3)]
for each in pictures:
    slots.encode(each)
slots.prefill(0, pictures[:1], [prompt])
for turn in ("first ", "", "again "):  # graphs are captured in the first
    for rows in (1, 2, 3):
        mark(f"{turn}prefill {rows}")
        slots.prefill(rows - 1, pictures[rows - 1 : rows], [prompt])
        mark(f"{turn}decode {rows}")
        logits = slots.decode(np.full(rows, 7), np.full(rows, len(prompt)))
        mark(f"{turn}draw {rows}")
        slots.draw(logits, known, [Sampling()] * rows, np.full(rows, 0.5, np.float32), [None] * rows, np.zeros(rows))
    mark(f"{turn}copy")
    slots.copy(2, 0, len(prompt) + 1)
    mark("after")
"""


@pytest.mark.parametrize("kind", ON_CUDA, ids=" ".join)
@pytest.mark.parametrize("capture", ["0", "1"])
def test_a_service_stays_on_the_device(bundles, kind, capture):
    """Rows come and go without their keys and values; a captured step has as many rows as the next power of two."""
    _, log = cuda_stub.run(BEGIN + SERVICE, bundles("shipped", *kind), capture)
    layers = checkpoint.load_config(checkpoint.SHIPPED).text.depth
    assert log.violations == []
    for turn in ("", "again "):
        for rows in (1, 2, 3):
            size = {1: 1, 2: 2, 3: 4}[rows] if capture == "1" else rows
            decode, draw = log[f"{turn}decode {rows}"], log[f"{turn}draw {rows}"]
            assert log[f"{turn}prefill {rows}"].copied("D2H") == decode.copied("D2H") == 0
            assert decode.copied("H2D") == 12 * size  # tokens and lengths
            assert draw.copied("D2H") == (8 + 4) * size
            assert len(draw.waits) == 1
            assert decode.captures == []
            assert len(decode.replays) == (capture == "1")
        moved = log[f"{turn}copy"]
        assert len(moved.copies("D2D")) == 2 * layers
        assert moved.copied("D2H") == moved.copied("H2D") == 0
    if capture == "1":
        graphs = [[log[f"{turn}decode {rows}"].replays[0].graph for rows in (1, 2, 3)] for turn in ("", "again ")]
        assert graphs[0] == graphs[1]
        assert len(set(graphs[0])) == 3
