"""Running a bundle with ONNX Runtime: the engine whose cache never leaves the device.

The cache is a set of buffers on the device. Prefill writes them; every decode step is given the same buffer
as past and as present, so the runtime updates it in place. The same code drives CUDA and the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from numpy_ref import memory
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.engine import Engine, Features, Pictures, check_room, pictures_per_prompt, pixels_of
from numpy_ref.errors import PaliGemmaError, plural
from numpy_ref.image import to_rgb
from numpy_ref.model.sampling import Sampling, log_probability
from numpy_ref.model.segmentation import CELLS, SIDE

from .. import bundle as bundles
from ..bundle import Bundle, prepack
from ..bundle.weights import FLOATS, stream_dtype
from ..model import graphs
from ..model.paligemma import FEATURES
from ..runtime import run_options, session_options
from . import cuda
from .allocator import freed_memory_kept
from .provider import CPU, CUDA, DEFAULTS, chosen_device, place, prefer_cudnn, stdout_kept

if TYPE_CHECKING:
    from PIL import Image

RUN = run_options()
GRAPH = "enable_cuda_graph"
HALVES = ("vision", "prefill_text")  # of prefill
#: The other graphs are small, and made for the host.
ON_DEVICE = ("prefill", *HALVES, "decode", "extend", "sample_device", "constrain")
NOT_IN_OLDER = {"logprob"}  # outputs that a graph of an older bundle may lack
# Below this the runtime may repack the weights for speed, which takes a private copy a session (twice the speed in
# float32 prefill, little in decode). From here on both sessions map the one file, unless it has the repacked weights
# too (prepack.py). Quantized weights are always repacked: their quick kernels read no other order.
MAPPED_FROM = 2 * 2**30


class Session(Engine):
    """A bundle's graphs as an engine.

    Threads may share one: each generation has a cache, and buffers, of its own. A picture with its prompt goes through
    the graph of prefill, until `encode` is called: then the two halves of prefill are opened in its place, so that its
    weights are not there twice. `in_halves` opens them from the start.
    """

    name = "onnx"
    can_capture = False  # which takes logits and tokens that stay where they are

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "auto",
        threads: int = 0,
        provider_options: Mapping[str, object] | None = None,
        in_halves: bool = False,
    ):
        masks = self._paint if "masks" in bundle.description.graphs else None
        super().__init__(bundle.config, bundle.description.image.resize, masks, bundle.max_length)
        self.bundle, self.threads = bundle, threads
        self.extends_at_once = "extend" in bundle.description.graphs  # older ones lack it
        self.provider_options = {name: str(value) for name, value in (provider_options or {}).items()}
        self.provider = place(bundle, provider, self.provider_options)
        self.device, self.device_id = "cuda" if self.provider == CUDA else "cpu", 0
        if self.provider == CUDA:
            prefer_cudnn()
            self.device_id = chosen_device(self.provider_options)
            self.provider_options = DEFAULTS | self.provider_options
            if self.captures and not self.can_capture:
                raise PaliGemmaError(
                    f"--provider-option {GRAPH}: not with --host-graphs, whose tokens leave the device"
                )
        elif self.provider_options:
            raise PaliGemmaError(f"--provider-option {next(iter(self.provider_options))}: options are for CUDA")
        precision = bundle.description.precision
        if precision.endswith("bfloat16") and self.provider == CPU:
            raise PaliGemmaError(f"{bundle.path}: {precision} needs CUDA; export float32, int8 or int4 for the CPU")
        self._opening = Lock()
        with stdout_kept():
            self._prepare()
        opened = self._open_all(*(HALVES if in_halves and self.has_halves else ("prefill",)), "decode")
        self._decode = opened.pop("decode")
        self._prefill: onnxruntime.InferenceSession | None = opened.pop("prefill", None)
        self._halves = opened

    @property
    def captures(self) -> bool:
        """Whether decode is to be captured as a CUDA graph."""
        return self.provider_options.get(GRAPH, "0") not in ("0", "false", "False")

    @property
    def has_halves(self) -> bool:
        """Whether the bundle has the two halves of prefill apart, as older ones do not."""
        return all(name in self.bundle.description.graphs for name in HALVES)

    def encode(self, pixel_values: np.ndarray) -> list[Features]:
        """Run pictures through the vision tower alone: pixel_values [M, 3, S, S] -> features of each.

        An older bundle cannot: the features are without a value, and prefill sees the pictures again.
        """
        if not self.has_halves:
            return super().encode(pixel_values)
        pixel_values = np.ascontiguousarray(pixel_values, np.float32)
        return list(map(Features, pixel_values, self._encoded(self._opened_halves()["vision"], pixel_values)))

    def prefill(
        self,
        pictures: Pictures,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        capacity: int,
        into: "Cache | None" = None,
    ) -> tuple[Any, "Cache"]:
        """Pictures as any engine takes them, input_ids [B, T], lengths [B] -> logits [B, V] and a cache of C slots.

        `into` is the cache that is filled, of B rows and C slots; without one, it is made.
        """
        check_room(input_ids.shape[1], capacity)
        if pictures_per_prompt(self.config, pictures, input_ids) > 1:
            self._check_several_pictures()
        whole = self._prefill  # as it is now: another thread may give it up
        if whole and (isinstance(pictures, np.ndarray) or not self.has_halves):
            name, graph, binding = "prefill", whole, whole.io_binding()
            binding.bind_cpu_input("pixel_values", np.ascontiguousarray(pixels_of(pictures), np.float32))
        else:
            features = self.encode(pictures) if isinstance(pictures, np.ndarray) else pictures
            name, graph = "prefill_text", self._opened_halves()["prefill_text"]
            binding = graph.io_binding()
            with self._room():
                self._bind_features(binding, features)
        with self._room():
            cache = into or self._cache(len(lengths), capacity)
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "lengths": np.ascontiguousarray(lengths, np.int32),
            "capacity": np.array(cache.capacity, np.int64),
        }
        for key, array in feeds.items():
            binding.bind_cpu_input(key, array)
        binding.bind_ortvalue_output("logits", cache.logits)
        cache.bind_present(binding)
        with self._errors_as_line(name):
            graph.run_with_iobinding(binding, RUN)
        return self._logits(cache), cache

    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: "Cache") -> tuple[Any, "Cache"]:
        """input_ids [B, 1] at position lengths [B] -> logits [B, V]; the cache is updated in place."""
        check_room(lengths.max() + 1, cache.capacity)
        self._put(np.ascontiguousarray(input_ids, np.int64), cache.input_ids)
        self._put(np.ascontiguousarray(lengths, np.int32), cache.lengths)
        with self._errors_as_line("decode"):
            self._decode.run_with_iobinding(cache.binding, self._run_options(cache))
        return self._logits(cache), cache

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: "Cache") -> tuple[Any, "Cache"]:
        """input_ids [B, T] from position lengths [B] on -> logits [B, T, V]; the cache is updated in place.

        The graph is opened when it is first needed. Without it, in an older bundle, the tokens are decoded one by one.
        """
        if not self.extends_at_once:
            return super().extend(input_ids, lengths, cache)
        size = input_ids.shape[1]
        check_room(lengths.max() + size, cache.capacity)
        with self._room():
            extension = cache.extension(self, size)
        self._put(np.ascontiguousarray(input_ids, np.int64), extension.input_ids)
        self._put(np.ascontiguousarray(lengths, np.int32), cache.lengths)
        with self._errors_as_line("extend"):
            self._extend.run_with_iobinding(extension.binding, self._run_options(extension))
        return self._logits(cache, extension), cache

    def reorder(self, cache: "Cache", rows: np.ndarray) -> "Cache":
        """A cache whose row r is row rows[r] of this one, which may be used again for another from then on."""
        if np.array_equal(rows, np.arange(cache.batch)):
            return cache
        with self._room():
            reordered = self._cache(len(rows), cache.capacity, cache)
            binding = self._reorder.io_binding()
            binding.bind_cpu_input("rows", np.ascontiguousarray(rows, np.int64))
            for name, buffer in cache.buffers.items():
                binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
                binding.bind_ortvalue_output(f"present.{name}", reordered.buffers[name])
            self._reorder.run_with_iobinding(binding, self._unwaited)
        return reordered

    def buffer(self, shape: Sequence[int], dtype: type | int) -> onnxruntime.OrtValue:
        """Memory where this session runs, as an OrtValue."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, self.device_id)

    def _encoded(self, vision, pixel_values):
        """The values of features, [P, D] of each picture."""
        return self._run("vision", vision, {"pixel_values": pixel_values})[FEATURES]

    def _bind_features(self, binding, features):
        binding.bind_cpu_input(FEATURES, np.stack([each.value for each in features]))

    def _put(self, array, value):
        """Copy an array into a value on the device."""
        value.update_inplace(array)

    def _logits(self, cache, made=None):
        return (made or cache).logits.numpy().copy()  # on the CPU .numpy() is a view of the buffer

    def _cache(self, batch, capacity, instead_of=None):
        """A cache that is not `instead_of`."""
        return Cache(self, batch, capacity)

    def _run_options(self, cache):
        return RUN

    @property
    def _unwaited(self):
        """How to run a graph whose outputs stay on the device, where what reads them is behind it."""
        return RUN

    @cached_property
    def _reorder(self):
        return self._made(graphs.reorder_model(self.config, stream_dtype(self.bundle.description.precision)))

    def _made(self, model):
        """A small graph that is not in the bundle, opened where the session runs."""
        on_device = self.provider == CUDA
        providers = [(CUDA, self._provider_options_of(model.graph.name)), CPU] if on_device else [CPU]
        return onnxruntime.InferenceSession(graphs.serialize(model), session_options({}, 1), providers=providers)

    @cached_property  # here as below, two threads that come first together both open it, and either's does
    def _extend(self):
        return self._open_all("extend")["extend"]

    @cached_property
    def _masks(self):
        return self._open("masks", 1)  # when a mask is first asked for

    def _paint(self, codes):
        """Mask codes [B, 16] -> [B, 64, 64], positive inside."""
        return self._run("masks", self._masks, {"codes": np.ascontiguousarray(codes, np.int64)})["masks"]

    def _prepare(self):
        """What comes before the graphs are opened."""

    def _open_all(self, *names):
        """Graphs that read the weights file, by name. Repacking weights takes one core each."""
        kept = freed_memory_kept() if self.bundle.is_prepacked else nullcontext()
        with stdout_kept(), kept, ThreadPoolExecutor(len(names)) as pool:
            opened = dict(zip(names, pool.map(partial(self._open, threads=self.threads), names), strict=True))
        if self.provider == CUDA:
            for name, graph in opened.items():
                self._check_placement(name, graph)
        return opened

    def _opened_halves(self):
        """The two halves of prefill, opened when first needed."""
        with self._opening:
            if not self._halves:
                self._prefill = None  # first, or its repacked weights would be there beside theirs
                self._halves = self._open_all(*HALVES)
            return self._halves

    def _open(self, name, threads):
        options = self._options_of(name, threads)
        on_device = self.provider == CUDA and name in ON_DEVICE
        providers = [(CUDA, self._provider_options_of(name)), CPU] if on_device else [CPU]
        digest = self.bundle.description.files[bundles.weights.FILE].sha256
        source, entries = prepack.source(self._file(name), digest, on_cpu=not on_device)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        with self._errors_as_line(name):
            opened = onnxruntime.InferenceSession(source, options, providers=providers)
            found = {value.name: value.shape for value in (*opened.get_inputs(), *opened.get_outputs())}  # or not UTF-8
        for value, shape in self._io(name).items():
            if (value not in NOT_IN_OLDER or value in found) and not _fits(found.get(value), shape):
                raise PaliGemmaError(
                    f"{self._file(name)}: {value} is {found.get(value, 'missing')}, not {list(shape)} as "
                    f"{bundles.DESCRIPTION} has it; export the bundle again"
                )
        return opened

    def _check_placement(self, name, opened):
        """Raise PaliGemmaError unless a graph's outputs, and what is read at every step, are on the device.

        The runtime leaves a node without a kernel there to the CPU, and copies what is bound to it once, when it is
        bound: from then on such a session computes with what was there then.
        """
        if CUDA not in opened.get_providers():
            given = ", ".join(f"{key}={value}" for key, value in self.provider_options.items())
            raise PaliGemmaError(f"--provider cuda: the runtime does not start it with the options {given}")
        infos = [*opened.get_output_memory_infos()]
        if name in ("decode", "extend"):
            infos += opened.get_input_memory_infos()
        if any(info.name != "Cuda" for info in infos):
            raise PaliGemmaError(
                f"{self._file(name)}: CUDA has no kernels for all of it; run it with --provider cpu, or export the "
                "bundle again"
            )

    def _check_several_pictures(self):
        """Raise PaliGemmaError if the graph has one picture a prompt, as older bundles have it."""
        if self._prefill is None:
            return
        batch = {value.name: value.shape[0] for value in self._prefill.get_inputs() if value.shape}
        if batch["pixel_values"] == batch["input_ids"]:
            raise PaliGemmaError(f"{self.bundle.path}: it takes one picture a prompt; export the bundle again for more")

    def _io(self, name):
        return graph_io(name, self.config)

    def _run(self, name, opened, feeds):
        """The outputs of a graph by name."""
        names = [value.name for value in opened.get_outputs()]
        with self._errors_as_line(name):
            return dict(zip(names, opened.run(names, feeds, RUN), strict=True))

    def _file(self, name):
        return self.bundle.graph_file(name)

    @contextmanager
    def _errors_as_line(self, name):
        """Turn what ONNX Runtime raises, which has no common class, into a line that names the graph."""
        try:
            yield
        except Exception as error:
            raise PaliGemmaError(f"{self._file(name)}: ONNX Runtime cannot load or run it ({error})") from None

    @contextmanager
    def _room(self):
        """Turn what the runtime raises where memory cannot be had into a line that says what takes less."""
        try:
            yield
        except PaliGemmaError:
            raise
        except Exception as error:  # the runtime's exceptions have no common class
            where = f"device {self.device_id}" if self.provider == CUDA else "the CPU"
            reason = " ".join(str(error).split())
            raise PaliGemmaError(
                f"{self.bundle.path}: there is no room for it on {where} ({reason}); a smaller batch, a shorter answer "
                "or a bundle in fewer bits takes less memory"
            ) from None

    def _options_of(self, name, threads):
        entries = {}
        floats = self.bundle.description.precision in FLOATS
        if floats and self.bundle.weight_bytes > MAPPED_FROM and not self.bundle.is_prepacked:
            entries["session.disable_prepacking"] = "1"
        if name in ("prefill", "prefill_text"):  # its threads would spin on for a while, where decode's begin
            entries["session.force_spinning_stop"] = "1"
        return session_options(entries, threads)

    def _provider_options_of(self, name):
        return self.provider_options


