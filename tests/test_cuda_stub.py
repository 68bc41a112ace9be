"""The stub of the CUDA libraries: what it forbids, models and logs, under ONNX Runtime's own CUDA provider."""

import signal

import pytest

from export import bundle
from numpy_ref import checkpoint

from . import cuda_stub
from .cuda_stub.log import Fill, Kernel, Log

OUT_OF_MEMORY, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 2, 900, 901
INVALID_HANDLE, ILLEGAL_ADDRESS, CAPTURE_ISOLATION, CAPTURE_IMPLICIT, CAPTURED_EVENT = 400, 700, 905, 906, 907
FLOAT16 = 2  # of cudaDataType_t

BEGIN = """
import ctypes
import numpy as np
import onnxruntime
from tests.cuda_stub.inside import *

def model(**options):  # x [2, 8] -> x @ w + b in float16, on CUDA
    from onnx import TensorProto, helper, numpy_helper
    weight, bias = np.ones((8, 4), np.float16), np.ones(4, np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    return session

class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]

def memory(size):
    made = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(made), ctypes.c_size_t(size))
    return made

def stream(blocking=True):
    made = ctypes.c_void_p()
    call("cudaStreamCreateWithFlags", ctypes.byref(made), 0 if blocking else 1)
    return made

def error(function, *arguments):
    try:
        call(function, *arguments)
    except OSError as found:
        return found.errno
    return 0
"""


@pytest.fixture(scope="module", autouse=True)
def _stub():
    cuda_stub.require()


def run(script, *arguments, **options):
    return cuda_stub.run(BEGIN + script, *arguments, **options)


def test_it_builds_once():
    folder = cuda_stub.build()
    assert (folder / "libcudart.so.13").is_file()
    before = folder.stat().st_mtime_ns
    assert cuda_stub.build() == folder
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_where_it_cannot_be_built(monkeypatch, required, outcome):
    """Tests are skipped, or fail where the stub is required."""
    monkeypatch.setattr(cuda_stub.shutil, "which", lambda name: None)
    monkeypatch.setenv("REQUIRE_CUDA_STUB", required)
    with pytest.raises(outcome, match="needs g"):
        cuda_stub.require()


@pytest.mark.parametrize("access", ["ctypes.string_at(place, 1)", "ctypes.memset(place, 1, 1)"])
def test_the_host_cannot_touch_device_memory(access):
    with pytest.raises(cuda_stub.ScriptFailed) as failed:
        run(f"place = memory(4096).value; mark('touch'); {access}")
    assert failed.value.status == -signal.SIGSEGV
    assert failed.value.log.allocations[0].bytes == 4096


def test_what_a_script_prints_on_failure_is_shown():
    with pytest.raises(cuda_stub.ScriptFailed, match="ValueError: here"):
        run("raise ValueError('here')")


def test_copies_keep_the_values():
    """Up, from one buffer to another, and down."""
    printed, log = run("""
values = np.arange(6, dtype=np.float32)
mark("up")
up = onnxruntime.OrtValue.ortvalue_from_numpy(values, "cuda", 0)
mark("across")
other = memory(24)
call("cudaMemcpy", other, ctypes.c_void_p(up.data_ptr()), ctypes.c_size_t(24), 3)
call("cudaMemset", ctypes.c_void_p(up.data_ptr()), 0, ctypes.c_size_t(24))
assert not up.numpy().any()
call("cudaMemcpy", ctypes.c_void_p(up.data_ptr()), other, ctypes.c_size_t(24), 3)
mark("down")
print(up.numpy().tolist())
""")
    assert printed.strip() == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"
    (up,) = log["up"].copies()
    assert (up.direction, up.bytes, up.pageable, up.source, up.target) == ("H2D", 24, True, -1, 0)
    assert [copy.waits for copy in log["across"].copies("D2D")] == [False, False]
    assert log["down"].copied("D2H") == log["down"].copied() == 24
    assert log["down"].waits
    assert not log.violations


