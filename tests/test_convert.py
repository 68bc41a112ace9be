"""Data sets of others: what is read of them, what a bad row says, and that nothing is read or written elsewhere."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from numpy_ref import detection
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.dataset import __main__ as command
from numpy_ref.dataset import coco, rows, voc
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import segmentation

WIDTH, HEIGHT = 40, 30


def png(color=(1, 2, 3), size=(WIDTH, HEIGHT)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "png")
    return stream.getvalue()


def convert(source, output, *options, capsys):
    """The command's exit code, its lines on stderr, and the rows that it wrote (None if it wrote none)."""
    code = run(command.PROG, command.main, ["convert", str(source), "--output", str(output), *map(str, options)])
    printed = capsys.readouterr()
    file = output / "rows.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else None
    return code, printed.err.splitlines(), found


# --- COCO --------------------------------------------------------------------------------------------------

DOG, CAT = [20, 6, 10, 12], [4, 3, 8, 15]  # x, y, width, height
SQUARE = [4, 3, 12, 3, 12, 18, 4, 18]


def coco_file(folder, **changes):
    """One picture with a dog and a cat in it, one with nothing, one with a crowd."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "c.png"):
        (folder / "images" / name).write_bytes(png())
    size = {"width": WIDTH, "height": HEIGHT}
    found = {
        "images": [{"id": i, "file_name": f"{name}.png", **size} for i, name in enumerate("abc")],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "big  dog"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 9, "bbox": DOG, "iscrowd": 0,
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": [606, 12, *[18, 12] * 9, 312]}},
            {"id": 2, "image_id": 0, "category_id": 7, "bbox": CAT, "segmentation": [SQUARE]},
            {"id": 3, "image_id": 2, "category_id": 7, "bbox": CAT, "iscrowd": 1},
        ],
    }  # fmt: skip
    file = folder / "labels.json"
    file.write_text(json.dumps(found | changes))
    return file


def fractions(x, y, width, height):
    return x / WIDTH, y / HEIGHT, (x + width) / WIDTH, (y + height) / HEIGHT


def test_coco_boxes(tmp_path, capsys):
    """From left to right; a row a picture with something in it, or a row each that asks for every label."""
    file = coco_file(tmp_path / "set")
    code, errors, found = convert(file, tmp_path / "out", "--draw", tmp_path / "drawn.png", capsys=capsys)
    answer = f"{detection.encode(*fractions(*CAT))} cat ; {detection.encode(*fractions(*DOG))} big dog"
    assert (code, errors) == (0, [])
    assert found == [{"image": "../set/images/a.png", "prefix": "detect cat ; big dog", "suffix": answer}]
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.width == 320
    _, _, found = convert(file, tmp_path / "all", "--all-labels", capsys=capsys)
    assert [row["prefix"] for row in found] == ["detect cat ; big dog"] * 3
    assert [row["suffix"] for row in found] == [answer, "", ""]


def test_coco_masks(tmp_path, capsys):
    """Polygons and run lengths: what the tokens stand for is painted where the thing is."""
    _, errors, found = convert(
        coco_file(tmp_path / "set"), tmp_path / "out", "--task", "segment", "--draw", tmp_path / "out.png",
        capsys=capsys,
    )  # fmt: skip
    assert not errors
    assert [row["prefix"] for row in found] == ["segment cat", "segment big dog"]
    codec = segmentation.load(segmentation.find(SHIPPED))
    for row, (x, y, width, height) in zip(found, (CAT, DOG), strict=True):
        (box,) = detection.parse(row["suffix"], WIDTH, HEIGHT)
        painted = segmentation.paste(segmentation.decode(codec, np.array([box.codes]))[0], box.corners, WIDTH, HEIGHT)
        truth = np.zeros((HEIGHT, WIDTH), bool)
        truth[y : y + height, x : x + width] = True
        assert (painted & truth).sum() / (painted | truth).sum() > 0.8


def test_run_lengths_as_pycocotools_writes_them():
    """Recorded from pycocotools 2.0, whose decoder agreed with ours for 300 random masks."""
    mask = np.zeros((31, 47), bool)
    mask[4:20, 3:40], mask[9:12, 10:45], mask[25:, 46] = True, False, True
    recorded = "Q3`0?000000000000ED3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3<MD3k6N"
    assert np.array_equal(coco.mask_of({"size": [31, 47], "counts": recorded}, 47, 31), mask)


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        ([[1, 2, 3]], "not three points"), ([[1, 2, 3, 4, 5, "x"]], "not three points"),
        ([[1, 2, 3, 4, 5, float("inf")]], "not three points"), ([7], "not three points"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 2]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~~"}, "not of COCO's characters"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 99}, "not of COCO's characters"),
        ({"size": [1, 1], "counts": [1]}, "neither polygons nor run lengths"), ("x", "neither polygons"),
    ],
)  # fmt: skip
def test_masks_that_are_none(outline, words):
    with pytest.raises(PaliGemmaError, match=words):
        coco.mask_of(outline, WIDTH, HEIGHT)


def test_a_mask_larger_than_memory_is_not_made():
    with pytest.raises(PaliGemmaError, match="more than"):
        coco.mask_of([SQUARE], 60_000, 60_000)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("annotations", {"bbox": [1, 2, 3]}, "image 0, annotation 2: the box [1, 2, 3] is not four numbers"),
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "annotation 2: the box"),
        ("annotations", {"bbox": [90, 2, 3, 4]}, "has no area in a picture of 40 by 30"),
        ("annotations", {"category_id": 5}, "annotation 2: there is no category 5"),
        ("annotations", {"image_id": [8]}, "annotation 2: there is no image [8]"),
        ("categories", {"name": "a ; b"}, "category 9: the label 'a ; b' is empty, no text, or has a ;"),
        ("categories", {"name": 3}, "category 9: the label 3"),
        ("images", {"file_name": "../../secret.png"}, "image 1: the picture '../../secret.png' lies outside of"),
        ("images", {"file_name": "/etc/hostname"}, "image 1: the picture '/etc/hostname' lies outside of"),
        ("images", {"file_name": "gone.png"}, "image 1: no picture 'gone.png' in"),
        ("images", {"file_name": "a\0b"}, "is no name of a file"),
        ("images", {"width": -3}, "image 1: a side of -3 pixels"),
        ("images", {"height": 1e9}, "image 1: a side of 1000000000.0 pixels"),
    ],
)  # fmt: skip
def test_bad_rows_of_coco_are_named_and_left_out(tmp_path, capsys, place, change, words):
    (tmp_path / "secret.png").write_bytes(png())
    file = coco_file(tmp_path / "set")
    whole = json.loads(file.read_text())
    whole[place][1] |= change
    code, errors, found = convert(coco_file(tmp_path / "set", **whole), tmp_path / "out", capsys=capsys)
    assert code == 0
    assert errors[0].startswith("left out: ")
    assert words in errors[0]
    assert len(found) == 1


@pytest.mark.parametrize(
    "contents", [b"", b"[]", b"{", b'{"images": [], "annotations": {}, "categories": []}', b"[" * 100_000]
)
def test_what_is_no_coco_file(tmp_path, capsys, contents):
    (tmp_path / "x.json").write_bytes(contents)
    code, errors, found = convert(tmp_path / "x.json", tmp_path / "out", capsys=capsys)
    assert (code, found) == (1, None)
    assert len(errors) == 1
    assert "not COCO's JSON" in errors[0]
    assert not (tmp_path / "out").exists()


def test_thousands_of_bad_rows_are_counted(tmp_path, capsys):
    annotations = [{"id": i, "image_id": 99} for i in range(5000)]
    code, errors, _ = convert(coco_file(tmp_path / "set", annotations=annotations), tmp_path / "out", capsys=capsys)
    assert code == 1
    assert len(errors) == 21
    assert "not one row could be used" in errors[-1]


# --- Pascal VOC --------------------------------------------------------------------------------------------


def voc_folder(folder, xml=None, head=""):
    for name in (voc.ANNOTATIONS, voc.PICTURES, voc.MASKS):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / voc.PICTURES / "a.jpg")
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[3:18, 4:12], numbers[6:18, 20:30] = 1, 2
    image = Image.fromarray(numbers, "L").convert("P")
    image.putdata(numbers.ravel().tolist())
    image.save(folder / voc.MASKS / "a.png")
    boxes = {"cat": CAT, "dog": DOG}
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>" for name, (x, y, w, h) in boxes.items()
    )  # fmt: skip
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    text = xml or f"{head}<annotation><filename>a.jpg</filename>{size}{objects}</annotation>"
    (folder / voc.ANNOTATIONS / "a.xml").write_text(text)
    return folder


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_voc(tmp_path, capsys):
    code, errors, found = convert(voc_folder(tmp_path / "voc"), tmp_path / "out", capsys=capsys)
    suffix = f"{detection.encode(*fractions(*CAT))} cat ; {detection.encode(*fractions(*DOG))} dog"
    assert (code, errors) == (0, [])
    assert found == [{"image": "../voc/JPEGImages/a.jpg", "prefix": "detect cat ; dog", "suffix": suffix}]
    _, _, found = convert(tmp_path / "voc", tmp_path / "masks", "--task", "segment", capsys=capsys)
    assert [row["prefix"] for row in found] == ["segment cat", "segment dog"]
    (box,) = detection.parse(found[1]["suffix"], WIDTH, HEIGHT)
    assert len(box.codes) == 16


ENTITIES = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
BOMB = f'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">{ENTITIES}]>'


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (f"{BOMB}<annotation><filename>&j;</filename></annotation>", "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', "declares a document type"),
        ("<annotation>", "not XML"), ("", "not XML"), ("\0", "not XML"),
        ("<annotation><filename>../a.xml</filename></annotation>", "lies outside of|no picture"),
        ("<annotation><filename>a.jpg</filename></annotation>", "a side of 'None' pixels|a side of None"),
        ("<annotation><filename>a.jpg</filename><size><width>1e300</width><height>9</height></size></annotation>", "a side of"),
    ],
)  # fmt: skip
def test_bad_files_of_voc(tmp_path, capsys, xml, words):
    code, errors, _ = convert(voc_folder(tmp_path / "voc", xml or " "), tmp_path / "out", capsys=capsys)
    assert code == 1
    assert errors[0].startswith("left out: a.xml: ")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(errors[0])
    assert not (tmp_path / "out").exists()


def test_xml_nested_a_million_deep_is_read_or_refused():
    with pytest.raises(PaliGemmaError, match="not XML"):
        voc.parse(b"<a>" * 100_000)


# --- parquet and WebDataset --------------------------------------------------------------------------------


def parquet(file, columns, **metadata):
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, file)
    return file


def test_parquet_texts(tmp_path, capsys):
    file = parquet(tmp_path / "a.parquet", {
        "image": [{"bytes": png(), "path": "x.png"}, {"bytes": b"no picture", "path": None}, {"bytes": png(), "path": None}],
        "question": ["what?", "what?", None], "answer": [["a cat", "cat"], ["b"], ["c"]],
    })  # fmt: skip
    code, errors, found = convert(file, tmp_path / "out", "--draw", tmp_path / "drawn.png", capsys=capsys)
    assert code == 0
    assert found == [{"image": "images/000000.png", "prefix": "what?", "suffix": "a cat"}]
    assert (tmp_path / "out/images/000000.png").read_bytes() == png()
    assert "a.parquet, row 2: the picture: not a picture" in errors[0]
    assert "row 3: the prompt is None" in errors[1]
    code, errors, found = convert(file, tmp_path / "more", "--prefix", "caption en", capsys=capsys)
    assert [row["prefix"] for row in found] == ["what?", "caption en"]


def test_parquet_objects(tmp_path, capsys):
    """As detection sets on the Hub are: boxes and numbers of categories, whose names are in the metadata."""
    columns = {"image": [{"bytes": png(), "path": None}] * 2, "objects": [
        {"bbox": [[20.0, 6.0, 10.0, 12.0], [4.0, 3.0, 8.0, 15.0], [1.0, 1.0, -1.0, 1.0]], "category": [1, 0, 0]},
        {"bbox": [[1.0, 1.0, 1.0, 1.0]], "category": []},
    ]}  # fmt: skip
    names = {"info": {"features": {"objects": {"feature": {"category": {"names": ["cat", "big dog"]}}}}}}
    code, errors, found = convert(parquet(tmp_path / "a.parquet", columns, **names), tmp_path / "out", capsys=capsys)
    suffix = f"{detection.encode(*fractions(*CAT))} cat ; {detection.encode(*fractions(*DOG))} big dog"
    assert code == 0
    assert [(row["prefix"], row["suffix"]) for row in found] == [("detect cat ; big dog", suffix)]
    assert "row 1, object 3: the box" in errors[0]
    assert "row 2: its objects are not as many boxes" in errors[1]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"x": [1]}, "no column image"),
        ({"image": ["a.png"]}, "neither objects nor an answer"),
        (None, "cannot read it"),
    ],
)
def test_parquet_files_that_cannot_be_used(tmp_path, capsys, columns, words):
    file = tmp_path / "a.parquet"
    parquet(file, columns) if columns else file.write_bytes(b"PAR1 nonsense PAR1")
    code, errors, _ = convert(file, tmp_path / "out", capsys=capsys)
    assert code == 1
    assert words in errors[-1]


def shard(file, members):
    """A tar of (name, bytes), or (name, a link's target)."""
    with tarfile.open(file, "w") as tar:
        for name, contents in members:
            member = tarfile.TarInfo(name)
            if isinstance(contents, str):
                member.type, member.linkname = tarfile.SYMTYPE, contents
                tar.addfile(member)
            else:
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    return file


def test_webdataset(tmp_path, capsys):
    rows = {"prefix": "what?", "suffix": "b"}
    members = [
        ("a/000.png", png()), ("a/000.txt", b"a cat"), ("a/001.json", json.dumps(rows).encode()), ("a/001.png", png()),
        ("../../002.png", png()), ("../../002.txt", b"c"), ("/etc/003.png", "/etc/passwd"), ("/etc/003.txt", b"d"),
        ("004.png", png()), ("004.json", b"[1]"), ("005.png", png()), ("006.png", b"x"), ("006.txt", b"\xff"),
    ]  # fmt: skip
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "0.tar", members)
    (folder / "1.tar").write_bytes(shard(tmp_path / "x.tar", members).read_bytes()[:2500])
    before = set(tmp_path.rglob("*"))
    code, errors, found = convert(folder, tmp_path / "out", "--prefix", "caption en", capsys=capsys)
    assert code == 0
    assert [(row["prefix"], row["suffix"]) for row in found] == [
        ("caption en", "a cat"), ("what?", "b"), ("caption en", "c"), ("caption en", "a cat"),
    ]  # fmt: skip
    written = {file.relative_to(tmp_path / "out").as_posix() for file in set(tmp_path.rglob("*")) - before} - {"."}
    assert written == {"rows.jsonl", "images", *(f"images/{i:06d}.png" for i in range(4))}
    words = ["sample '/etc/003': no picture", "sample '/004': its json is not", "sample '/005': neither a json nor a txt",
             "sample '/006': its json or txt cannot be read", "1.tar"]  # fmt: skip
    for line, expected in zip(errors, words, strict=False):
        assert expected in line


@pytest.mark.parametrize("name", ["gone", "notes.txt", "empty"])
def test_what_is_no_data_set(tmp_path, capsys, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    code, errors, found = convert(tmp_path / name, tmp_path / "out", capsys=capsys)
    assert (code, found, len(errors)) == (1, None, 1)
    assert name in errors[0]


def test_rows_of_no_label_are_of_the_data_set():
    options = rows.Options(labels=("a", "b"))
    (row,) = rows.rows_of(rows.Annotated("x", b"", []), options, pytest.fail)
    assert (row.prefix, row.suffix) == ("detect a ; b", "")
    assert not list(rows.rows_of(rows.Annotated("x", b"", []), rows.Options(), pytest.fail))
