"""What a program did over the stub, as a table: one event a line, each in the phase that the last mark began.

A line is the event's kind, then tab-separated key=value. A dataclass here has the keys as its fields.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Placed:
    """Work that was given to a stream; stream 0 is the default one of its device. What is `captured` runs later."""

    stream: int
    device: int
    captured: bool


@dataclass(frozen=True)
class Kernel(Placed):
    """A kernel by its full C++ name, and the size of its grid and blocks."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def short(self) -> str:
        """The function's own name, without return type, namespaces, template arguments and parameters."""
        plain = self.name.replace("(anonymous namespace)", "")
        while (stripped := re.sub(r"<[^<>]*>", "", plain)) != plain:
            plain = stripped
        return plain.split("(")[0].split("::")[-1].split()[-1]


@dataclass(frozen=True)
class Product(Placed):
    """A matrix product [m, k] x [k, n], `batch` times; cuDNN's calls have no sizes.

    `type` (of the result), `compute` and `math` are the numbers of cudaDataType_t, cublasComputeType_t and
    cublasMath_t; -1 where a call has none. TF32 is allowed where `math` is 3 or `compute` is 77.
    """

    function: str
    m: int
    n: int
    k: int
    batch: int
    type: int
    compute: int
    math: int


@dataclass(frozen=True)
class Copy(Placed):
    """A copy in a direction H2D, D2H, D2D or H2H, H for the host.

    `pageable`: the host's side is memory that the device cannot reach by itself. `waits`: the call returns when it is
    done. `source` and `target` are devices, -1 the host.
    """

    call: str
    direction: str
    bytes: int
    pageable: bool
    waits: bool
    source: int
    target: int


@dataclass(frozen=True)
class Fill(Placed):
    """A cudaMemset."""

    bytes: int


@dataclass(frozen=True)
class Wait:
    """The host waits for a `device`, a `stream` or an `event` (recorded on `stream`)."""

    on: str
    stream: int
    device: int


@dataclass(frozen=True)
class Allocation:
    """Memory of a device; `in_use` is what is allocated there with it."""

    call: str
    bytes: int
    device: int
    in_use: int


@dataclass(frozen=True)
class Freed(Allocation):
    """Memory given back; `in_use` is what is still allocated there."""


@dataclass(frozen=True)
class Pinned:
    """Memory of the host that devices reach."""

    call: str
    bytes: int
    device: int


@dataclass(frozen=True)
class Stream:
    """A stream that was made; `blocking` ones are ordered with the default stream."""

    id: int
    device: int
    blocking: bool


@dataclass(frozen=True)
class Capture:
    """A capture's `state`: begin, end, or invalid for an end without a graph."""

    state: str
    graph: int
    stream: int
    device: int


@dataclass(frozen=True)
class Replay(Placed):
    """A launch of a captured graph, and how much of each it does."""

    graph: int
    kernel: int
    product: int
    copy: int
    fill: int
    host: int


@dataclass(frozen=True)
class Violation:
    """A call that CUDA forbids, with the cudaError_t it got."""

    call: str
    error: int
    rule: str


@dataclass(frozen=True)
class Other:
    """An event that has no class here: kinds record, follow, host, instantiate."""

    kind: str
    values: dict[str, str]


_CLASSES = {
    "kernel": Kernel, "product": Product, "copy": Copy, "fill": Fill, "wait": Wait, "malloc": Allocation,
    "free": Freed, "pin": Pinned, "stream": Stream, "capture": Capture, "replay": Replay, "violation": Violation,
}  # fmt: skip
_READERS = {
    int: int,
    str: str,
    bool: lambda text: text != "0",
    tuple[int, ...]: lambda text: tuple(map(int, text.split(","))),
}


