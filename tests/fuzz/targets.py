"""The readers: each target makes what it needs in a folder and returns read(data), which ends well or in PaliGemmaError."""

import contextlib
import copy
import io
import re
import resource
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from export import bundle, serve, session
from export.bundle import prepack
from numpy_ref import checkpoint, cli, detection, image, tokenizer
from numpy_ref import grammar as grammars
from numpy_ref.checkpoint import SHIPPED, flatten
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.model import sampling, segmentation
from numpy_ref.model.sampling import Sampling

from . import corpus, mutate

PICTURE = SHIPPED / "example.png"
GRAPH_ROOM = 2**30  # bytes
HANG = 30  # seconds until an answer of the service


@dataclass(frozen=True)
class Target:
    """What to fuzz: `prepare(folder) -> read(data)`, inputs to start from, and how one of them is changed."""

    prepare: object
    seeds: object
    mutate: object


def use(arrays) -> None:
    """Touch every byte, as a model would: a view that reaches past its file would crash here."""
    for array in arrays:
        array.tobytes()


def config(folder):
    """config.json."""

    def read(data):
        (folder / "config.json").write_bytes(data)
        checkpoint.parameters(checkpoint.load_config(folder))

    return read


def preprocessor(folder):
    """preprocessor_config.json and processor_config.json."""

    def read(data):
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).write_bytes(data)
            checkpoint.load_resize(folder, 4)
            (folder / name).unlink()

    return read


def safetensors(folder):
    """model.safetensors of a directory."""
    folder = corpus.checkpoint_folder(folder / "checkpoint")

    def read(data):
        (folder / "model.safetensors").write_bytes(data)
        use(flatten(checkpoint.load(folder).params).values())

    return read


def index(folder):
    """model.safetensors.index.json of a directory in shards."""
    folder = corpus.checkpoint_folder(folder / "checkpoint", shards=2)

    def read(data):
        (folder / "model.safetensors.index.json").write_bytes(data)
        use(flatten(checkpoint.load(folder).params).values())

    return read


def npz(folder):
    """A big_vision checkpoint."""

    def read(data):
        (folder / "model.npz").write_bytes(data)
        use(flatten(checkpoint.load(folder / "model.npz").params).values())

    return read


def vae(folder):
    """The mask codec."""

    def read(data):
        (folder / "vae.npz").write_bytes(data)
        segmentation.load(segmentation.find(folder))

    return read


TEXTS = ("caption en", "<image><bos> naïve\n<loc0001>")


def _speak(folder):
    """Load a folder's tokenizer and use it both ways."""
    config = corpus.tokenizer_config()
    speaker = tokenizer.Tokenizer.load(folder, config)
    for text in TEXTS:
        ids = speaker.encode(text)
        assert all(0 <= token < config.text.vocab for token in ids), ids
        assert config.image_token not in ids
        speaker.decode(ids)
    speaker.decode(range(-1, config.text.vocab + 1))
    speaker.known()


def tokenizer_model(folder):
    """tokenizer.model, and its translation to tokenizer.json."""
    from numpy_ref.tokenizer.convert import convert

    def read(data):
        (folder / "tokenizer.model").write_bytes(data)
        _speak(folder)
        convert(data, corpus.tokenizer_config())

    return read


def tokenizer_json(folder):
    """tokenizer.json."""

    def read(data):
        (folder / "tokenizer.json").write_bytes(data)
        _speak(folder)

    return read


CODES = np.zeros((1, 16), np.int64)


def answer(folder: Path, host_graphs: bool) -> None:
    """Two tokens and a mask from a bundle, as run-onnx has them."""
    engine, speaker = session.load(folder, "cpu", 1, host_graphs)
    speak(engine, speaker)
    if engine.masks:
        engine.masks(CODES)


