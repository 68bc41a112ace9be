"""The inputs that fuzzing starts from: small whole files, made here from tiny random models and the shipped one."""

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from PIL import Image
from safetensors.numpy import save

from export import bundle
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED, flatten, unflatten
from numpy_ref.checkpoint.hugging_face import resize_to_hf, to_hf
from numpy_ref.config import VARIANTS, GemmaConfig, PaliGemmaConfig, SiglipConfig
from numpy_ref.model import segmentation

from ..models import random_params

#: A model of some hundred weights.
TINY = PaliGemmaConfig(
    vision=SiglipConfig(image_size=4, patch_size=2, width=4, depth=1, mlp=3, heads=2),
    text=GemmaConfig(vocab=11, width=6, depth=1, mlp=5, heads=2, kv_heads=1, head_dim=2, query_scalar=2.0),
    image_token=11,
)
GEMMA2 = replace(TINY, text=replace(TINY.text, post_norms=True, attn_softcap=50.0))


def params(config) -> dict:
    """Random weights in float32."""
    return unflatten({path: array.astype(np.float32) for path, array in flatten(random_params(config)).items()})


def checkpoint_folder(folder: Path, config=TINY, shards=1) -> Path:
    """A Hugging Face directory of a tiny model, in as many shards."""
    with patch("numpy_ref.checkpoint.safetensors.SHARD", 10**9 if shards == 1 else 1500):
        checkpoint.save(folder, config, params(config))
    return folder


def whole_checkpoint(folder: Path) -> Path:
    """A checkpoint directory with all that travels along."""
    checkpoint_folder(folder, tokenizer_config())
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    (folder / "preprocessor_config.json").write_bytes(preprocessor()[0])
    (folder / "vae.npz").write_bytes(vae()[0])
    return folder


@cache
def tokenizer_model() -> bytes:
    """The shipped tokenizer, cut down to bytes, letters and a few tokens for places."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((SHIPPED / "tokenizer.model").read_bytes())
    kept = [piece for piece in model.pieces if not piece.piece.startswith(("<loc", "<seg"))][:400]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.vocab_size = len(kept)
    return model.SerializeToString()


@cache
def tokenizer_config() -> PaliGemmaConfig:
    """A tiny model with room for that tokenizer."""
    size = 1600
    return replace(TINY, text=replace(TINY.text, vocab=size), image_token=size - 1, max_length=60)


def bundle_folder(folder: Path, operators="fused", prepacked=False) -> Path:
    """A bundle of a tiny model with tokenizer and masks."""
    with TemporaryDirectory() as place:
        source = checkpoint_folder(Path(place) / "checkpoint", tokenizer_config())
        (source / "tokenizer.model").write_bytes(tokenizer_model())
        (source / "vae.npz").write_bytes(vae()[0])
        bundle.write(checkpoint.load(source), folder, operators=operators, prepacked=prepacked)
    return folder


def sealed(folder: Path, name: str, contents: bytes) -> None:
    """Replace a file of a bundle, and its checksum, as whoever makes a hostile bundle would."""
    (folder / name).write_bytes(contents)
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    description["files"][name] = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))


# --- seeds, by the name of the target ----------------------------------------------------------------------


def training() -> list[bytes]:
    """The state of a few steps of `targets.trained`."""
    from .targets import train

    with TemporaryDirectory() as place:
        return [train(Path(place) / "state.safetensors")]


def prepacked() -> list[bytes]:
    """What the graphs of a bundle say of repacked weights, an entry a line."""
    from .targets import entries

    with TemporaryDirectory() as place:
        folder = bundle_folder(Path(place) / "bundle", prepacked=True)
        lines = [pair.value for _, pair in entries(folder, "decode")[1]]
        return ["\n".join(lines).encode(), f"{lines[0].split('|')[0]}|0;16;0".encode()]


def options() -> list[bytes]:
    given = ["a.png", "caption en", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7"]
    more = [*given, "--max-new-tokens", "3", "--json", "--boxes", "huggingface", "--provider", "cpu"]
    return ["\0".join(each).encode() for each in (given, more)]


def drawing() -> list[bytes]:
    """Width and height, two bytes each, and an answer."""
    sizes = ((100, 80), (1, 2000), (3000, 1), (1, 1), (65535, 3))
    words = (
        b"<loc0010><loc0020><loc0900><loc1000>" + b"<seg001>" * 16 + b" star ; <loc0000><loc0000><loc0000><loc0000> x"
    )
    return [width.to_bytes(2, "big") + height.to_bytes(2, "big") + words for width, height in sizes]


def config() -> list[bytes]:
    configs = [TINY, GEMMA2, VARIANTS["paligemma-3b-224"], VARIANTS["paligemma2-3b-448"]]
    return [json.dumps(to_hf(each)).encode() for each in configs] + [b'{"model_type": "paligemma"}']


def preprocessor() -> list[bytes]:
    settings = [resize_to_hf(name, TINY.vision) for name in ("bicubic", "bilinear")]
    return [json.dumps(each).encode() for each in [*settings, {"image_processor": settings[0]}]]


def safetensors() -> list[bytes]:
    with TemporaryDirectory() as place:
        whole = (checkpoint_folder(Path(place) / "out") / "model.safetensors").read_bytes()
    return [whole, save({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.int8)}, {"format": "pt"})]


def index() -> list[bytes]:
    with TemporaryDirectory() as place:
        folder = checkpoint_folder(Path(place) / "out", shards=2)
        return [(folder / "model.safetensors.index.json").read_bytes()]


def npz() -> list[bytes]:
    files = []
    for each in (TINY, GEMMA2):
        with TemporaryDirectory() as place:
            checkpoint.save_npz(Path(place) / "model.npz", each, params(each))
            files.append((Path(place) / "model.npz").read_bytes())
    return [*files, _compressed(files[0])]


def _compressed(npz: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz)) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return made.getvalue()


@cache
def vae() -> list[bytes]:
    """A mask codec of two channels, whose layers have the shapes of big_vision's."""
    rng, table = np.random.default_rng(0), segmentation.names()
    shipped = segmentation.load(segmentation.find(SHIPPED))
    flat = {}
    for path, array in flatten(shipped).items():
        shape = tuple(min(size, 2) if 4 < size != 128 else size for size in array.shape)
        flat[table[path]] = rng.standard_normal(shape, np.float32)
    made = io.BytesIO()
    np.savez(made, **flat)
    return [made.getvalue()]


