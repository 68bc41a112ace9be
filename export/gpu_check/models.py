"""What the stages run: the shipped model in every form, and a random one of full size that is made quickly."""

import hashlib
import io
import itertools
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint.synthetic import scale_of
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image
from numpy_ref.tokenizer import known_ids

from .. import bundle as bundles
from ..bundle import Bundle, weights
from ..model.layers import OPERATORS
from ..session import Session, open_session
from ..session.device import DeviceSession
from ..session.engine import GRAPH
from .stage import NotHere, Settings

PICTURE = checkpoints.SHIPPED / "example.png"
NORMALS = 4_194_301  # that random weights are tiled from: a prime, so that no two rows of a matrix are equal
SLACK, STRIDE = 2**20, 7919  # tensors of one scale begin at different places of one array
OPTIONS = ("float16/float16 fused", "bfloat16/float32 fused")
MOST_WAIT = 200  # seconds that a stage waits for a large bundle


# --- the shipped model -------------------------------------------------------------------------------------


def shipped_names() -> list[str]:
    """`precision operators` of every pair that needs no calibration, and the residual streams that are options.

    Such a one is told behind the precision: `float16/float16`.
    """
    precisions = [each for each in weights.PRECISIONS if each not in weights.CALIBRATED]
    return [*(" ".join(pair) for pair in itertools.product(precisions, OPERATORS)), *OPTIONS]


def form(name: str) -> tuple[str, str | None]:
    """`precision`, or `precision/residual` -> both; None for the residual stream that the precision has by itself."""
    precision, _, residual = name.partition("/")
    return precision, residual or None


def shipped(settings: Settings, name: str) -> Bundle:
    """A bundle of the shipped model, made when it is first asked for. NotHere if there is none of that kind."""
    folder = settings.folder / f"shipped-{sources()}" / name.replace(" ", "-").replace("/", "-")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        (precision, residual), operators = form(name.split()[0]), name.split()[1]
        try:
            bundles.write(checkpoints.load(), folder, precision, operators=operators, residual=residual)
        except PaliGemmaError as error:
            raise NotHere(f"cannot be exported: {error}") from None
    return bundles.load(folder)