def speak(engine, speaker) -> None:
    """Two tokens, from prefill and decode."""
    drawn = image.open_image(PICTURE)
    prepare = getattr(engine, "preprocess", None)
    pixels = prepare(drawn) if prepare else image.preprocess(drawn, engine.config.vision.image_size)
    for _ in generate(engine, pixels, [speaker.prompt("caption en")], speaker.known(), 2, Sampling(1.0)):
        pass


def description(folder):
    """bundle.json."""
    folder = corpus.bundle_folder(folder / "bundle")

    def read(data):
        (folder / bundle.DESCRIPTION).write_bytes(data)
        answer(folder, host_graphs=True)

    return read


def graph(folder):
    """The .onnx files of a bundle whose checksums were right. The first byte says which.

    A graph is a program and may ask for any memory. What there is to hold to is that where it does not get it, one line
    says so: the process is given GRAPH_ROOM more than it has.
    """
    engine, speaker = session.load(corpus.bundle_folder(folder / "bundle"), "cpu", 1, host_graphs=True)
    speak(engine, speaker)  # now all of its graphs are open
    limit_memory()
    drawn, logits = image.open_image(PICTURE), np.zeros((1, engine.config.text.vocab), np.float32)
    uses = {
        "prefill": lambda fresh: speak(fresh, speaker),
        "decode": lambda fresh: speak(fresh, speaker),
        "masks": lambda fresh: fresh._paint(CODES),
        "preprocess": lambda fresh: fresh.preprocess(drawn),
        "sample": lambda fresh: fresh.sample(logits, None, uniform=np.zeros(1, np.float32)),
    }

    def read(data):
        name = corpus.GRAPHS[data[0] % len(corpus.GRAPHS)] if data else "prefill"
        file = engine._file(name)
        whole = file.read_bytes()
        file.write_bytes(data[1:])
        try:
            fresh = copy.copy(engine)  # the one graph is opened anew, the others stay open
            vars(fresh)[f"_{name}"] = fresh._open(name, 1)
            uses[name](fresh)
        finally:
            file.write_bytes(whole)

    return read


def graph_change(data, rng):
    return data[:1] + mutate.message(onnx.ModelProto)(data[1:], rng)


def picture(folder):
    """Picture files."""

    def read(data):
        (folder / "picture").write_bytes(data)
        picture = image.open_image(folder / "picture")
        assert picture.mode == "RGB"
        image.preprocess(picture, 8)
        image.preprocess(picture, 8, resize="bilinear")

    return read


def prompt(folder):
    """Text of a user and of a model: tokenised, read for boxes, drawn."""
    config = checkpoint.load_config(SHIPPED)
    backends = [tokenizer.SentencePiece, tokenizer.Json]
    speakers = [tokenizer.Tokenizer(each((SHIPPED / each.FILE).read_bytes()), config) for each in backends]
    control = {config.image_token, config.bos, config.eos, config.pad}
    canvas = image.open_image(PICTURE).resize((64, 64))

    def read(data):
        text = data.decode("utf-8", "surrogateescape")  # as Python has the command line
        for speaker in speakers:
            ids = speaker.encode(text)
            assert not control & set(ids), ids
            speaker.decode(ids)
        boxes = detection.parse(text, 64, 64)
        detection.draw(canvas, boxes[:3], text[:200])

    return read


def grammar(folder):
    """--constrain: read, compiled, and held against the tokens of a model; text that it takes ends where it may."""
    speaker = tokenizer.Tokenizer.load(SHIPPED, checkpoint.load_config(SHIPPED))

    def read(data):
        found = grammars.Grammar(data.decode("utf-8", "surrogateescape"), speaker)
        state, left = grammars.State(), found.shortest(grammars.State()) + 3
        found.guess(state)
        while left and not found.is_complete(state):
            allowed = np.flatnonzero(found.allowed(state, left))
            token = int(allowed[len(data) % len(allowed)])
            if token in found.ends:
                break
            state, left = found.advance(state, token), left - 1
        assert found.shortest(state) == 0

    return read


