"""Changing an input a little, knowing its format: (bytes, random.Random) -> bytes.

Bytes changed blindly stop at a checksum or a parser. These keep the envelope whole (a JSON text that parses, a zip whose
CRCs are right) and spoil what it holds.
"""

import copy
import io
import json
import struct
import warnings
import zipfile
import zlib

#: Spliced in by `raw`: what a parser of some format stumbles over.
WORDS = [
    b"\0", b"\xff" * 4, b"\x80", b"<image>", b"<bos>", b"<loc0000>", b"<seg000>", b"<loc9999>", b"@", b"../", b"\n",
    b" " * 64, "▁".encode(), b"\xed\xa0\x80", b"\x1b[2J", b'"', b"[" * 40, b"{}", b"9" * 30, b"1e999", b"NaN",
    struct.pack("<Q", 2**63), struct.pack("<I", 2**31), b"\r\nHost: x\r\n", b"HTTP/1.1", b"%2e%2e%2f",
]  # fmt: skip
#: What a JSON value may turn into.
VALUES = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**31 - 1, 2**63, 10**40, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "x", "../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J", "\ud800", "\0", "x" * 300, "F32", "config.json", [], {}, [[]], [0, 1],
    {"a": 1},
]  # fmt: skip


def raw(data: bytes, rng) -> bytes:
    """One to four changes anywhere: bits, bytes, words, cuts, repeats."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        length = min(rng.choice([1, 1, 2, 4, 8, 64, 500]), len(data) - place)
        kind = rng.randrange(6)
        if kind == 0 and length:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and length:
            data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            data[place : place + rng.choice([0, length])] = rng.choice(WORDS)
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length] * rng.choice([1, 2, 30])
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def json_text(data: bytes, rng) -> bytes:
    """A JSON text with one to three of its values replaced, removed, renamed or repeated."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return raw(data, rng)
    for _ in range(rng.randint(1, 3)):
        tree = _spoil(tree, rng)
    return json.dumps(tree).encode()


def _spoil(tree, rng):
    """A tree with one place changed, found by going down at random."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(VALUES))  # it may be spoiled next
    key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
    change = rng.random()
    if change < 0.7:
        tree[key] = _spoil(tree[key], rng)
    elif change < 0.8:
        del tree[key]
    elif isinstance(tree, list):
        tree.append(copy.deepcopy(tree[key]))
    else:
        tree[rng.choice([*tree, str(rng.choice(VALUES))])] = copy.deepcopy(tree[key])
    return tree


def json_lines(data: bytes, rng) -> bytes:
    """One line of a JSONL file spoiled as JSON."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = json_text(lines[place], rng)
    return b"\n".join(lines)


def safetensors(data: bytes, rng) -> bytes:
    """A safetensors file whose header is spoiled as JSON and has its right length."""
    size = int.from_bytes(data[:8], "little")
    header = json_text(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def archive(data: bytes, rng) -> bytes:
    """A zip with one member's bytes or name changed, and right CRCs."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            members = [(info.filename, source.read(info), info.compress_type) for info in source.infolist()]
    except Exception:  # zipfile has a dozen kinds
        return raw(data, rng)
    if not members:
        return raw(data, rng)
    place = rng.randrange(len(members))
    name, contents, compression = members[place]
    kind = rng.randrange(6)
    if kind == 0:
        name = rng.choice([f"../../{name}", f"/{name}", name[:-4], members[0][0], f"params/{name}"])
    elif kind == 1:
        compression = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    elif kind < 4:  # the header alone, where all decisions are
        contents = raw(contents[:128], rng) + contents[128:]
    else:
        contents = raw(contents, rng)
    members[place] = name, contents, compression
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as target:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name, contents, compression in members:
            target.writestr(zipfile.ZipInfo(name), contents, compression)
    return made.getvalue()


def picture(data: bytes, rng) -> bytes:
    """A picture; of a PNG one chunk is spoiled, and its CRC is right."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return raw(data, rng)
    chunks, place = [], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    if chunks:
        place = rng.randrange(len(chunks))
        kind, contents = chunks[place]
        chunks[place] = kind, raw(contents, rng)
        if rng.random() < 0.2:
            chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return data[:8] + b"".join(_chunk(kind, contents) for kind, contents in chunks)


def _chunk(kind, contents):
    crc = struct.pack(">I", zlib.crc32(kind + contents))
    return struct.pack(">I", len(contents)) + kind + contents + crc


def message(kind):
    """A changer of serialized protocol buffers of a message type: one to three fields set, cleared or repeated."""

    def change(data: bytes, rng) -> bytes:
        tree = kind()
        try:
            tree.ParseFromString(data)
            for _ in range(rng.randint(1, 3)):
                _spoil_message(tree, rng)
            return tree.SerializeToString()
        except Exception:  # not of this type, or now too odd to be written
            return raw(data, rng)

    return change


def _spoil_message(tree, rng):
    fields = tree.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    repeated = hasattr(value, "append") or hasattr(value, "add")
    place = rng.randrange(len(value)) if repeated else None
    if field.type == field.TYPE_MESSAGE and rng.random() < 0.85:
        _spoil_message(value[place] if repeated else value, rng)
    elif rng.random() < 0.15:
        tree.ClearField(field.name)
    elif repeated and rng.random() < 0.2:
        del value[place]
    elif field.type == field.TYPE_MESSAGE:
        if repeated:
            value.add().CopyFrom(value[place])
    else:
        new = _scalar(field, value[place] if repeated else value, rng)
        if repeated:
            value[place] = new
        else:
            setattr(tree, field.name, new)


def _scalar(field, value, rng):
    """Another value for a field that is not a message."""
    if field.type == field.TYPE_BYTES:
        return raw(value, rng)
    if field.type == field.TYPE_STRING:
        return raw(value.encode(), rng).decode("utf-8", "replace")
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice([0.0, -1.0, 1e38, float("inf"), float("nan")])
    return rng.choice([0, 1, 2, value ^ 1, value + 1, 127, 2**31 - 1])