class Log:
    """The events of a run in their order, each with its phase; `log["decode"]` is the part of one phase.

    What comes before the first mark has the phase "". Properties with kernels and the like leave out what was only
    captured: `replays` says how often that ran.
    """

    def __init__(self, events, marks):
        self.events = tuple(events)  # (phase, event)
        self._marks = tuple(marks)  # (phase, bytes then in use by device) for each mark

    @classmethod
    def read(cls, file: Path) -> "Log":
        """The log of a program; ValueError names a line that is none of the stub's."""
        events, phase, in_use = [], "", {}
        marks = [(phase, {})]
        for line in file.read_text().splitlines():
            kind, *pairs = line.split("\t")
            values = dict(pair.split("=", 1) for pair in pairs)
            if kind == "mark":
                phase = values["name"]
                marks.append((phase, dict(in_use)))
                continue
            event = _event(kind, values, line)
            events.append((phase, event))
            if isinstance(event, Allocation):
                in_use[event.device] = event.in_use
        return cls(events, marks)

    def __getitem__(self, phase: str) -> "Log":
        """The events of a phase, or of all phases of that name; KeyError if it was never begun."""
        if phase not in self.phases:
            raise KeyError(f"{phase!r}: no such phase, there are {list(self.phases)}")
        events, marks = ([pair for pair in pairs if pair[0] == phase] for pairs in (self.events, self._marks))
        return Log(events, marks)

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that were begun, in their order."""
        return tuple(dict.fromkeys(phase for phase, _ in self._marks))

    def of(self, kind) -> list:
        """The events of a class, captured ones too."""
        return [event for _, event in self.events if type(event) is kind]

    def _ran(self, kind):
        return [event for event in self.of(kind) if not event.captured]

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that ran, without their template arguments."""
        return [kernel.short for kernel in self._ran(Kernel)]

    @property
    def products(self) -> list[Product]:
        """The matrix products that ran."""
        return self._ran(Product)

    def copies(self, direction: str | None = None) -> list[Copy]:
        """The copies that ran, of all directions or of one."""
        return [copy for copy in self._ran(Copy) if direction in (None, copy.direction)]

    def copied(self, direction: str | None = None) -> int:
        """The bytes of those copies."""
        return sum(copy.bytes for copy in self.copies(direction))

    @property
    def waits(self) -> list:
        """Where the host waited for a device: Wait, and each Copy that returns when it is done."""
        return [
            event for _, event in self.events if isinstance(event, Wait) or (isinstance(event, Copy) and event.waits)
        ]

    @property
    def allocations(self) -> list[Allocation]:
        """What was allocated on devices."""
        return self.of(Allocation)

    @property
    def pinned(self) -> list[Pinned]:
        """What was allocated on the host for devices to reach."""
        return self.of(Pinned)

    def peak(self, device: int = 0) -> int:
        """The most bytes that were in use on a device at one time."""
        found = [event.in_use for _, event in self.events if isinstance(event, Allocation) and event.device == device]
        return max([*found, *(in_use.get(device, 0) for _, in_use in self._marks)])

    @property
    def captures(self) -> list[Capture]:
        """Captures that began, ended or failed."""
        return self.of(Capture)

    @property
    def captured(self) -> list:
        """The work that was kept for replays."""
        return [event for _, event in self.events if isinstance(event, Placed) and event.captured]

    @property
    def replays(self) -> list[Replay]:
        """The launches of captured graphs."""
        return self._ran(Replay)

    @property
    def violations(self) -> list[Violation]:
        """Calls that CUDA forbids."""
        return self.of(Violation)

    @property
    def launches(self) -> int:
        """How often the host gave a device something to do: kernels, products, copies, fills and graphs."""
        return sum(len(self._ran(kind)) for kind in (Kernel, Product, Copy, Fill, Replay))

    @property
    def streams(self) -> set[tuple[int, int]]:
        """The streams that were given work, as (device, stream)."""
        return {(event.device, event.stream) for _, event in self.events if isinstance(event, Placed)}

    @property
    def devices(self) -> set[int]:
        """The devices that were given work, or whose memory was allocated, copied from or copied to."""
        named = {event.device for _, event in self.events if isinstance(event, (Placed, Allocation))}
        return named | {place for copy in self.of(Copy) for place in (copy.source, copy.target) if place >= 0}


def _event(kind, values, line):
    if kind not in _CLASSES:
        return Other(kind, values)
    try:
        found = {field.name: _READERS[field.type](values[field.name]) for field in fields(_CLASSES[kind])}
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a line of the stub's log: {line!r}") from error
    return _CLASSES[kind](**found)