@cache
def sources() -> str:
    """A digest of this project's code: a folder that is kept has bundles of several versions."""
    root = Path(__file__).parents[2]
    files = sorted(file for package in ("numpy_ref", "export") for file in (root / package).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


# --- a random model of full size ---------------------------------------------------------------------------


def few_layers(config: PaliGemmaConfig, layers: int) -> PaliGemmaConfig:
    """A model's first layers, of each tower."""
    text = replace(config.text, depth=layers, windows=config.text.windows[:layers])
    return replace(config, vision=replace(config.vision, depth=layers), text=text)


def full_names(settings: Settings) -> list[str]:
    """What the large model is timed in, named as `form` reads it."""
    return ["float16", "float16/float16", "bfloat16", "int4-float16"] if settings.on_device else ["float32"]


def random_arrays(config: PaliGemmaConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Every weight by path, random and of `synthetic`'s scales, as views of one array a scale: made in a second or two.

    The numbers repeat, which costs a kernel nothing: it reads each from where it lies.
    """
    parameters = checkpoints.parameters(config)
    largest: dict[float, int] = {}
    for parameter in parameters:
        scale = scale_of(parameter)
        largest[scale] = max(largest.get(scale, 0), int(np.prod(parameter.shape)))
    normals = np.random.Generator(np.random.SFC64(0)).standard_normal(NORMALS, np.float32)
    pools = {scale: tiled((normals * np.float32(scale)).astype(dtype), size) for scale, size in largest.items()}

    def view(i, parameter):
        start, size = i * STRIDE % SLACK, int(np.prod(parameter.shape))
        return pools[scale_of(parameter)][start : start + size].reshape(parameter.shape)

    return {parameter.path: view(i, parameter) for i, parameter in enumerate(parameters)}


def tiled(values: np.ndarray, size: int) -> np.ndarray:
    """The values over and over, `size` of them and some to begin later."""
    bits = values.view(f"u{values.dtype.itemsize}")
    return np.resize(bits, size + SLACK).view(values.dtype)


def full_folder(settings: Settings, name: str) -> Path:
    config = hashlib.sha256(repr(settings.config).encode()).hexdigest()[:8]
    return settings.folder / f"random-{config}-{sources()}" / name.replace("/", "-residual-")


def make_full(settings: Settings) -> None:
    """Every large bundle that is not there yet, side by side; what cannot be made leaves its reason in a file."""
    wanted = [name for name in full_names(settings) if not full_folder(settings, name).exists()]
    if wanted:
        with ProcessPoolExecutor(len(wanted) if settings.on_device else 1) as pool:
            made = [(name, pool.submit(_make, settings, name)) for name in wanted]
        for name, process in made:
            if error := process.exception():  # killed, as it is where memory runs out
                reason_of(full_folder(settings, name)).write_text(f"{type(error).__name__}: {error}")


def _make(settings, name) -> None:
    folder, (precision, residual) = full_folder(settings, name), form(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    reason, started = reason_of(folder), time.perf_counter()
    reason.unlink(missing_ok=True)
    try:
        known = {"float16": np.float16, "float32": np.float32}
        dtype = np.dtype(known.get(precision, ml_dtypes.bfloat16))
        params = checkpoints.unflatten(random_arrays(settings.config, dtype))
        checkpoint = checkpoints.Checkpoint(folder.parent, settings.config, params, dtype)
        with redirect_stderr(io.StringIO()):  # a warning: there is no tokenizer
            bundles.write(checkpoint, folder, precision, residual=residual)
        bundles.load(folder)  # hashed once more, so that loading is timed as it is from the second time on
        seconds_of(folder).write_text(f"{time.perf_counter() - started:.1f}")
    except Exception as error:
        reason.write_text(f"{type(error).__name__}: {error}")


def reason_of(folder: Path) -> Path:
    """Where it is told why a large bundle could not be made."""
    return folder.with_name(f"{folder.name}.failed")


def seconds_of(folder: Path) -> Path:
    """Where it is told how long making it took."""
    return folder.with_name(f"{folder.name}.seconds")


def full(settings: Settings, name: str) -> Bundle:
    """The large bundle, once it is there. RuntimeError with the reason if it could not be made."""
    folder, limit = full_folder(settings, name), time.monotonic() + MOST_WAIT
    while not (folder.exists() and seconds_of(folder).exists()):
        if reason_of(folder).exists():
            raise RuntimeError(f"the {name} bundle could not be made: {reason_of(folder).read_text()}")
        if time.monotonic() > limit:
            raise RuntimeError(f"the {name} bundle was not there within {MOST_WAIT} s")
        time.sleep(0.2)
    return bundles.load_but_weights(folder)


# --- running them ------------------------------------------------------------------------------------------


def opened(bundle: Bundle, settings: Settings, captured: bool = False) -> Session:
    """The bundle's session on the device. NotHere where a bundle of its kind cannot run there."""
    if captured and not settings.on_device:
        raise NotHere("decode is captured on CUDA alone")
    if settings.on_device and bundle.only_for_cpu:
        raise NotHere(bundle.only_for_cpu)
    if not settings.on_device and bundle.description.precision.endswith("bfloat16"):
        raise NotHere("the CPU has no bfloat16 kernels")
    options = {GRAPH: "1"} if captured else None
    return open_session(bundle, settings.provider, kind=DeviceSession, provider_options=options)


def picture(engine: Session, batch: int = 1) -> np.ndarray:
    """The example's pixel values, once a row."""
    return np.repeat(engine.preprocess(open_image(PICTURE)), batch, 0)


def endless(config: PaliGemmaConfig) -> np.ndarray:
    """Which ids may be drawn where every answer is to have its full length."""
    known = known_ids(config)
    known[[config.eos, *config.ends]] = False
    return known