class HostSession(Session):
    """A bundle run as hosts in other languages run it: its graphs also prepare the picture and draw the tokens."""

    def preprocess(self, image: "Image.Image") -> np.ndarray:
        """A Pillow image of any size -> pixel values [1, 3, S, S]."""
        return self._run("preprocess", self._preprocess, {"image": np.asarray(to_rgb(image))})["pixel_values"]

    def draw(
        self, logits: np.ndarray, known: np.ndarray, sampling: Sampling, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A token a row and its log-probability, as every engine's; which ids are `known` [V] is in the graph.

        Where each row has its own, the others' logits are taken away before. The log-probability is NumPy's then, and
        where the graph, of an older bundle, has none.
        """
        logits = logits.reshape(-1, logits.shape[-1])
        feeds = {
            "logits": logits if np.ndim(known) < 2 else np.where(known, logits, np.float32(-np.inf)),
            "temperature": np.array(sampling.temperature, np.float32),
            "top_k": np.array(sampling.top_k, np.int64), "top_p": np.array(sampling.top_p, np.float32),
            "uniform": uniform,
        }  # fmt: skip
        drawn = self._run("sample", self._sample, feeds)
        token = drawn["token"]
        has_own = "logprob" in drawn and np.ndim(known) < 2
        return token, drawn["logprob"] if has_own else log_probability(logits, token)

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
        self.batch, self.capacity, self.draws, self.extensions = batch, capacity, {}, {}
        shape = [batch, text.kv_heads, capacity, text.head_dim]
        dtype = stream_dtype(session.bundle.description.precision)
        if session.provider == CPU:
            needed = 2 * text.depth * math.prod(shape) * dtype.itemsize + 4 * batch * text.vocab
            memory.check(int(needed), f"a cache of {capacity} positions for {plural(batch, 'row')}")
        self.buffers = {
            f"{i}.{kind}": session.buffer(shape, int(dtype)) for i in range(text.depth) for kind in ("key", "value")
        }
        self.input_ids, self.lengths = session.buffer([batch, 1], np.int64), session.buffer([batch], np.int32)
        self.logits = session.buffer([batch, text.vocab], np.float32)
        self.binding = self.bind(session._decode, self.input_ids, self.logits)

    def bind(
        self, opened: onnxruntime.InferenceSession, input_ids: onnxruntime.OrtValue, logits: onnxruntime.OrtValue
    ) -> onnxruntime.IOBinding:
        """The inputs and outputs of decode, or of extend: each buffer is past and present."""
        binding = opened.io_binding()
        binding.bind_ortvalue_input("input_ids", input_ids)
        binding.bind_ortvalue_input("lengths", self.lengths)
        binding.bind_ortvalue_output("logits", logits)
        self.bind_past(binding)
        self.bind_present(binding)
        return binding

    def bind_past(self, binding: onnxruntime.IOBinding) -> None:
        """Have a graph read keys and values from here."""
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)

    def bind_present(self, binding: onnxruntime.IOBinding) -> None:
        """Have a graph write keys and values here."""
        for name, value in self.buffers.items():
            binding.bind_ortvalue_output(f"present.{name}", value)

    def extension(self, session: Session, size: int) -> "Extension":
        """What `size` tokens at once are fed by, and where their logits are; made when first asked for."""
        if size not in self.extensions:
            self.extensions[size] = Extension(session, self, size)
        return self.extensions[size]

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of the buffers by name, `{layer}.key` and `{layer}.value`, each [B, K, C, H]."""
        return {name: cuda.on_host(value) for name, value in self.buffers.items()}


class Rows(Cache):
    """`batch` rows of a cache from row `first` on, as a cache of its own in the same memory."""

    def __init__(self, session: Session, whole: Cache, first: int, batch: int):
        self.session, self.first, self.batch, self.capacity = session, first, batch, whole.capacity
        self.buffers, self.draws, self.extensions = whole.buffers, {}, {}
        self.input_ids, self.lengths = session.buffer([batch, 1], np.int64), session.buffer([batch], np.int32)
        self.logits = session.buffer([batch, session.config.text.vocab], np.float32)

    @cached_property
    def binding(self) -> onnxruntime.IOBinding:
        """Of a decode step over these rows; what is only filled needs none."""
        return self.bind(self.session._decode, self.input_ids, self.logits)

    def bind_past(self, binding: onnxruntime.IOBinding) -> None:
        """Have a graph read keys and values from these rows."""
        for name, rows in self._places():
            binding.bind_input(f"past_key_values.{name}", *rows)

    def bind_present(self, binding: onnxruntime.IOBinding) -> None:
        """Have a graph write keys and values into these rows."""
        for name, rows in self._places():
            binding.bind_output(f"present.{name}", *rows)

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of these rows by name."""
        rows = slice(self.first, self.first + self.batch)
        return {name: array[rows] for name, array in super().numpy().items()}

    def _places(self):
        """Each buffer's name, and the device, its number, dtype, shape and address of these rows of it."""
        dtype = int(stream_dtype(self.session.bundle.description.precision))
        where = self.session.device, self.session.device_id, dtype
        for name, value in self.buffers.items():
            rows, *shape = value.shape()
            row_bytes = value.tensor_size_in_bytes() // rows
            yield name, (*where, [self.batch, *shape], value.data_ptr() + self.first * row_bytes)


class Extension:
    """The buffers of `size` tokens a row, bound to the extend graph with those of a cache."""

    def __init__(self, session: Session, cache: Cache, size: int):
        vocab = session.config.text.vocab
        self.input_ids = session.buffer([cache.batch, size], np.int64)
        self.logits = session.buffer([cache.batch, size, vocab], np.float32)
        self.binding = cache.bind(session._extend, self.input_ids, self.logits)


def graph_io(name: str, config: PaliGemmaConfig) -> dict[str, tuple]:
    """The inputs and outputs of a graph of a bundle -> their shapes; None for a size that is the caller's.

    A graph that has others is refused before anything is made in the sizes that bundle.json claims.
    """
    text, size = config.text, config.vision.image_size
    layers, cache = range(text.depth), (None, text.kv_heads, None, text.head_dim)
    present = {f"present.{i}.{kind}": cache for i in layers for kind in ("key", "value")}
    past = {f"past_key_values.{i}.{kind}": cache for i in layers for kind in ("key", "value")}
    pixel_values, logits = {"pixel_values": (None, 3, size, size)}, {"logits": (None, text.vocab)}
    ids, lengths = {"input_ids": (None, None)}, {"lengths": (None,)}
    drawing = {**logits, "temperature": (), "top_p": (), "uniform": (None,)}
    drawing |= {"token": (None,), "logprob": (None,)}
    features = {FEATURES: (None, config.vision.patches, text.width)}
    return {
        "prefill": {**pixel_values, **ids, **lengths, "capacity": (), **logits, **present},
        "vision": {**pixel_values, **features},
        "prefill_text": {**features, **ids, **lengths, "capacity": (), **logits, **present},
        "decode": {**ids, **lengths, **past, **logits, **present},
        "extend": {**ids, **lengths, **past, "logits": (None, None, text.vocab), **present},
        "preprocess": {"image": (None, None, 3), "pixel_values": (1, 3, size, size)},
        "sample": {**drawing, "top_k": ()},
        "sample_device": {**drawing, "count": (1,)},
        "constrain": {**drawing, "count": (1,), "allowed": (None, text.vocab)},
        "masks": {"codes": (None, CELLS * CELLS), "masks": (None, SIDE, SIDE)},
    }[name]


def _fits(found, shape) -> bool:
    """Whether a graph's shape, in which names stand for free sizes, is the one that is wanted."""
    return (
        found is not None
        and len(found) == len(shape)
        and all(size is None or have == size for have, size in zip(found, shape, strict=True))
    )