def prompt_file(folder):
    """@FILE as a prompt."""

    def read(data):
        (folder / "prompt").write_bytes(data)
        cli.read_prompt(f"@{folder / 'prompt'}")

    return read


def json_lines(folder):
    """Examples to train on."""
    from torch_impl.train.data import JsonLines

    speaker = tokenizer.Tokenizer(tokenizer.SentencePiece(corpus.tokenizer_model()), corpus.tokenizer_config())
    shutil.copy(PICTURE, folder / "picture.png")

    def read(data):
        (folder / "lines.jsonl").write_bytes(data)
        lines = JsonLines(folder / "lines.jsonl", speaker, "bicubic", 0)
        for i in range(min(3, len(lines.rows))):
            lines[i]

    return read


def data_set(name):
    """A data set of others, in a file of this name, written as lines with boxes and with masks."""

    def prepare(folder):
        from numpy_ref.dataset import convert, rows

        (folder / "set").mkdir()
        for each in ("Annotations", "JPEGImages", "SegmentationObject"):
            (folder / "set" / each).mkdir()
        shutil.copy(PICTURE, folder / "set" / "a.png")
        shutil.copy(PICTURE, folder / "set" / "JPEGImages")
        file = folder / "set" / name
        codec = segmentation.load(segmentation.find(SHIPPED))

        def lines_of(task):
            shutil.rmtree(folder / "out", ignore_errors=True)
            source = folder / "set" if name.endswith(".xml") else file
            problem, options = convert.Problems(), rows.Options(task, spell=convert.speller(codec), prefix="caption en")
            with contextlib.redirect_stderr(io.StringIO()):
                found = convert.open_rows(source, None, options, True, problem)
                return convert.convert(found, folder / "out", problem)

        def read(data):
            file.write_bytes(data)
            with contextlib.suppress(PaliGemmaError):  # one without masks
                lines_of("segment")
            convert.preview(folder / "out", lines_of("detect"), None)

        return read

    return prepare


@dataclass
class _Server:
    server_port: int = 8000


def request(folder):
    """Bytes from a browser, or from what claims to be one."""
    (folder / "secret").write_text("secret of the folder above")
    (folder / "served").mkdir()
    (folder / "served" / "bundle.json").write_text("{}")
    file = folder / "served" / "bundle.json"
    files = {"/web/": serve.Served(file, "text/html"), "/bundle/bundle.json": serve.Served(file, "text/html", True, 2)}

    def read(data):
        browser, ours = socket.socketpair()
        with browser, ours, contextlib.suppress(ConnectionError), contextlib.redirect_stderr(io.StringIO()):
            browser.settimeout(10)
            browser.sendall(data[:60_000])
            browser.shutdown(socket.SHUT_WR)
            serve._Handler(files, ours, ("127.0.0.1", 1), _Server())
            ours.shutdown(socket.SHUT_WR)
            with browser.makefile("rb") as stream:
                answered = stream.read()
        assert b"secret" not in answered
        assert b"Traceback" not in answered
        assert answered.count(b"HTTP/1.1 200 OK\r\n") <= answered.count(b"X-Content-Type-Options: nosniff\r\n")

    return read


def trained():
    """A module of two weights, and its optimizers."""
    import torch

    from torch_impl.train import loop

    torch.manual_seed(0)
    model = torch.nn.Module()
    model.kernel = torch.nn.Parameter(torch.ones(3, 2))
    model.bias = torch.nn.Parameter(torch.ones(2))
    return model, loop.optimizers_for(model, loop.Settings(9, 1))