def test_pinned_memory_and_scalars():
    printed, log = run("""
pinned, place, queue = ctypes.c_void_p(), memory(64), stream()
call("cudaMallocHost", ctypes.byref(pinned), ctypes.c_size_t(64))
pageable = ctypes.create_string_buffer(64)
for host in (pinned, pageable):
    mark("up")
    call("cudaMemcpyAsync", place, host, ctypes.c_size_t(64), 1, queue)
    mark("down")
    call("cudaMemcpyAsync", host, place, ctypes.c_size_t(64), 2, queue)
deliver(int32=7, int64=9)
for kind in (ctypes.c_int32, ctypes.c_int64):
    value = kind()
    call("cudaMemcpy", ctypes.byref(value), place, ctypes.c_size_t(ctypes.sizeof(kind)), 2)
    print(value.value)
""")
    assert printed.split() == ["7", "9"]
    assert [copy.pageable for copy in log["up"].copies()] == [False, True]
    assert not any(copy.waits for copy in log["up"].copies())  # from pageable memory it is staged
    assert [copy.waits for copy in log["down"].copies()[:2]] == [False, True]
    assert [pin.bytes for pin in log.pinned] == [64]


def test_calls_that_are_wrong_fail():
    """Each with CUDA's error, and told in the log."""
    printed, log = run("""
place = memory(64)
host = ctypes.create_string_buffer(128)
print(error("cudaMemcpy", place, host, ctypes.c_size_t(64), 2))  # not device to host
print(error("cudaMemcpy", place, host, ctypes.c_size_t(65), 1))
print(error("cudaFree", ctypes.c_void_p(place.value + 1)))
print(error("cudaMemsetAsync", place, 0, ctypes.c_size_t(64), ctypes.c_void_p(4096)))
print(error("cudaMalloc", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1000)))
print(error("cudaGetLastError"), error("cudaGetLastError"))
""", memory=1000)  # fmt: skip
    assert printed.split() == ["1", "1", "1", str(INVALID_HANDLE), str(OUT_OF_MEMORY), str(OUT_OF_MEMORY), "0"]
    assert [broken.error for broken in log.violations] == [1, 1, 1, INVALID_HANDLE, OUT_OF_MEMORY]
    assert log.peak() == 64


def test_a_model_in_its_phases():
    _, log = run("""
session = model()
binding = session.io_binding()
binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((2, 8), np.float16), "cuda", 0))
binding.bind_output("y", "cuda")
mark("run")
session.run_with_iobinding(binding)
mark("down")
binding.copy_outputs_to_cpu()
""")
    assert not log[""].products
    assert log[""].copied("H2D") >= 2 * (8 * 4 + 4 + 2 * 8)  # weights and x
    (product,) = log["run"].products
    assert {product.m, product.n, product.k, product.type} == {2, 4, 8, FLOAT16}
    (kernel,) = log["run"].of(Kernel)
    assert "Bias" in kernel.short  # MatMul and Add are one Gemm to the provider
    assert "__half" in kernel.name
    assert log["run"].kernels == [kernel.short]
    assert kernel.grid == (1, 1, 1)
    assert not log["run"].copies()
    assert log["run"].launches == 2
    assert log["down"].copied("D2H") == log["down"].copied() == 2 * 2 * 4
    assert log.devices == {0}
    assert not log.violations
    assert log["run"].peak() >= log.allocations[0].bytes


def test_capture_and_replay():
    """The provider's first run warms up, captures and launches; from then on there is nothing but the graph."""
    _, log = run("""
session = model(enable_cuda_graph="1")
binding = session.io_binding()
x = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((2, 8), np.float16), "cuda", 0)
y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2, 4], np.float16, "cuda", 0)
binding.bind_ortvalue_input("x", x)
binding.bind_ortvalue_output("y", y)
mark("first")
session.run_with_iobinding(binding)
mark("later")
for _ in range(3):
    session.run_with_iobinding(binding)
""")
    assert [capture.state for capture in log["first"].captures] == ["begin", "end"]
    assert len(log["first"].captured) == 2
    assert len(log["later"].replays) == log["later"].launches == 3
    for replay in log["later"].replays:
        assert (replay.kernel, replay.product, replay.copy) == (1, 1, 0)
    assert not log["later"].kernels
    assert not log["later"].products
    assert not log.violations


