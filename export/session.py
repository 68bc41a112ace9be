"""Running a bundle with ONNX Runtime: the engine whose cache never leaves the device.

The cache is a set of buffers on the device. Prefill writes them; every decode step is given the same buffer
as past and as present, so the runtime updates it in place. The same code drives CUDA and the CPU.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache, cached_property, partial
from threading import Lock

import numpy as np
import onnxruntime

from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import check_room
from numpy_ref.image import to_rgb
from numpy_ref.segmentation import CELLS, SIDE
from numpy_ref.tokenizer import Tokenizer

from . import bundle as bundles
from . import cuda
from .bundle import Bundle
from .memory import freed_memory_kept
from .weights import FLOATS, stream_dtype

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_INSTALL = "it needs a driver for CUDA 13 and pip install 'onnxruntime-gpu[cuda,cudnn]'"
ON_DEVICE = ("prefill", "decode", "sample_device")  # the other graphs are small, and made for the host
#: Products of float32 in float32: the provider's own default rounds their factors to TF32, which is off by 1e-3.
DEFAULTS = {"use_tf32": "0"}
CUDNN = ("libcudnn.so.9", "cudnn64_9.dll")
# Below this the runtime may repack the weights for speed, which takes a private copy a session (twice the speed in
# float32 prefill, little in decode). From here on both sessions map the one file, unless it has the repacked weights
# too (prepack.py). Quantized weights are always repacked: their quick kernels read no other order.
MAPPED_FROM = 2 * 2**30
_FATAL_ONLY = 4  # the runtime's own messages; what goes wrong is raised, and told in one line


_stdout_lock = Lock()


@contextmanager
def _stdout_kept():
    """The runtime prints what it misses, and our output may have to be JSON alone. One thread at a time.

    Two that redirect the one stdout and put it back in turns would leave it redirected.
    """
    with _stdout_lock, redirect_stdout(sys.stderr):
        yield


def load(path=None, provider: str = "auto", threads: int = 0, host_graphs: bool = False, provider_options=None):
    """A bundle, or the shipped model's, as engine and tokenizer.

    On CUDA it is a DeviceSession; `host_graphs` makes it a HostSession.
    """
    bundle = bundles.load_but_weights(path) if path else shipped(provider, provider_options)
    tokenizer = Tokenizer.load(bundle.path, bundle.config)
    return open_session(bundle, provider, threads, HostSession if host_graphs else None, provider_options), tokenizer


def shipped(provider: str = "auto", provider_options=None) -> Bundle:
    """The shipped model's bundle, as the provider runs it."""
    return bundles.shipped(for_cuda=choose_provider(provider, provider_options, quietly=True) == CUDA)