def train(file: Path) -> bytes:
    """The state after a step."""
    from torch_impl.train import loop

    model, optimizers = trained()
    (model.kernel.sum() + model.bias.sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    progress = {"step": 1, "curve": [[1, 0.1, 2.0, 0.1]], "recent": [2.0], "validation": [], "settings": {"steps": 9}}
    loop._save(file, model, optimizers, progress)
    return file.read_bytes()


def training(folder):
    """The state of training, taken up, and one step further."""
    from torch_impl.train import loop

    def read(data):
        model, optimizers = trained()
        (folder / loop.STATE).write_bytes(data)
        loop._resume(folder / loop.STATE, model, optimizers, {"steps": 9})
        (model.kernel.sum() + model.bias.sum()).backward()
        for optimizer in optimizers:
            optimizer.step()

    return read


def entries(folder, name):
    """A graph, and (tensor, entry) for what it says of repacked weights."""
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    tensors = model.graph.initializer
    return model, [(t, pair) for t in tensors for pair in t.external_data if pair.key.startswith(prepack.ENTRY)]


def prepacked(folder):
    """Where a stranger says that repacked weights are: opened and run as if its checksums were right."""
    folder = corpus.bundle_folder(folder / "bundle", prepacked=True)
    engine, speaker = session.load(folder, "cpu", 1)
    model, places = entries(folder, "decode")
    file = folder / "decode.onnx"

    def read(data):
        lines = data.decode("utf-8", "replace").split("\n")
        for i, (_, pair) in enumerate(places):
            pair.value = lines[i % len(lines)]
        file.write_bytes(model.SerializeToString())
        fresh = copy.copy(engine)
        fresh._decode = fresh._open("decode", 1)
        speak(fresh, speaker)

    return read


def options(folder):
    """Arguments of a command, as a user may mistype them."""

    def read(data):
        arguments = data.decode("utf-8", "surrogateescape").split("\0")
        with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(io.StringIO()):
            chosen = None
            with contextlib.suppress(SystemExit):
                chosen = cli.parser("program", "MODEL", "").parse_intermixed_args(arguments)
        assert all(line.isprintable() and len(line) <= 2000 for line in printed.getvalue().splitlines()[-1:])
        if chosen is None:
            return
        logits, uniform = np.array([[0, 3e38, -3e38]], np.float32), np.zeros(1, np.float32)
        with np.errstate(all="raise", under="ignore"):
            sampling.sample(logits / 1e30, np.ones(3, bool), chosen.temperature, chosen.top_k, chosen.top_p, uniform)

    return read


def drawing(folder):
    """Pictures of any shape, and an answer drawn over them."""

    def read(data):
        width, height = (max(1, int.from_bytes(data[i : i + 2], "big")) for i in (0, 2))
        if width * height > 10**6:
            height = max(1, 10**6 // width)
        canvas, text = Image.new("RGB", (width, height)), data[4:].decode("utf-8", "replace")
        boxes = detection.parse(text, width, height)[:3]
        drawn = detection.draw(canvas, boxes, text[:200])
        assert drawn.width * drawn.height < 10**8

    return read


def sizes(folder):
    """bundle.json with any sizes, where the process is given GRAPH_ROOM more than it has: MemoryError is a finding."""
    read = description(folder)
    read((folder / "bundle" / bundle.DESCRIPTION).read_bytes())
    limit_memory()
    return read


def change_sizes(data, rng):
    """Some numbers of a description anew, of any magnitude."""

    def number(match):
        return str(rng.randrange(2 ** rng.randrange(1, 65))).encode() if rng.random() < 0.03 else match[0]

    return re.sub(rb"(?<=[ \[])\d+(?=[,\]\n])", number, data)


def limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GRAPH_ROOM, resource.RLIM_INFINITY))