def tokenizer() -> list[bytes]:
    return [tokenizer_model()]


def tokenizer_json() -> list[bytes]:
    from numpy_ref.tokenizer.convert import tokenizer_json

    content = {"<loc0000>": 400, "<seg000>": 401}
    return [json.dumps(tokenizer_json(tokenizer_model(), content, 402)).encode()]


def description() -> list[bytes]:
    with TemporaryDirectory() as place:
        return [(bundle_folder(Path(place) / "out") / bundle.DESCRIPTION).read_bytes()]


def graph() -> list[bytes]:
    """Graphs of tiny bundles, behind the number of the graph."""
    seeds = []
    with TemporaryDirectory() as place:
        for operators, names in (("fused", GRAPHS), ("portable", GRAPHS[:2])):
            folder = bundle_folder(Path(place) / operators, operators)
            seeds += [bytes([GRAPHS.index(name)]) + (folder / f"{name}.onnx").read_bytes() for name in names]
    return seeds


GRAPHS = ("prefill", "decode", "masks", "preprocess", "sample")


def picture() -> list[bytes]:
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("PNG", plain, {"exif": exif}), ("JPEG", plain, {"exif": exif}), ("WEBP", plain, {}), ("GIF", plain, {}),
        ("BMP", plain, {}), ("TIFF", plain, {"exif": exif}), ("PPM", plain, {}), ("PNG", plain.convert("P"), {"transparency": 0}),
        ("PNG", plain.convert("RGBA"), {}), ("PNG", plain.convert("I;16"), {}), ("TIFF", plain.convert("F"), {}),
        ("TIFF", plain.convert("CMYK"), {"compression": "tiff_lzw"}), ("JPEG", plain.convert("CMYK"), {"progressive": True}),
        ("GIF", plain, {"save_all": True, "append_images": [plain.rotate(90)]}), ("ICO", plain, {}), ("TGA", plain, {}),
    ]  # fmt: skip
    seeds = []
    for kind, image, options in kinds:
        made = io.BytesIO()
        image.save(made, kind, **options)
        seeds.append(made.getvalue())
    return seeds


def grammar() -> list[bytes]:
    """Of each kind; patterns with all that they may have."""
    specs = [
        "detect", "detect:red star;日本", "segment:cat", "choice:yes|no|maybe not", "number",
        r"regex:([a-z]{2,5}|[^\dx]+)?\w*(\.\s\d{3}|é)+", "regex:.{0,20}", "regex:(a|b)*a(a|b){3}",
    ]  # fmt: skip
    return [spec.encode() for spec in specs]