def open_session(bundle: Bundle, provider: str = "auto", threads: int = 0, kind=None, provider_options=None):
    """A session, with the weights checked while the runtime opens the graphs: either takes seconds."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(bundles.check_weights_once, bundle)
        try:
            return engine(bundle, provider, threads, kind, provider_options)
        finally:
            checked.result()  # raises what is wrong with the file, which says more than the runtime did


def engine(bundle: Bundle, provider: str = "auto", threads: int = 0, kind=None, provider_options=None):
    """A session of the kind that suits the provider, if none is asked for, of a bundle whose weights were checked."""
    if place(bundle, provider, provider_options) == CPU:
        return (kind or Session)(bundle, "cpu", threads, provider_options)
    from .device import DeviceSession

    return (kind or DeviceSession)(bundle, "cuda", threads, provider_options)


def place(bundle: Bundle, provider: str, provider_options=None) -> str:
    """The name of the provider that runs a bundle.

    What cannot run wholly on the device is not run there, since it would leave it at every token: "auto" takes the CPU
    and says why in one line. Raises PaliGemmaError if "cuda" is asked for.
    """
    chosen = choose_provider(provider, provider_options)
    if chosen == CUDA and bundle.only_for_cpu:
        if provider == "cuda":
            raise PaliGemmaError(f"{bundle.path}: --provider cuda: {bundle.only_for_cpu}")
        print(f"running on the CPU: {bundle.path}: {bundle.only_for_cpu}", file=sys.stderr)
        return CPU
    return chosen


class Session:
    """A bundle's graphs as an engine of `numpy_ref.generate`.

    Threads may share one: each generation has a cache, and buffers, of its own.
    """

    name = "onnx"
    picture = "pixel_values"  # what prefill's graph calls it

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int = 0, provider_options=None):
        self.bundle, self.config, self.max_length = bundle, bundle.config, bundle.max_length
        self.resize = bundle.description["image"]["resize"]
        self.provider_options = dict(provider_options or {})
        self.provider = place(bundle, provider, self.provider_options)
        self.device, self.device_id = "cuda" if self.provider == CUDA else "cpu", 0
        if self.provider == CUDA:
            prefer_cudnn()
            self.device_id = chosen_device(self.provider_options)
            self.provider_options = DEFAULTS | self.provider_options
        elif self.provider_options:
            raise PaliGemmaError(f"--provider-option {next(iter(self.provider_options))}: options are for CUDA")
        if bundle.description["precision"] == "bfloat16" and self.provider == CPU:
            raise PaliGemmaError(f"{bundle.path}: a bfloat16 bundle needs CUDA; export float32 for the CPU")
        kept = freed_memory_kept() if bundle.is_prepacked else nullcontext()
        with _stdout_kept(), kept, ThreadPoolExecutor(2) as pool:  # repacking weights takes one core each
            self._prepare()
            self._prefill, self._decode = pool.map(partial(self._open, threads=threads), ("prefill", "decode"))
        if self.provider == CUDA:
            self._check_placement()
        self.masks = self._paint if "masks" in bundle.description["graphs"] else None

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        """pixel_values [B, 3, S, S], input_ids [B, T], lengths [B] -> logits [B, V] and a cache of C slots."""
        check_room(input_ids.shape[1], capacity)
        cache = self._cache(len(lengths), capacity)
        binding = self._prefill.io_binding()
        feeds = {
            self.picture: np.ascontiguousarray(pixel_values, np.float32),
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "lengths": np.ascontiguousarray(lengths, np.int32),
            "capacity": np.array(cache.capacity, np.int64),
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", cache.logits)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        with self._told("prefill"):
            self._prefill.run_with_iobinding(binding)
        return self._logits(cache), cache

    def decode(self, input_ids, lengths, cache):
        """input_ids [B, 1] at position lengths [B] -> logits [B, V]; the cache is updated in place."""
        check_room(lengths.max() + 1, cache.capacity)
        self._put(np.ascontiguousarray(input_ids, np.int64), cache.input_ids)
        self._put(np.ascontiguousarray(lengths, np.int32), cache.lengths)
        with self._told("decode"):
            self._decode.run_with_iobinding(cache.binding, self._run_options(cache))
        return self._logits(cache), cache

    def _put(self, array, value):
        """Copy an array into a value on the device."""
        value.update_inplace(array)

    def _logits(self, cache):
        return cache.logits.numpy().copy()  # on the CPU .numpy() is a view of the buffer

    def _cache(self, batch, capacity):
        return Cache(self, batch, capacity)

    def _run_options(self, cache):
        return None

    @cached_property  # here as below, two threads that come first together both open it, and either's does
    def _masks(self):
        return self._open("masks", 1)  # when a mask is first asked for

    def _paint(self, codes):
        """Mask codes [B, 16] -> [B, 64, 64], positive inside."""
        return self._run("masks", self._masks, {"codes": np.ascontiguousarray(codes, np.int64)})

    def _prepare(self):
        """What comes before the graphs are opened."""

    def _open(self, name, threads):
        options = self._options_of(name)
        options.intra_op_num_threads = threads
        on_device = self.provider == CUDA and name in ON_DEVICE
        providers = [(CUDA, self._provider_options_of(name)), CPU] if on_device else [CPU]
        with self._told(name):
            opened = onnxruntime.InferenceSession(self._file(name), options, providers=providers)
        found = {value.name: value.shape for value in (*opened.get_inputs(), *opened.get_outputs())}
        for value, shape in self._io(name).items():
            if not _fits(found.get(value), shape):
                raise PaliGemmaError(
                    f"{self._file(name)}: {value} is {found.get(value, 'missing')}, not {list(shape)} as "
                    f"{bundles.DESCRIPTION} has it; export the bundle again"
                )
        return opened

    def _check_placement(self):
        """Raise PaliGemmaError unless what decode reads and writes at every step is on the device.

        The runtime leaves a node without a kernel there to the CPU, and copies what is bound to it once, when it is
        bound: from then on such a session computes with what was there then.
        """
        for opened, graph in ((self._prefill, "prefill"), (self._decode, "decode")):
            if CUDA not in opened.get_providers():
                raise PaliGemmaError(f"--provider cuda: its libraries do not load; {_INSTALL}")
            infos = [*opened.get_output_memory_infos(), *(opened.get_input_memory_infos() if graph == "decode" else ())]
            if any(info.name != "Cuda" for info in infos):
                raise PaliGemmaError(
                    f"{self._file(graph)}: CUDA has no kernels for all of it; run it with --provider cpu, or export "
                    "the bundle again"
                )

    def _io(self, name):
        return graph_io(name, self.config)

    def _run(self, name, opened, feeds):
        """The one output of a graph."""
        with self._told(name):
            return opened.run(None, feeds)[0]

    def _file(self, name):
        return self.bundle.path / self.bundle.description["graphs"][name]["file"]

    @contextmanager
    def _told(self, name):
        """Turn what ONNX Runtime raises, which has no common class, into a line that names the graph."""
        try:
            yield
        except Exception as error:
            raise PaliGemmaError(f"{self._file(name)}: ONNX Runtime cannot load or run it ({error})") from None

    def _options_of(self, name):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        floats = self.bundle.description["precision"] in FLOATS
        if floats and self.bundle.weight_bytes > MAPPED_FROM and not self.bundle.is_prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if name == "prefill":  # its threads would spin on for a while, where decode's begin
            options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _provider_options_of(self, name):
        return self.provider_options


class HostSession(Session):
    """A bundle run as hosts in other languages run it: its graphs also prepare the picture and draw the tokens."""

    def preprocess(self, image):
        """A Pillow image of any size -> pixel values [1, 3, S, S]."""
        return self._run("preprocess", self._preprocess, {"image": np.asarray(to_rgb(image))})

    def sample(self, logits, known, temperature=0.0, top_k=0, top_p=1.0, uniform=None):
        """Draw a token a row, as `numpy_ref.sampling.sample` does; which ids are `known` is in the graph."""
        feeds = {
            "logits": logits, "temperature": np.array(temperature, np.float32), "top_k": np.array(top_k, np.int64),
            "top_p": np.array(top_p, np.float32), "uniform": uniform,
        }  # fmt: skip
        return self._run("sample", self._sample, feeds)

    @cached_property
    def _preprocess(self):
        return self._open("preprocess", 1)

    @cached_property
    def _sample(self):
        return self._open("sample", 1)


class Cache:
    """The key and value buffers of one generation, bound to the decode graph as past and as present."""

    def __init__(self, session: Session, batch: int, capacity: int):
        text = session.config.text
        self.batch, self.capacity = batch, capacity

        def buffer(shape, dtype):
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, session.device, session.device_id)

        shape = [batch, text.kv_heads, capacity, text.head_dim]
        dtype = stream_dtype(session.bundle.description["precision"])
        self.buffers = {
            f"{i}.{kind}": buffer(shape, int(dtype)) for i in range(text.depth) for kind in ("key", "value")
        }
        self.input_ids, self.lengths = buffer([batch, 1], np.int64), buffer([batch], np.int32)
        self.logits = buffer([batch, text.vocab], np.float32)
        self.binding = session._decode.io_binding()
        self.binding.bind_ortvalue_input("input_ids", self.input_ids)
        self.binding.bind_ortvalue_input("lengths", self.lengths)
        self.binding.bind_ortvalue_output("logits", self.logits)
        for name, value in self.buffers.items():
            self.binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self.binding.bind_ortvalue_output(f"present.{name}", value)

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of the buffers by name, `{layer}.key` and `{layer}.value`, each [B, K, C, H]."""
        return {name: cuda.on_host(value) for name, value in self.buffers.items()}


