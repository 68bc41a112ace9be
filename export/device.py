"""Running a bundle where nothing large leaves the device: weights uploaded once, logits and sampling there.

Of a step only the token of each row comes back, and that is the one wait for the device. What is special to CUDA (a
stream that the graphs share, decode as a captured graph) comes in by the provider's options; all else is the same on
the CPU provider, where it is tested.
"""

import ctypes
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import ExternalDataInfo

from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import check_room

from .session import CUDA, Cache, Session
from .weights import FILE

SHARED_FROM = 2**20  # bytes; smaller weights are not worth a place of their own
GRAPH, CAPTURED = "enable_cuda_graph", ("decode", "sample_device")


class DeviceSession(Session):
    """A session whose logits stay on the device as OrtValues, which its `sample` takes.

    With the provider option `enable_cuda_graph` decode and sampling are captured, once a batch size (sampling once for
    each number of candidates too), and then replayed. Caches then have all of the model's positions and are used again,
    so one generation at a time may run.
    """

    def __init__(self, bundle, provider="auto", threads=0, provider_options=None):
        self._shared, self._stream, self._caches, self._options = None, None, {}, {}
        self._draws = WeakKeyDictionary()  # logits -> how they are drawn from, as long as the logits are there
        super().__init__(bundle, provider, threads, provider_options)

    @property
    def captures(self) -> bool:
        """Whether decode is to be captured as a CUDA graph."""
        return self.provider_options.get(GRAPH, "0") not in ("0", "false", "False")

    def sample(self, logits, known, temperature=0.0, top_k=0, top_p=1.0, uniform=None):
        """Draw a token a row from logits on the device -> token [B]; which ids are `known` is in the graph."""
        if logits not in self._draws:
            self._draws[logits] = Draw(self, logits)
        with self._told("sample_device"):
            return self._draws[logits](temperature, top_k, top_p, uniform)

    def _put(self, array, value):
        """Copy an array into a value on the device; not waiting, but in the order of the launches."""
        if self._stream:
            self._stream.copy(array, value.data_ptr())
        else:
            value.update_inplace(array)

    def _logits(self, cache):
        return cache.logits

    def _cache(self, batch, capacity):
        if not self.captures:
            return super()._cache(batch, capacity)
        check_room(capacity, self.max_length)
        if batch not in self._caches:
            self._caches[batch] = Cache(self, batch, self.max_length)
        return self._caches[batch]

    def _run_options(self, cache):
        return self._options_for(cache.batch)

    def _options_for(self, *graph):
        """How to run what is captured, if it is, as this graph of its session: one for equal numbers."""
        if graph not in self._options:
            options = onnxruntime.RunOptions()
            if self._stream:  # what comes next is on the same stream, and waits there
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self.captures:
                options.add_run_config_entry("gpu_graph_id", str(len(self._options)))
            self._options[graph] = options
        return self._options[graph]

    def _prepare(self):
        """Before the graphs are opened: the weights' one copy, and the stream."""
        self._shared = upload(self.bundle, self.device, self.device_id)
        self._stream = Stream(self.device_id) if self.provider == CUDA else None

    def _options_of(self, name):
        options = super()._options_of(name)
        for tensor, value in self._shared.items():
            if name in ("prefill", "decode"):
                options.add_initializer(tensor, value)
        return options

    def _provider_options_of(self, name):
        options = {key: value for key, value in self.provider_options.items() if key != GRAPH or name in CAPTURED}
        return options | ({"user_compute_stream": str(self._stream.address)} if self._stream else {})

    @cached_property
    def _sample(self):
        return self._open("sample_device", 1)


class Draw:
    """The sampling graph bound to the logits of one generation.

    What does not change from one token to the next stays on the device; the token's copy to the host is the one wait.
    """

    def __init__(self, session: DeviceSession, logits):
        self.session, self.vocab = session, session.config.text.vocab
        batch = logits.shape()[0]
        self.binding, self.sent = session._sample.io_binding(), {}
        self.inputs = {
            name: _buffer(session, shape, np.float32)
            for name, shape in (("temperature", []), ("top_p", []), ("uniform", [batch]))
        }
        self.token = _buffer(session, [batch], np.int64)
        for name, value in (("logits", logits), *self.inputs.items()):
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("token", self.token)

    def __call__(self, temperature, top_k, top_p, uniform):
        """-> token [B]."""
        if temperature == 0:  # greedy: the likeliest alone
            temperature, top_k, top_p, uniform = 1.0, 1, 1.0, np.zeros(self.token.shape(), np.float32)
        for name, number in (("temperature", temperature), ("top_p", top_p), ("uniform", uniform)):
            if not np.array_equal(self.sent.get(name), number):
                self.session._put(np.asarray(number, np.float32), self.inputs[name])
                self.sent[name] = number
        count = min(top_k or self.vocab, self.vocab)
        if self.sent.get("count") != count:
            self.binding.bind_cpu_input("count", np.array([count], np.int64))
            self.sent["count"] = count
        options = self.session._options_for(self.token.shape()[0], count)
        self.session._sample.run_with_iobinding(self.binding, options)
        return self.token.numpy().copy()  # on the CPU .numpy() is a view of the buffer


def _buffer(session, shape, dtype):
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, session.device, session.device_id)


def upload(bundle, device: str, device_id: int = 0) -> dict[str, onnxruntime.OrtValue]:
    """The large weights of prefill and decode by name, each once on the device, from the mapped file."""
    data, values = np.memmap(bundle.path / FILE, np.uint8, "r"), {}
    for name in ("prefill", "decode"):
        file = bundle.path / bundle.description["graphs"][name]["file"]
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            place = ExternalDataInfo(tensor)
            if tensor.name in values or not tensor.external_data or place.length < SHARED_FROM:
                continue
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                list(tensor.dims), tensor.data_type, device, device_id
            )
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            bits = np.dtype(f"u{kind.itemsize}") if kind.kind == "V" else kind  # bfloat16 goes in as its bits
            value.update_inplace(data[place.offset : place.offset + place.length].view(bits).reshape(tensor.dims))
            # Seen through DLPack: a session takes no buffer that is an OrtValue's own.
            values[tensor.name] = onnxruntime.OrtValue.from_dlpack(value._ortvalue)
    return values


class Stream:
    """A CUDA stream on a device, as the runtime's `user_compute_stream`.

    It waits for the default stream and is waited for by it, so what the runtime copies there has its place among the
    launches here. PaliGemmaError where CUDA does not make one.
    """

    _LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")
    _HOST_TO_DEVICE = 1

    def __init__(self, device_id: int = 0):
        self._cuda, made, before = self._library(), ctypes.c_void_p(), ctypes.c_int()
        self._check(self._cuda.cudaGetDevice(ctypes.byref(before)))
        self._check(self._cuda.cudaSetDevice(device_id))
        self._check(self._cuda.cudaStreamCreate(ctypes.byref(made)))
        self._check(self._cuda.cudaSetDevice(before))
        self.address = made.value

    def copy(self, array: np.ndarray, address: int) -> None:
        """Copy an array to an address on the device; the array may change as soon as this returns."""
        self._check(
            self._cuda.cudaMemcpyAsync(
                ctypes.c_void_p(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes),
                self._HOST_TO_DEVICE, ctypes.c_void_p(self.address),
            )
        )  # fmt: skip

    def _check(self, code):
        if code:
            raise PaliGemmaError(f"CUDA's runtime library answers with error {code}")

    def _library(self):
        for name in self._LIBRARIES:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise PaliGemmaError(f"none of CUDA's runtime libraries is found: {', '.join(self._LIBRARIES)}")