def prompt() -> list[bytes]:
    texts = [
        "caption en",
        "detect red star ; blue circle",
        "<image><bos> <eos> <pad><unk>",
        "naïve ☕ 日本 ﬁ\t\n",
        "<loc0001><loc0002><loc0300><loc0400>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " cat ; dog",
        "<loc0001><loc0002><loc0300><loc0400>" + " " * 40 + ">",
    ]
    return [text.encode() for text in texts]


def prompt_file() -> list[bytes]:
    return [b"caption en\n", b"\xef\xbb\xbfcaption", b"\r\n", b"detect \xff"]


def json_lines() -> list[bytes]:
    line = {"image": "picture.png", "prefix": "caption en", "suffix": "a star"}
    return [json.dumps(line).encode() + b"\n" + json.dumps({**line, "suffix": "<loc0001>"}).encode() + b"\n"]


def coco() -> list[bytes]:
    thing = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 5, 60, 70]}
    mask = {"size": [224, 224], "counts": [100, 200, 49876]}
    rows = {
        "images": [{"id": 1, "file_name": "a.png", "width": 224, "height": 224}],
        "annotations": [
            {**thing, "segmentation": [[4, 5, 64, 5, 64, 75.5]]}, {**thing, "segmentation": mask},
            {**thing, "segmentation": {**mask, "counts": "Q3`0?0000"}, "iscrowd": 0},
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }  # fmt: skip
    return [json.dumps(rows).encode()]


def voc() -> list[bytes]:
    box = "<bndbox><xmin>4</xmin><ymin>5</ymin><xmax>60</xmax><ymax>70</ymax></bndbox>"
    size = "<size><width>224</width><height>224</height></size>"
    thing = f"<object><name>cat</name>{box}</object>"
    text = f"<annotation><filename>example.png</filename>{size}{thing}</annotation>"
    return [text.encode(), f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e "x">]>{text}'.encode()]


def parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet

    stream, pixels = io.BytesIO(), picture()[0]
    objects = [{"bbox": [[4.0, 5.0, 60.0, 70.0]], "category": ["cat"]}, None]
    columns = {"image": [{"bytes": pixels, "path": None}] * 2, "objects": objects, "answer": [None, "a star"]}
    pa.parquet.write_table(pa.table(columns), stream)
    return [stream.getvalue()]


def shard() -> list[bytes]:
    stream, fields = io.BytesIO(), json.dumps({"prefix": "what?", "suffix": "a star"}).encode()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, contents in [("a.png", picture()[0]), ("a.json", fields), ("b.png", picture()[0]), ("b.txt", b"x")]:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return [stream.getvalue()]


def request() -> list[bytes]:
    host = b"Host: 127.0.0.1:8000\r\n"
    return [
        b"GET /web/ HTTP/1.1\r\n" + host + b"\r\n",
        b"HEAD /bundle/bundle.json HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n",
        b"GET /web/../%2e%2e/etc/passwd HTTP/1.0\r\n" + host + b"\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 3\r\n\r\nabcGET /example.png HTTP/1.1\r\n" + host + b"\r\n",
    ]


SERVICE_PATHS = (b"/v1/chat/completions", b"/v1/answer")
BOUNDARY = b"boundary"


def service() -> list[bytes]:
    """Requests to serve-onnx: a path, or raw, and what is sent there."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 3}
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 4, "seed": 7, "n": 2, "stop": ["a", "bc"]}
    asked = {"logprobs": True, "top_logprobs": 3, "stream": True, "stream_options": {"include_usage": True}}
    rest = {"constrain": "number", "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}}
    bodies = [json.dumps({**chat, **more}).encode() for more in ({}, drawn, asked, {**drawn, **asked, **rest})]
    fields = {"prompt": b"ab", "temperature": b"1", "max_new_tokens": b"3", "seed": b"1", "boxes": b"huggingface"}
    line = b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = line % (BOUNDARY, b"image", b'; filename="a.png"', file.getvalue())
    form += b"".join(line % (BOUNDARY, name.encode(), b"", value) for name, value in fields.items())
    raw = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nConnection: close\r\n\r\n"
    forms = [form + b"--%s--\r\n" % BOUNDARY, form[: form.index(b"\r\n--")]]  # the second is cut off within its picture
    paths = [b"%s\n%s" % (SERVICE_PATHS[0], body) for body in bodies]
    paths += [b"%s\n%s" % (SERVICE_PATHS[1], form) for form in forms]
    return [*paths, b"raw\n" + raw]