def test_a_graph_copies_when_it_is_launched():
    printed, log = run("""
queue, place, source = stream(), memory(4), (ctypes.c_int32 * 1)(5)
graph, ready, found = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int32()
def read():
    call("cudaMemcpy", ctypes.byref(found), place, ctypes.c_size_t(4), 2)
    return found.value
call("cudaStreamBeginCapture", queue, 0)
call("cudaMemcpyAsync", place, source, ctypes.c_size_t(4), 1, queue)
call("cudaStreamEndCapture", queue, ctypes.byref(graph))
call("cudaGraphInstantiate", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
print(read())
source[0] = 6
call("cudaGraphLaunch", ready, queue)
print(read())
""")
    assert printed.split() == ["0", "6"]
    assert [replay.copy for replay in log.replays] == [1]


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("'cudaMalloc', ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)", CAPTURE_UNSUPPORTED),
        ("'cudaFree', place", CAPTURE_UNSUPPORTED),
        ("'cudaMallocHost', ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)", CAPTURE_UNSUPPORTED),
        ("'cudaMemcpy', place, bytes(8), ctypes.c_size_t(8), 1", CAPTURE_UNSUPPORTED),
        ("'cudaDeviceSynchronize'", CAPTURE_UNSUPPORTED),
        ("'cudaStreamSynchronize', queue", CAPTURE_UNSUPPORTED),
        ("'cudaMemsetAsync', place, 0, ctypes.c_size_t(8), None", CAPTURE_IMPLICIT),
    ],
)
def test_what_a_capture_forbids(wrong, found):
    """It is an error, and the end of the capture too."""
    printed, log = run(f"""
queue, place, graph = stream(), memory(8), ctypes.c_void_p()
call("cudaStreamBeginCapture", queue, 0)
print(error({wrong}))
print(error("cudaMemsetAsync", place, 0, ctypes.c_size_t(8), queue))
print(error("cudaStreamEndCapture", queue, ctypes.byref(graph)), graph.value)
print(error("cudaDeviceSynchronize"))
""")
    assert printed.split() == [str(found), str(CAPTURE_INVALIDATED), str(CAPTURE_INVALIDATED), "None", "0"]
    assert [broken.error for broken in log.violations] == [found]
    assert [capture.state for capture in log.captures] == ["begin", "invalid"]


def test_a_capture_spreads_by_events():
    """To the stream that waits for it, but not from what was recorded before."""
    printed, log = run("""
first, second, place = stream(), stream(), memory(8)
before, within, graph = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
for event in (before, within):
    call("cudaEventCreate", ctypes.byref(event))
call("cudaEventRecord", before, second)
call("cudaStreamBeginCapture", first, 0)
call("cudaEventRecord", within, first)
call("cudaStreamWaitEvent", second, within, 0)
call("cudaMemsetAsync", place, 0, ctypes.c_size_t(8), second)
print(error("cudaEventSynchronize", within))
print(error("cudaStreamWaitEvent", first, before, 0))
""")
    assert printed.split() == [str(CAPTURED_EVENT), str(CAPTURE_ISOLATION)]
    assert [(fill.stream, fill.captured) for fill in log.of(Fill)] == [(2, True)]


PRODUCT = """
library, handle = ctypes.CDLL("libcublas.so.13"), ctypes.c_void_p()
library.cublasCreate_v2(ctypes.byref(handle))

def product(a, b, c, queue=None):
    library.cublasSetStream_v2(handle, queue)
    number = ctypes.c_float(1)
    one = ctypes.byref(number)
    return library.cublasSgemm_v2(handle, 0, 0, 2, 3, 4, one, a, 2, b, 4, one, c, 2)
"""


def test_a_product_reaches_its_operands():
    """They are memory of its device; the host's and another device's are not."""
    printed, log = run(
        PRODUCT
        + """
place, host = memory(64), ctypes.create_string_buffer(64)
use_device(1)
other = memory(64)
print(product(other, other, other), product(other, host, other), product(place, other, other))
""",
        devices=2,
    )
    assert printed.split() == ["0", "13", "13"]
    assert [(product.m, product.n, product.k, product.device) for product in log.products] == [(2, 3, 4, 1)]
    assert [broken.rule for broken in log.violations] == ["no memory of a device", "memory of another device"]
    assert {broken.error for broken in log.violations} == {ILLEGAL_ADDRESS}


def test_a_replay_of_what_was_freed():
    _, log = run(
        PRODUCT
        + """
place, queue, graph, ready = memory(64), stream(), ctypes.c_void_p(), ctypes.c_void_p()
call("cudaStreamBeginCapture", queue, 0)
assert product(place, place, place, queue) == 0
call("cudaStreamEndCapture", queue, ctypes.byref(graph))
call("cudaGraphInstantiate", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
mark("right")
call("cudaGraphLaunch", ready, queue)
call("cudaFree", place)
mark("wrong")
call("cudaGraphLaunch", ready, queue)
"""
    )
    assert not log["right"].violations
    assert [broken.call for broken in log["wrong"].violations] == ["cublasSgemm"]


