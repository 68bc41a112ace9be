"""A bundle opened with ONNX Runtime, as an engine."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from numpy_ref.tokenizer import Tokenizer

from .. import bundle as bundles
from ..bundle import Bundle
from .device import DeviceSession
from .engine import HostSession, Session
from .provider import CPU, CUDA, choose_provider, place

__all__ = [
    "CPU", "CUDA", "DeviceSession", "HostSession", "Session", "choose_provider", "load", "make", "open_session",
    "place", "shipped",
]  # fmt: skip


def load(
    path: str | Path | None = None,
    provider: str = "auto",
    threads: int = 0,
    host_graphs: bool = False,
    provider_options: Mapping[str, object] | None = None,
    in_halves: bool = False,
) -> tuple[Session, Tokenizer]:
    """A bundle, or the shipped model's, as engine and tokenizer.

    On CUDA it is a DeviceSession; `host_graphs` makes it a HostSession. `in_halves` is for several prompts about a
    picture: see `Session`.
    """
    bundle = bundles.load_but_weights(path) if path else shipped(provider, provider_options)
    tokenizer, kind = Tokenizer.load(bundle.path, bundle.config), HostSession if host_graphs else None
    return open_session(bundle, provider, threads, kind, provider_options, in_halves), tokenizer


def shipped(provider: str = "auto", provider_options: Mapping[str, object] | None = None) -> Bundle:
    """The shipped model's bundle, as the provider runs it."""
    return bundles.shipped(for_cuda=choose_provider(provider, provider_options, quietly=True) == CUDA)


def open_session(
    bundle: Bundle,
    provider: str = "auto",
    threads: int = 0,
    kind: type[Session] | None = None,
    provider_options: Mapping[str, object] | None = None,
    in_halves: bool = False,
) -> Session:
    """A session, with the weights checked while the runtime opens the graphs: either takes seconds."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(bundles.check_weights_once, bundle)
        try:
            return make(bundle, provider, threads, kind, provider_options, in_halves)
        finally:
            checked.result()  # raises what is wrong with the file, which says more than the runtime did


def make(
    bundle: Bundle,
    provider: str = "auto",
    threads: int = 0,
    kind: type[Session] | None = None,
    provider_options: Mapping[str, object] | None = None,
    in_halves: bool = False,
) -> Session:
    """A session of the kind that suits the provider, if none is asked for, of a bundle whose weights were checked."""
    if place(bundle, provider, provider_options) == CPU:
        return (kind or Session)(bundle, "cpu", threads, provider_options, in_halves)
    return (kind or DeviceSession)(bundle, "cuda", threads, provider_options, in_halves)
