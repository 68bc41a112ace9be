"""Running a bundle where nothing large leaves the device: weights uploaded once, logits and sampling there.

Of a step only the token of each row comes back, and that is the one wait for the device. What is special to CUDA (a
stream that the graphs share, decode as a captured graph) comes in by the provider's options; all else is the same on
the CPU provider, where it is tested.
"""

import ctypes
from functools import cached_property

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import ExternalDataInfo

from numpy_ref.generate import check_room

from .session import CUDA, Cache, Session
from .weights import FILE

SHARED_FROM = 2**20  # bytes; smaller weights are not worth a place of their own
GRAPH = "enable_cuda_graph"
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")


class DeviceSession(Session):
    """A session whose logits stay on the device as OrtValues, which its `sample` takes.

    With the provider option `enable_cuda_graph` decode is captured once a batch size and then replayed. Caches then
    have all of the model's positions and are used again, so one generation at a time may run.
    """

    def __init__(self, bundle, provider="auto", threads=0, provider_options=None):
        self._shared, self._stream, self._caches = None, None, {}
        super().__init__(bundle, provider, threads, provider_options)

    @property
    def captures(self) -> bool:
        """Whether decode is to be captured as a CUDA graph."""
        return self.provider_options.get(GRAPH, "0") not in ("0", "false", "False")

    def sample(self, logits, known, temperature=0.0, top_k=0, top_p=1.0, uniform=None):
        """Draw a token a row from logits on the device -> token [B]; which ids are `known` is in the graph."""
        binding = self._sample.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        for name, number, dtype in (
            ("temperature", temperature, np.float32), ("top_k", top_k, np.int64), ("top_p", top_p, np.float32),
            ("uniform", uniform, np.float32),
        ):  # fmt: skip
            binding.bind_cpu_input(name, np.asarray(number, dtype))
        binding.bind_output("token", "cpu")
        self._sample.run_with_iobinding(binding)  # the wait
        return binding.copy_outputs_to_cpu()[0]

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
        options = onnxruntime.RunOptions()
        if self._stream:  # what comes next is on the same stream, and waits there
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(cache.batch))
        return options

    def _prepare(self):
        """Before the graphs are opened: the weights' one copy, and the stream."""
        try:
            self._shared = upload(self.bundle, self.device)
        except Exception:  # the device is there, but not CUDA's libraries: what opens the graphs tells that
            self._shared = {}
        self._stream = stream() if self.provider == CUDA else None

    def _options_of(self, name):
        options = super()._options_of(name)
        for tensor, value in self._shared.items():
            if name in ("prefill", "decode"):
                options.add_initializer(tensor, value)
        return options

    def _provider_options_of(self, name):
        options = {key: value for key, value in self.provider_options.items() if key != GRAPH or name == "decode"}
        return options | ({"user_compute_stream": str(self._stream)} if self._stream else {})

    @cached_property
    def _sample(self):
        return self._open("sample", 1)


def upload(bundle, device: str) -> dict[str, onnxruntime.OrtValue]:
    """The large weights of prefill and decode by name, each once on the device, from the mapped file."""
    data, values = np.memmap(bundle.path / FILE, np.uint8, "r"), {}
    for name in ("prefill", "decode"):
        file = bundle.path / bundle.description["graphs"][name]["file"]
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            place = ExternalDataInfo(tensor)
            if tensor.name in values or not tensor.external_data or place.length < SHARED_FROM:
                continue
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(tensor.dims), tensor.data_type, device, 0)
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            bits = np.dtype(f"u{kind.itemsize}") if kind.kind == "V" else kind  # bfloat16 goes in as its bits
            value.update_inplace(data[place.offset : place.offset + place.length].view(bits).reshape(tensor.dims))
            # Seen through DLPack: a session takes no buffer that is an OrtValue's own.
            values[tensor.name] = onnxruntime.OrtValue.from_dlpack(value._ortvalue)
    return values


def stream() -> int | None:
    """A new CUDA stream's address; None where CUDA's runtime library is not to be found."""
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        made = ctypes.c_void_p()
        if runtime.cudaStreamCreate(ctypes.byref(made)) == 0:
            return made.value
    return None