def test_two_devices():
    """Memory, streams and current device are each its own; the session is on the one that was asked for."""
    printed, log = run(
        """
from concurrent.futures import ThreadPoolExecutor
print(device_count())
queue, here = stream(), ctypes.c_int()
use_device(1)
with ThreadPoolExecutor(1) as pool:  # a new thread begins on the first
    pool.submit(call, "cudaGetDevice", ctypes.byref(here)).result()
print(here.value)
mark("open")
session = model(device_id="1")
mark("run")
session.run(None, {"x": np.ones((2, 8), np.float16)})
print(in_use(0), in_use(1) > 0)
mark("wrong")
print(error("cudaLaunchKernel", None, Dim3(1, 1, 1), Dim3(1, 1, 1), None, ctypes.c_size_t(0), queue))
""",
        devices=2,
    )
    assert printed.split() == ["2", "0", "0", "True", str(INVALID_HANDLE)]
    assert log["open"].devices == log["run"].devices == {1}
    assert {device for device, _ in log["run"].streams} == {1}
    assert log.peak(0) == 0
    assert log.peak(1) > 0
    assert "another device" in log["wrong"].violations[0].rule


def test_no_device():
    """As where a driver is installed, but nothing answers."""
    printed, _ = run(
        "from export.session import choose_provider; print(device_count(), choose_provider('auto'))", devices=0
    )
    assert printed.split() == ["0", "CPUExecutionProvider"]


def test_phases_of_a_log(tmp_path):
    """One that comes twice is one; what was in use before it counts for its peak."""
    (tmp_path / "log").write_text(
        "malloc\tcall=cudaMalloc\tbytes=8\tdevice=0\tin_use=8\n"
        "mark\tname=a\nfree\tcall=cudaFree\tbytes=8\tdevice=0\tin_use=0\nmark\tname=b\nmark\tname=a\n"
        "malloc\tcall=cudaMalloc\tbytes=2\tdevice=0\tin_use=2\n"
    )
    log = Log.read(tmp_path / "log")
    assert log.phases == ("", "a", "b")
    assert [event.bytes for _, event in log["a"].events] == [8, 2]
    assert [log[phase].peak() for phase in log.phases] == [8, 8, 0]
    assert log["b"].events == ()
    with pytest.raises(KeyError, match="no such phase"):
        log["c"]
    (tmp_path / "log").write_text("malloc\tbytes=8\n")
    with pytest.raises(ValueError, match="not a line"):
        Log.read(tmp_path / "log")


def test_a_kernel_by_its_own_name():
    name = "void onnxruntime::cuda::(anonymous namespace)::copy<float, f<int>(bool)>(float const*, std::pair<int, int>)"
    assert Kernel(0, 0, False, name, (1, 1, 1), (1, 1, 1)).short == "copy"


def test_the_shipped_model_decodes(tmp_path):
    """A portable bundle in float16: after the prompt, only ids and lengths go to the device, and a token comes back."""
    bundle.write(checkpoint.load(), tmp_path / "out", "float16")
    _, log = run(
        """
import sys
from export import bundle, session
from export.session.device import DeviceSession
from numpy_ref.model.sampling import Sampling
opened = DeviceSession(bundle.load(sys.argv[1]), "cuda")
assert opened.provider == session.CUDA
config = opened.config
ids = np.array([[config.image_token] * config.vision.patches + [config.bos, 5, 6]])
pixels, lengths = np.zeros((1, 3, config.vision.image_size, config.vision.image_size)), np.array([ids.shape[1]])
mark("prefill")
logits, cache = opened.prefill(pixels, ids, lengths, 80)
mark("decode")
for step in range(2):
    logits, cache = opened.decode(ids[:, -1:], lengths + step, cache)
mark("sample")
deliver(int64=1)  # how many tokens TopK is to keep
assert [drawn.shape for drawn in opened.draw(logits, None, Sampling(), np.array([0.5]))] == [(1,), (1,)]
""",
        str(tmp_path / "out"),
    )
    assert log["prefill"].products
    assert len(log["decode"].products) > 2
    assert len(log["decode"].kernels) > 2
    assert len(log["decode"].copies("H2D")) == 2 * 2  # ids and lengths
    assert not log["decode"].copies("D2H")
    assert log["sample"].copies("D2H")
    assert log.devices == {0}
    assert not log.violations
