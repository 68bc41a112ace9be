"""bundle.json: what a bundle is, for hosts in any language; read with one check a field."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from numpy_ref.checkpoint.hugging_face import from_hf, to_hf
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError, quote
from numpy_ref.image import RESIZES

from ..model.layers import FUSED, PORTABLE
from . import weights

FORMAT = "paligemma-onnx"
VERSION = 1
GRAPHS = ("prefill", "decode", "preprocess", "sample")  # that every bundle has
_REQUIRED = object()  # the default of a field that has none


@dataclass(frozen=True)
class Tokens:
    """The token ids that a host needs; `known` are those that may be drawn, as [first, past the last] pairs."""

    image: int
    image_tokens: int  # how many stand for a picture
    bos: int
    eos: int
    stops: list[int]  # which tokens end an answer; eos alone in older bundles
    pad: int
    newline: list[int] | None  # None where there is no tokenizer
    known: list[list[int]]


@dataclass(frozen=True)
class Image:
    """What a picture is made into: `size` pixels square, then (x / 255 - mean) / std."""

    size: int
    resize: str
    mean: float
    std: float


@dataclass(frozen=True)
class Value:
    """An input or output of a graph; names in its shape stand for free sizes."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Graph:
    """One ONNX file and what it takes and gives."""

    file: str
    inputs: list[Value]
    outputs: list[Value]


@dataclass(frozen=True)
class File:
    """What a file of the bundle has to be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Calibration:
    """What weights in four bits were rounded by: how many rows, and the SHA-256 of their pictures and ids."""

    rows: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """The contents of bundle.json, in the order in which they stand there."""

    producer: str
    precision: str
    operators: str
    residual: str | None  # the dtype of the residual stream; None in older bundles
    max_length: int
    config: PaliGemmaConfig  # in the file as Hugging Face's config.json
    tokens: Tokens
    prompt: str
    image: Image
    opset: int
    graphs: dict[str, Graph]
    files: dict[str, File]
    parity: list[dict] | None = None  # the table of --verify
    prepacked: str | None = None  # the processor whose kernels the weights are repacked for
    calibration: Calibration | None = None

    @classmethod
    def from_json(cls, data: object, source: object) -> "Description":
        """From the parsed file; fields that are not known are ignored.

        Raises PaliGemmaError that names `source`, the first field that is wrong, what it is and what it has to be.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PaliGemmaError(f"{source} does not describe a {FORMAT} bundle; export-onnx makes one")
        if data.get("version") != VERSION:
            found = quote(data.get("version"))
            raise PaliGemmaError(f"{source}: bundle version {found}, but this program reads {VERSION}; export it again")
        fields = _Fields(data, source)
        config = _config(fields)
        description = cls(
            producer=fields.text("producer"),
            precision=fields.choice("precision", weights.PRECISIONS),
            operators=fields.choice("operators", (PORTABLE, FUSED), default=PORTABLE),
            residual=fields.choice("residual", tuple(weights.FLOATS), default=None),
            max_length=fields.whole("max_length", 1, config.max_length),
            config=config,
            tokens=_tokens(fields.object("tokens")),
            prompt=fields.text("prompt"),
            image=_image(fields.object("image")),
            opset=fields.whole("opset", 1),
            graphs=_graphs(fields.object("graphs")),
            files={name: _file(file) for name, file in fields.object("files").objects()},
            parity=data.get("parity"),
            prepacked=fields.text("prepacked", default=None),
            calibration=_calibration(fields.object("calibration")) if data.get("calibration") is not None else None,
        )
        listed = {weights.FILE, *(graph.file for graph in description.graphs.values())}
        if missing := listed - description.files.keys():
            names = ", ".join(sorted(missing))
            raise PaliGemmaError(f"{source} lists no checksum for {names}; export the bundle again")
        return description

    def to_json(self) -> dict:
        """What `from_json` reads."""
        fields = asdict(self) | {"config": to_hf(self.config)}
        absent = {name for name in ("residual", "prepacked", "calibration") if fields[name] is None}
        fields = {name: value for name, value in fields.items() if name not in absent}
        return {"format": FORMAT, "version": VERSION, **fields}