def graph_io(name: str, config) -> dict[str, tuple]:
    """The inputs and outputs of a graph of a bundle -> their shapes; None for a size that is the caller's.

    A graph that has others is refused before anything is made in the sizes that bundle.json claims.
    """
    text, size = config.text, config.vision.image_size
    layers, cache = range(text.depth), (None, text.kv_heads, None, text.head_dim)
    present = {f"present.{i}.{kind}": cache for i in layers for kind in ("key", "value")}
    past = {f"past_key_values.{i}.{kind}": cache for i in layers for kind in ("key", "value")}
    pixel_values, logits = {"pixel_values": (None, 3, size, size)}, {"logits": (None, text.vocab)}
    ids, lengths = {"input_ids": (None, None)}, {"lengths": (None,)}
    drawing = {**logits, "temperature": (), "top_p": (), "uniform": (None,), "token": (None,)}
    return {
        "prefill": {**pixel_values, **ids, **lengths, "capacity": (), **logits, **present},
        "decode": {**ids, **lengths, **past, **logits, **present},
        "preprocess": {"image": (None, None, 3), "pixel_values": (1, 3, size, size)},
        "sample": {**drawing, "top_k": ()},
        "sample_device": {**drawing, "count": (1,)},
        "masks": {"codes": (None, CELLS * CELLS), "masks": (None, SIDE, SIDE)},
    }[name]


