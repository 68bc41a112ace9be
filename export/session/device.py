"""Running a bundle where nothing large leaves the device: weights uploaded once, logits and sampling there.

Of a step only each row's token and its log-probability come back, in one copy, and that is the one wait for the device.
What is special to CUDA (a stream that the graphs share, decode as a captured graph) comes in by the provider's options;
all else is the same on the CPU provider, where it is tested.
"""

import ctypes
import math
from collections.abc import Mapping
from functools import cached_property
from weakref import WeakKeyDictionary, ref

import numpy as np
import onnx
import onnxruntime
from numpy.typing import ArrayLike
from onnx.external_data_helper import ExternalDataInfo

from numpy_ref.engine import check_room
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model.sampling import Sampling

from ..bundle import WITH_WEIGHTS, Bundle
from ..bundle.weights import FILE
from ..model import graphs
from ..model.paligemma import FEATURES
from ..runtime import run_options
from . import cuda
from .engine import GRAPH, RUN, Cache, Session
from .provider import CUDA

SHARED_FROM = 2**20  # bytes; smaller weights are not worth a place of their own
CAPTURED = ("decode", "sample_device")
WITHOUT_WAIT = "disable_synchronize_execution_providers"


class DeviceSession(Session):
    """A session whose logits stay on the device as OrtValues, which its `sample` takes.

    With the provider option `enable_cuda_graph` decode and sampling are captured and then replayed: decode once for
    each size of a batch and its cache, sampling for each number of candidates too. Caches come in powers of two then
    and are used again, so one generation at a time may run.
    """

    can_capture = True

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "auto",
        threads: int = 0,
        provider_options: Mapping[str, object] | None = None,
        in_halves: bool = False,
    ):
        self._shared: dict[str, onnxruntime.OrtValue] = {}
        self._stream, self._caches, self._options = 0, {}, {}
        self._owners = WeakKeyDictionary()  # logits -> a weak reference to the cache that they came with
        self._spreads: dict[bytes, onnxruntime.InferenceSession] = {}
        self._among: tuple[np.ndarray, onnxruntime.OrtValue] | None = None
        super().__init__(bundle, provider, threads, provider_options, in_halves)

    def draw(
        self, logits: onnxruntime.OrtValue, known: np.ndarray, sampling: Sampling, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A token a row from logits on the device, and its log-probability; which ids are `known` [V] is in the graph.

        Their copy to the host is the one wait. The log-probability is None where the graph, of an older bundle, has
        none. Where each row has ids of its own, known [B, V], these go to the device, and another graph draws.
        """
        is_constrained = np.ndim(known) > 1
        draw, vocab = self._draw_of(logits, is_constrained), self.config.text.vocab
        if is_constrained:
            draw.set_allowed(known)
        if sampling.temperature == 0:  # greedy: the likeliest alone
            sampling, uniform = Sampling(temperature=1.0, top_k=1), np.zeros(draw.batch, np.float32)
        candidates = min(sampling.top_k or vocab, vocab)
        draw.set_count(candidates)
        for name, number in (
            ("temperature", sampling.temperature), ("top_p", sampling.top_p), ("uniform", uniform),
        ):  # fmt: skip
            if draw.is_new(name, number):
                self._put(np.asarray(number, np.float32), draw.inputs[name])
        with self._errors_as_line(draw.graph):
            draw.opened.run_with_iobinding(
                draw.binding, self._options_for(draw if draw.is_captured else None, candidates)
            )
            return draw.numpy()

    def log_probability(self, logits: onnxruntime.OrtValue, token: np.ndarray) -> np.ndarray:
        """The log-probability of given tokens, for which the logits come to the host: token [B] -> float32 [B]."""
        return super().log_probability(logits.numpy(), token)

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: Cache) -> tuple[onnxruntime.OrtValue, Cache]:
        """input_ids [B, T] from position lengths [B] on -> logits [B, T, V] on the device; in place.

        Raises PaliGemmaError if the bundle, an older one, has no graph for it.
        """
        if not self.extends_at_once:
            raise PaliGemmaError(
                f"{self.bundle.path}: it has no graph that reads several tokens at once, as newer bundles have; export "
                "it again"
            )
        return super().extend(input_ids, lengths, cache)

    def repeat(self, logits: onnxruntime.OrtValue, cache: Cache, copies: int) -> tuple[onnxruntime.OrtValue, Cache]:
        """Logits on the device and their cache, each row so many times in a row."""
        rows = np.arange(cache.batch).repeat(copies)
        repeated = self.reorder(cache, rows)
        binding = self._repeat.io_binding()
        binding.bind_cpu_input("rows", rows)
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_ortvalue_output("repeated", repeated.logits)
        self._repeat.run_with_iobinding(binding, self._unwaited)
        return self._logits(repeated), repeated

    def likeliest(
        self, logits: onnxruntime.OrtValue, among: np.ndarray, count: int, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As every engine's, from logits on the device; `count` and `ends` say how much comes back."""
        if self._among is None or not np.array_equal(self._among[0], among):
            placed = onnxruntime.OrtValue.ortvalue_from_numpy(among, self.device, self.device_id)
            self._among = among.copy(), placed  # what is there is not asked for
        binding = self._likeliest.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_ortvalue_input("among", self._among[1])
        binding.bind_cpu_input("count", np.array([count], np.int64))
        binding.bind_cpu_input("ends", ends)
        ids, logprobs, ended = self._to_host(self._likeliest, binding, "ids", "logprobs", "ended")
        return ids, logprobs, ended

    def location_spread(self, logits: onnxruntime.OrtValue, locations: np.ndarray) -> np.ndarray:
        """As every engine's, from logits on the device."""
        key = locations.tobytes()
        if key not in self._spreads:
            self._spreads[key] = self._made(graphs.spread_model(self.config.text.vocab, locations))
        *rows, vocab = logits.shape()
        binding, where = self._spreads[key].io_binding(), (self.device, self.device_id)
        binding.bind_input("logits", *where, np.float32, [math.prod(rows), vocab], logits.data_ptr())
        (spread,) = self._to_host(self._spreads[key], binding, "spread")
        return spread

    def _to_host(self, opened, binding, *names):
        """Run a small graph, and copy its outputs to the host."""
        for name in names:
            binding.bind_output(name, "cpu")
        with self._room():
            opened.run_with_iobinding(binding, RUN)
        return binding.copy_outputs_to_cpu()

    def _draw_of(self, logits, is_constrained):
        """Kept on the cache, so that it goes with it: a binding holds what is bound to it."""
        owner = self._owners.get(logits)
        cache = owner() if owner else None
        if cache is None:
            return Draw(self, logits, is_constrained)
        key = (*logits.shape(), is_constrained)
        if key not in cache.draws:
            with self._room():
                cache.draws[key] = Draw(self, logits, is_constrained)
        return cache.draws[key]

    def _put(self, array, value):
        """Copy an array into a value on the device; not waiting, but in the order of the launches."""
        if self._stream:
            cuda.copy_to(value.data_ptr(), array, self._stream)
        else:
            value.update_inplace(array)

    def _encoded(self, vision, pixel_values):
        """The features stay on the device, those of several pictures in one value: (the value, which of them)."""
        with self._room():
            values = self._features_buffer(len(pixel_values))
        binding = vision.io_binding()
        binding.bind_cpu_input("pixel_values", pixel_values)
        binding.bind_ortvalue_output(FEATURES, values)
        with self._errors_as_line("vision"):
            vision.run_with_iobinding(binding, RUN)
        return [(values, i) for i in range(len(pixel_values))]

    def _bind_features(self, binding, features):
        together, size = self._features_buffer(len(features)), 4 * self.config.vision.patches * self.config.text.width
        for row, (value, i) in enumerate(each.value for each in features):
            target, source = together.data_ptr() + row * size, value.data_ptr() + i * size
            if self._stream:
                cuda.copy_within(target, source, size, self._stream)
            else:
                ctypes.memmove(target, source, size)
        binding.bind_ortvalue_input(FEATURES, together)

    def _features_buffer(self, pictures):
        return self.buffer([pictures, self.config.vision.patches, self.config.text.width], np.float32)

    def _logits(self, cache, made=None):
        logits = (made or cache).logits
        self._owners[logits] = ref(cache)
        return logits

    def _cache(self, batch, capacity, instead_of=None):
        if not self.captures:
            return super()._cache(batch, capacity)
        check_room(capacity, self.max_length)
        size = min(self.max_length, 2 ** (capacity - 1).bit_length())
        made = self._caches.setdefault((batch, size), [])  # two, where a search goes from one to the other and back
        free = next((cache for cache in made if cache is not instead_of), None)
        if free is None:
            free = Cache(self, batch, size)
            made.append(free)
        return free

    def _run_options(self, made):
        return self._options_for(made) if isinstance(made, Cache) else self._options_for()

    def _options_for(self, *graph):
        """How to run a graph; a captured one by a number of its own, the same for what is equal. None: not captured."""
        graph = graph if self.captures and graph[:1] != (None,) else ()
        if graph not in self._options:
            entries = {}
            if self._stream:  # what comes next is on the same stream, and waits there
                entries[WITHOUT_WAIT] = "1"
            if self.captures:
                entries["gpu_graph_id"] = str(len(self._options)) if graph else "-1"
            self._options[graph] = run_options(entries)
        return self._options[graph]

    def _prepare(self):
        """Before the graphs are opened: the weights' one copy, and the stream."""
        with self._room():
            self._shared = upload(self.bundle, self.device, self.device_id)
        self._stream = cuda.stream(self.device_id) if self.provider == CUDA else 0

    def _options_of(self, name, threads):
        options = super()._options_of(name, threads)
        for tensor, value in self._shared.items():
            if name in WITH_WEIGHTS:
                options.add_initializer(tensor, value)
        return options

    def _provider_options_of(self, name):
        options = {key: value for key, value in self.provider_options.items() if key != GRAPH or name in CAPTURED}
        return options | ({"user_compute_stream": str(self._stream)} if self._stream else {})

    @cached_property
    def _sample(self):
        return self._open("sample_device", 1)

    @cached_property
    def _constrain(self):
        if "constrain" not in self.bundle.description.graphs:
            raise PaliGemmaError(
                f"{self.bundle.path}: it has no graph that draws what a grammar allows, as newer bundles have; export "
                "it again"
            )
        return self._open("constrain", 1)

    @cached_property
    def _repeat(self):
        return self._made(graphs.repeat_model(self.config.text.vocab))

    @cached_property
    def _likeliest(self):
        return self._made(graphs.likeliest_model(self.config.text.vocab))

    @cached_property
    def _unwaited(self):
        return run_options({WITHOUT_WAIT: "1"} if self._stream else {})


class Draw:
    """A sampling graph's inputs and outputs beside one generation's logits; what does not change is sent once.

    Logits [B, T, V] of several tokens a row are as many rows. With `is_constrained` each row has ids of its own.
    """

    def __init__(self, session: DeviceSession, logits: onnxruntime.OrtValue, is_constrained: bool = False):
        *rows, vocab = logits.shape()
        batch, self._sent, self.session = math.prod(rows), {}, session
        self.graph = "constrain" if is_constrained else "sample_device"
        self.opened = session._constrain if is_constrained else session._sample
        self.is_captured = self.graph in CAPTURED and len(rows) == 1
        self.inputs = {
            name: session.buffer(shape, np.float32)
            for name, shape in (("temperature", []), ("top_p", []), ("uniform", [batch]))
        }
        if is_constrained:
            self.inputs["allowed"] = session.buffer([batch, vocab], np.bool_)
        self.binding, self.logits = self.opened.io_binding(), logits  # kept: what is bound is but a place
        place, where = logits.data_ptr(), (session.device, session.device_id)
        self.binding.bind_input("logits", *where, np.float32, [batch, vocab], place)
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        # One buffer for both outputs, so that one copy brings them: tokens, and behind them their log-probabilities.
        self.batch, self.drawn = batch, session.buffer([12 * batch], np.uint8)
        self.has_logprob = any(value.name == "logprob" for value in self.opened.get_outputs())
        place = self.drawn.data_ptr()
        self.binding.bind_output("token", *where, np.int64, [batch], place)
        if self.has_logprob:
            self.binding.bind_output("logprob", *where, np.float32, [batch], place + 8 * batch)

    def numpy(self) -> tuple[np.ndarray, np.ndarray | None]:
        """What was drawn: tokens [B], and their log-probabilities [B] if the graph gives them."""
        drawn = self.drawn.numpy().copy()  # on the CPU .numpy() is a view of the buffer
        token, logprob = drawn[: 8 * self.batch].view(np.int64), drawn[8 * self.batch :].view(np.float32)
        return token, logprob if self.has_logprob else None

    def is_new(self, name: str, number: ArrayLike) -> bool:
        """Whether an input is another than the last time."""
        before, self._sent[name] = self._sent.get(name), np.array(number)
        return before is None or not np.array_equal(before, number)

    def set_allowed(self, allowed: np.ndarray) -> None:
        """Which ids each row may have: bool [B, V]."""
        if self.is_new("allowed", allowed):
            self.session._put(np.ascontiguousarray(allowed), self.inputs["allowed"])

    def set_count(self, candidates: int) -> None:
        """How many of the likeliest to draw from: a number that the host is asked for."""
        if self.is_new("count", candidates):
            self.binding.bind_cpu_input("count", np.array([candidates], np.int64))


def upload(bundle: Bundle, device: str, device_id: int = 0) -> dict[str, onnxruntime.OrtValue]:
    """The large weights of all graphs by name, each once on the device, from the mapped file."""
    data, values = np.memmap(bundle.path / FILE, np.uint8, "r"), {}
    for name in (name for name in WITH_WEIGHTS if name in bundle.description.graphs):
        file = bundle.graph_file(name)
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            place = ExternalDataInfo(tensor)
            offset, length = place.offset or 0, place.length or 0
            if tensor.name in values or not tensor.external_data or length < SHARED_FROM:
                continue
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                list(tensor.dims), tensor.data_type, device, device_id
            )
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            bits = np.dtype(f"u{kind.itemsize}") if kind.kind == "V" else kind  # bfloat16 goes in as its bits
            piece = data[offset : offset + length].view(bits)
            value.update_inplace(piece.reshape(tensor.dims))
            # Seen through DLPack: a session takes no buffer that is an OrtValue's own.
            values[tensor.name] = onnxruntime.OrtValue.from_dlpack(value._ortvalue)
    return values