def _config(fields) -> PaliGemmaConfig:
    config = fields.object("config").values
    try:
        return from_hf(config)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{fields.source}: {error}") from None


def _tokens(fields) -> Tokens:
    ids = {name: fields.whole(name) for name in ("image", "image_tokens", "bos", "eos", "pad")}
    return Tokens(
        **ids,
        stops=fields.check("stops", "a list of token ids", _are_ids, default=[ids["eos"]]),
        newline=fields.check("newline", "a list of token ids", _are_ids, default=None),
        known=fields.check("known", "a list of [first, past the last] pairs", _are_ranges),
    )


def _image(fields) -> Image:
    resize = fields.choice("resize", tuple(RESIZES))
    return Image(fields.whole("size", 1), resize, fields.number("mean"), fields.number("std"))


def _graphs(fields) -> dict[str, Graph]:
    for name in GRAPHS:
        fields.object(name)
    return {name: _graph(graph) for name, graph in fields.objects()}


def _graph(fields) -> Graph:
    inputs, outputs = ([_value(value) for value in fields.list(key)] for key in ("inputs", "outputs"))
    return Graph(fields.text("file"), inputs, outputs)


def _value(fields) -> Value:
    shape = fields.check("shape", "a list of sizes and names", _is_shape)
    return Value(fields.text("name"), fields.text("dtype"), shape)


def _file(fields) -> File:
    return File(fields.whole("bytes"), fields.text("sha256"))


def _calibration(fields) -> Calibration:
    return Calibration(fields.whole("rows", 1), fields.text("sha256"))


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_ranges(value) -> bool:
    return isinstance(value, list) and all(_are_ids(pair) and len(pair) == 2 for pair in value)


def _is_shape(value) -> bool:
    return isinstance(value, list) and all(_is_whole(size) or isinstance(size, str) for size in value)


class _Fields:
    """A JSON object whose fields are checked as they are taken; `name` is where it stands, such as graphs.decode."""

    def __init__(self, values: dict, source, name: str = ""):
        self.values, self.source, self.name = values, source, name

    def check(self, key, what: str, is_right: Callable[[object], bool], default=_REQUIRED):
        """The value of a field, which has to be `what`. A `default` is for one that is absent, or null."""
        value, name = self.values.get(key), self._name_of(key)
        if value is None and default is not _REQUIRED:
            return default
        if key not in self.values:
            self._refuse(f"{name} is missing")
        if not is_right(value):
            self._refuse(f"{name} is {quote(value)}, not {what}")
        return value

    def text(self, key, default=_REQUIRED) -> str:
        return self.check(key, "text", lambda value: isinstance(value, str), default)

    def whole(self, key, least=0, most=None, default=_REQUIRED) -> int:
        what = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
        return self.check(
            key, what, lambda value: _is_whole(value) and least <= value and (most is None or value <= most), default
        )

    def number(self, key) -> float:
        return self.check(key, "a number", lambda value: _is_whole(value) or isinstance(value, float))

    def choice(self, key, known: tuple[str, ...], default=_REQUIRED) -> str:
        return self.check(key, f"one that this program has ({', '.join(known)})", known.__contains__, default)

    def object(self, key) -> "_Fields":
        values = self.check(key, "an object", lambda value: isinstance(value, dict))
        return _Fields(values, self.source, self._name_of(key))

    def objects(self) -> Iterator[tuple[str, "_Fields"]]:
        """All fields by name, each an object."""
        return ((key, self.object(key)) for key in self.values)

    def list(self, key) -> Iterator["_Fields"]:
        """The objects of a list."""
        values = self.check(key, "a list", lambda value: isinstance(value, list))
        return (each for _, each in _Fields(dict(enumerate(values)), self.source, self._name_of(key)).objects())

    def _name_of(self, key) -> str:
        return f"{self.name}.{key}" if self.name else key

    def _refuse(self, reason):
        raise PaliGemmaError(f"{self.source} is damaged ({reason}); export the bundle again")