def service(folder):
    """Requests to serve-onnx, whose model is tiny: the first line says to which path, or that all else is sent raw.

    Each has to be answered in JSON, by no fault of the service, and to leave no slot and no room in the queue taken.
    """
    from export.service.app import Options
    from export.service.backend import Backend, Load, LocalLink
    from export.service.limits import Limits
    from export.service.worker import Settings

    from ..served import running

    bundled = bundle.load(corpus.bundle_folder(folder / "bundle"))
    backend = Backend([LocalLink(Load(bundled, "cpu", threads=1, settings=Settings(2, 64)))])
    context = running(backend, Options("tiny", Limits(body_bytes=2**20, body_s=5, request_s=20), logs=False))
    port = int(context.__enter__().rpartition(":")[2])
    scheduler = backend.links[0].worker.scheduler

    def read(data):
        line, _, body = data.partition(b"\n")
        if line not in corpus.SERVICE_PATHS:
            sent = body
        else:
            kind = (
                b"multipart/form-data; boundary=%s" % corpus.BOUNDARY if line == b"/v1/answer" else b"application/json"
            )
            head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
            sent = head % (line, kind, len(body)) + body
        with socket.create_connection(("127.0.0.1", port), timeout=HANG) as connection:
            with contextlib.suppress(ConnectionError):  # it may answer, and close, before it was sent all
                connection.sendall(sent)
                if line not in corpus.SERVICE_PATHS:
                    connection.shutdown(socket.SHUT_WR)
            answered = b""
            with contextlib.suppress(ConnectionError):
                answered = connection.makefile("rb").read()
        assert b"Traceback" not in answered
        assert b"something went wrong in the service" not in answered, answered
        assert b"could not be prepared" not in answered, answered
        assert b"failed to answer" not in answered, answered
        assert str(folder).encode() not in answered
        if line in corpus.SERVICE_PATHS:
            assert answered.startswith(b"HTTP/1.1 "), answered
        end = time.monotonic() + HANG
        while backend.busy or scheduler.live or scheduler.waiting:
            assert time.monotonic() < end, "a slot is lost"
            time.sleep(0.001)

    read.service = context  # which would end with it
    return read


def service_change(data, rng):
    """The first line stays, mostly."""
    line, _, body = data.partition(b"\n")
    if rng.random() < 0.05:
        return mutate.raw(data, rng)
    change = mutate.json_text if body[:1] == b"{" and rng.random() < 0.7 else mutate.raw
    return line + b"\n" + change(body, rng)


TARGETS = {
    "config": Target(config, corpus.config, mutate.json_text),
    "preprocessor": Target(preprocessor, corpus.preprocessor, mutate.json_text),
    "safetensors": Target(safetensors, corpus.safetensors, mutate.safetensors),
    "index": Target(index, corpus.index, mutate.json_text),
    "npz": Target(npz, corpus.npz, mutate.archive),
    "vae": Target(vae, corpus.vae, mutate.archive),
    "tokenizer.model": Target(tokenizer_model, corpus.tokenizer, mutate.message(sentencepiece_model_pb2.ModelProto)),
    "tokenizer.json": Target(tokenizer_json, corpus.tokenizer_json, mutate.json_text),
    "bundle.json": Target(description, corpus.description, mutate.json_text),
    "graph": Target(graph, corpus.graph, graph_change),
    "picture": Target(picture, corpus.picture, mutate.picture),
    "prompt": Target(prompt, corpus.prompt, mutate.raw),
    "grammar": Target(grammar, corpus.grammar, mutate.raw),
    "prompt_file": Target(prompt_file, corpus.prompt_file, mutate.raw),
    "json_lines": Target(json_lines, corpus.json_lines, mutate.json_lines),
    "request": Target(request, corpus.request, mutate.raw),
    "training": Target(training, corpus.training, mutate.safetensors),
    "prepacked": Target(prepacked, corpus.prepacked, mutate.raw),
    "options": Target(options, corpus.options, mutate.raw),
    "drawing": Target(drawing, corpus.drawing, mutate.raw),
    "coco": Target(data_set("rows.json"), corpus.coco, mutate.json_text),
    "voc": Target(data_set("Annotations/a.xml"), corpus.voc, mutate.raw),
    "parquet": Target(data_set("rows.parquet"), corpus.parquet, mutate.raw),
    "shard": Target(data_set("rows.tar"), corpus.shard, mutate.raw),
    "sizes": Target(sizes, corpus.description, change_sizes),
    "service": Target(service, corpus.service, service_change),
}