def _fits(found, shape) -> bool:
    """Whether a graph's shape, in which names stand for free sizes, is the one that is wanted."""
    return (
        found is not None
        and len(found) == len(shape)
        and all(size is None or have == size for have, size in zip(found, shape, strict=True))
    )


def choose_provider(wanted: str, provider_options=None, quietly: bool = False) -> str:
    """ "auto", "cpu" or "cuda" -> the provider's name.

    Auto takes CUDA only where a device answers: the GPU build of the runtime lists CUDA on every machine. Where one
    does but CUDA's libraries do not load, it takes the CPU and says so in one line, unless `quietly`.
    Raises PaliGemmaError if CUDA is asked for and cannot be had: there is no silent fallback.
    """
    if wanted == "cpu":
        return CPU
    has_device = False
    if CUDA not in onnxruntime.get_available_providers():
        missing = "this onnxruntime is built without it"
    elif not cuda.device_count():
        missing = "no NVIDIA device answers"
    elif reason := _cuda_trouble(chosen_device(provider_options or {})):
        missing, has_device = f"its libraries do not load ({reason})", True
    else:
        return CUDA
    if wanted == "cuda":
        raise PaliGemmaError(f"--provider cuda: {missing}; {_INSTALL}")
    if has_device and not quietly:
        print(f"running on the CPU: there is an NVIDIA device, but {missing}; {_INSTALL}", file=sys.stderr)
    return CPU


@cache
def _cuda_trouble(device_id: int) -> str:
    """Why the runtime's CUDA provider does not load, in one line; empty if it does. It takes a byte of the device."""
    with _stdout_kept():
        onnxruntime.preload_dlls()
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", device_id)
    except Exception as error:  # the runtime's exceptions have no common class
        return " ".join(str(error).split())
    return ""


def prefer_cudnn() -> None:
    """Have decode's attention done by cuDNN where it is installed, not by the runtime's XQA kernels.

    One block of threads goes through all of a row's keys there: at 970 positions a 3B step took 2.72 ms with XQA and
    2.60 with cuDNN, at 270 the same (H100, captured, float16).
    """
    if cuda.library(CUDNN) is not None:
        os.environ.setdefault("ORT_ENABLE_XQA", "0")


def chosen_device(provider_options) -> int:
    """The number of the device that `device_id` asks for; PaliGemmaError if there is none."""
    wanted, count = provider_options.get("device_id", "0"), cuda.device_count()
    if not wanted.isdecimal() or int(wanted) >= count:
        raise PaliGemmaError(f"--provider-option device_id={wanted}: the devices of this machine are 0 to {count - 1}")
    return int(wanted)
