"""Data sets: which rows a folder, a JSONL file and a parquet file have, read from anywhere."""

import json
import pickle
import sys
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from export.batch.dataset import Row, open_dataset
from numpy_ref.errors import PaliGemmaError


def png(color=(1, 2, 3)):
    stream = BytesIO()
    Image.new("RGB", (3, 2), color).save(stream, "png")
    return stream.getvalue()


def opened(path, prompt="caption en"):
    """A data set as another process gets it."""
    return pickle.loads(pickle.dumps(open_dataset(path, prompt)))


def questions(rows):
    return [(row.number, row.image_name, row.prompt) for row in rows.read(0, len(rows))]


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_a_folder_holds_its_pictures(tmp_path):
    for name in ("b.png", "A.JPG", "sub/c.webp", "notes.txt", ".hidden.png", ".git/d.png", "sub/.e.png", "paper.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "folder.png").mkdir()
    rows = opened(tmp_path)
    assert questions(rows) == [(0, "A.JPG", None), (1, "b.png", None), (2, "sub/c.webp", None)]
    assert rows.read(2, 9)[0].picture().size == (3, 2)
    assert rows.left_out == ["notes.txt", "paper.pdf"]


def test_a_folder_that_changes(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    digests = [opened(tmp_path).digest]
    assert opened(tmp_path).digest == digests[0]
    (tmp_path / "a.png").write_bytes(png() + b"more")
    digests.append(opened(tmp_path).digest)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    digests.append(opened(tmp_path).digest)
    assert len(set(digests)) == 3


def test_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = ['\ufeff{"image": "a\u2028.png", "prompt": "one", "prefix": "not this"}', "", ' {"image": "ü.png", "prefix": "two"}\r',
             '{"image": "c", "prompt": null, "prefix": "three", "suffix": "x"}', "   ", '{"image": null}']  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    rows = opened(file)
    assert questions(rows) == [(0, "a\u2028.png", "one"), (1, "ü.png", "two"), (2, "c", "three"), (3, None, None)]
    assert [row.number for row in rows.read(2, 4)] == [2, 3]
    assert rows.read(4, 9) == []
    digest = rows.digest
    file.write_text(file.read_text(encoding="utf-8").replace("one", "eno"), encoding="utf-8")
    assert opened(file).digest != digest


@pytest.mark.parametrize(
    "line", ['{"image": "a.png"', "[]", '{"picture": "a.png"}', "\0", "9" * 5000, '"image"', "[" * 99999]
)
def test_a_line_that_is_no_row(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "a.png"}\n\n' + line + "\n")
    with pytest.raises(PaliGemmaError, match=r'rows.jsonl, line 3: not an object with "image"'):
        open_dataset(file, "caption en")


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_parquet_is_read_from_anywhere(tmp_path, size):
    """Rows of any order of requests, across row groups and the batches that they are read in."""
    count = 41
    columns = {
        "image": [f"{i}.png" for i in range(count)],
        "prefix": [f"p{i}" if i % 3 else None for i in range(count)],
    }
    rows = opened(parquet(tmp_path / "rows.parquet", columns, row_group_size=size))
    assert len(rows) == count
    expected = [(i, f"{i}.png", f"p{i}" if i % 3 else None) for i in range(count)]
    assert questions(rows) == expected
    starts = np.random.default_rng(size).integers(0, count, 60)
    for start in [*starts.tolist(), 5, 6, 6, 5, 40, 0, 41]:
        read = [(row.number, row.image_name, row.prompt) for row in rows.read(start, start + 5)]
        assert read == expected[start : start + 5]
    assert pickle.loads(pickle.dumps(rows)).read(7, 8)[0].number == 7  # after reading, too


def test_pictures_of_a_parquet_file(tmp_path):
    (tmp_path / "there.png").write_bytes(png((9, 9, 9)))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    structs = [{"bytes": png((5, 5, 5)), "path": "named.png"}, {"bytes": None, "path": "there.png"}, {"bytes": png(), "path": None},
               {"bytes": None, "path": None}, None, {"bytes": b"junk", "path": None}]  # fmt: skip
    rows = opened(parquet(tmp_path / "structs.parquet", {"image": pa.array(structs, kind)})).read(0, 9)
    assert [row.image_name for row in rows] == ["named.png", "there.png", None, None, None, None]
    assert [row.picture().getpixel((0, 0))[0] for row in rows[:3]] == [5, 9, 1]
    for row, words in zip(
        rows[3:], ("row 3 has no picture", "row 4 has no picture", "picture of row 5: not a picture"), strict=True
    ):
        with pytest.raises(PaliGemmaError, match=words):
            row.picture()
    (row,) = opened(parquet(tmp_path / "bytes.parquet", {"image": [png()], "prompt": ["one"]})).read(0, 1)
    assert (row.image_name, row.prompt, row.picture().size) == (None, "one", (3, 2))


def test_parquet_files_that_are_none(tmp_path):
    with pytest.raises(PaliGemmaError, match="no column image; it has picture, prompt"):
        open_dataset(parquet(tmp_path / "a.parquet", {"picture": ["a"], "prompt": ["b"]}), None)
    whole = parquet(tmp_path / "b.parquet", {"image": ["a"]}).read_bytes()
    for contents in (b"", b"junk" * 9, whole[:-9]):
        (tmp_path / "c.parquet").write_bytes(contents)
        with pytest.raises(PaliGemmaError, match=r"c\.parquet: cannot read it"):
            open_dataset(tmp_path / "c.parquet", "caption en")
    damaged = bytearray(whole)
    damaged[4:40] = b"\xff" * 36
    (tmp_path / "d.parquet").write_bytes(damaged)
    with pytest.raises(PaliGemmaError, match=r"d\.parquet: cannot read it"):
        open_dataset(tmp_path / "d.parquet", "caption en").read(0, 1)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    file = parquet(tmp_path / "a.parquet", {"image": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(PaliGemmaError, match=r"needs pyarrow \(the extra `parquet`\): pip install pyarrow$"):
        open_dataset(file, "caption en")


def test_rows_need_a_prompt_from_somewhere(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.jsonl").write_text('{"image": "a", "prompt": "b"}\n{"image": "a"}\n')
    for path, where in ((tmp_path, ""), (tmp_path / "a.jsonl", ", line 2"),
                        (parquet(tmp_path / "a.parquet", {"image": ["a"]}), "")):  # fmt: skip
        with pytest.raises(PaliGemmaError, match=f"{path}{where}: no prompt, .*--prompt"):
            open_dataset(path, None)
    assert questions(opened(parquet(tmp_path / "b.parquet", {"image": ["a"], "prompt": ["c"]}), None)) == [
        (0, "a", "c")
    ]


@pytest.mark.parametrize("name", ["empty", "empty.jsonl", "empty.parquet", "absent.jsonl", "absent", "rows.csv"])
def test_no_data_set(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    parquet(tmp_path / "empty.parquet", {"image": pa.array([], pa.string())})
    (tmp_path / "rows.csv").write_text("image\n")
    words = {"absent": "no such folder or file", "rows": "a folder, FILE.jsonl or", "empty": "no pictures in it"}
    with pytest.raises(PaliGemmaError, match=rf"{name}: {words[name.split('.')[0]]}"):
        open_dataset(tmp_path / name, "caption en")


def test_lines_that_change_while_they_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({'image': 'a.png'})}\n" * 2)
    rows = open_dataset(file, "caption en")
    file.write_text("\n" * 40)
    with pytest.raises(PaliGemmaError, match="was changed while it was read"):
        rows.read(1, 2)


@pytest.mark.parametrize(("own", "default", "asked"), [("a", "b", "a"), (None, "b", "b"), (" ", "b", None), (7, "b", None), (None, None, None)])  # fmt: skip
def test_whose_prompt(tmp_path, own, default, asked):
    row = Row(3, tmp_path, "a.png", own)
    if asked:
        assert row.question(default) == asked
    else:
        with pytest.raises(PaliGemmaError, match="row 3 has no prompt"):
            row.question(default)
