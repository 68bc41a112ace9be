"""Around the training loop: views of pictures, held-out lines, what is measured on them, defaults, and the plan."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from numpy_ref import detection
from numpy_ref.answer import Answer
from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.dataset import coco
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import segmentation
from numpy_ref.scenes import example
from numpy_ref.tokenizer import Tokenizer
from torch_impl import train
from torch_impl.load import load
from torch_impl.train import augment, data, finetune, loop, memory, validate
from torch_impl.train.finetune import prefix_lm_loss

from . import faults

BOX = (0.25, 0.5, 0.5, 0.75)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(SHIPPED, load_config(SHIPPED))


@pytest.fixture
def own_data(tmp_path):
    return faults.own_data(tmp_path / "data")


# --- views -------------------------------------------------------------------------------------------------


def marked(box=BOX, size=96):
    """A gray picture with a red box in it."""
    picture = Image.new("RGB", (size, size), (90, 90, 90))
    x1, y1, x2, y2 = (round(value * size) for value in box)
    picture.paste((200, 0, 0), (x1, y1, x2, y2))
    return picture


@pytest.mark.parametrize("kinds", [["shift"], ["zoom"], ["shift", "zoom", "light"]], ids="+".join)
def test_boxes_go_with_their_picture(kinds):
    """Wherever a view shows the red, there is its box; and nothing of it is ever cut."""
    rng, places = np.random.default_rng(0), set()
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    for _ in range(100):
        picture, suffix = augment.view(marked(), f"{detection.encode(*BOX)}{codes} thing", kinds, 8, rng)
        (box,) = detection.parse(suffix, picture.width, picture.height)
        assert box.label == "thing"
        assert box.codes == tuple(range(16))
        pixels = np.asarray(picture).astype(int)
        rows, columns = np.nonzero(pixels[..., 0] > pixels[..., 1] + 60)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.array(found) - box.corners).max() <= 1.5
        places.add(box.corners)
    assert len(places) > 15


def test_a_shift_is_of_quarters_of_a_patch():
    rng = np.random.default_rng(0)
    for _ in range(50):
        window = augment.random_window(rng, [BOX], ["shift"], 8)
        assert np.allclose(np.array(window) * 32, np.round(np.array(window) * 32))
        assert np.allclose(np.subtract(window[2:], window[:2]), 1)


def test_without_kinds_the_picture_stays():
    picture, suffix = augment.view(marked(), f"{detection.encode(*BOX)} thing", [], 8, np.random.default_rng(0))
    assert suffix == f"{detection.encode(*BOX)} thing"
    assert np.array_equal(np.asarray(picture), np.asarray(marked()))
    views = [np.asarray(augment.view(marked(), "x", ["colors"], 8, np.random.default_rng(i))[0]) for i in range(9)]
    assert all(np.array_equal(np.sort(each), np.sort(np.asarray(marked()))) for each in views)
    assert len({each.tobytes() for each in views}) == 3  # where the red goes
    lit = augment.lit(marked(), np.random.default_rng(0))
    assert not np.array_equal(np.asarray(lit), np.asarray(marked()))


def test_a_box_over_the_whole_picture_stays_whole():
    whole = (0.0, 0.0, 1.0, 1.0)
    for seed in range(50):
        window = augment.random_window(np.random.default_rng(seed), [whole], ["shift", "zoom"], 7)
        assert window[0] <= 1e-9
        assert window[2] >= 1 - 1e-9


def test_views_follow_from_the_seed(own_data, tokenizer):
    a, b = (data.JsonLines(own_data, tokenizer, "bicubic", 3, ["shift", "light"]) for _ in range(2))
    plain = data.JsonLines(own_data, tokenizer, "bicubic", 3)
    assert all(np.array_equal(a[i][0], b[i][0]) for i in (5, 0, 17))
    assert not all(np.array_equal(a[i][0], plain[i][0]) for i in range(12))
    assert a[0][1:] == plain[0][1:]


# --- held out ----------------------------------------------------------------------------------------------


def test_lines_about_one_picture_stay_together(own_data, tokenizer):
    lines = [json.loads(line) for line in own_data.read_text().splitlines()]
    own_data.write_text("\n".join(json.dumps({**line, "prefix": prefix}) for line in lines for prefix in ("a", "b")))
    parts = data.JsonLines(own_data, tokenizer, "bicubic", 0, ["light"]).split(0.25)
    kept, held_out = ({line.paths for line in part.rows} for part in parts)
    assert (len(kept), len(held_out), kept & held_out) == (9, 3, set())
    assert [len(part.rows) for part in parts] == [18, 6]
    assert (parts[0].kinds, parts[1].kinds) == (["light"], ())
    again = data.JsonLines(own_data, tokenizer, "bicubic", 0).split(0.25)
    assert {line.paths for line in again[1].rows} == held_out
    with pytest.raises(PaliGemmaError, match=r"12 pictures, too few to keep 0\.99"):
        data.JsonLines(own_data, tokenizer, "bicubic", 0).split(0.99)


def line(prefix, suffix):
    return data.Line("x", (), prefix, suffix, [], [])


def test_metrics_by_what_a_line_asks():
    box = detection.encode(*BOX)
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    assert validate.metric_of(line("caption en", "a cat"), True) == validate.EXACT
    assert validate.metric_of(line("detect cat", ""), True) == validate.DETECT
    assert validate.metric_of(line("where?", f"{box} cat"), True) == validate.DETECT
    assert validate.metric_of(line("segment cat", f"{box}{codes} cat"), True) == validate.SEGMENT
    assert validate.metric_of(line("segment cat", f"{box}{codes} cat"), False) == validate.DETECT


def test_the_values_of_metrics():
    def answer(text):
        return Answer(text, [], validate.PAINTED, validate.PAINTED, decode_masks=decode)

    codec = segmentation.load(segmentation.find(SHIPPED))

    def decode(codes):
        return segmentation.decode(codec, codes)

    cat, dog = (f"{detection.encode(*box)} {label}" for box, label in ((BOX, "cat"), ((0, 0, 0.2, 0.2), "dog")))
    pairs = [(answer(f"{cat} ; {dog}"), line("detect cat", cat)), (answer(""), line("detect cat", cat))]
    assert validate.score(validate.DETECT, pairs) == pytest.approx(2 * 1 / (2 + 2))
    pairs = [(answer("a cat"), line("caption", "a cat")), (answer("a cat "), line("caption", "a cat"))]
    assert validate.score(validate.EXACT, pairs) == 0.5
    full = np.full((1, 64, 64), 1.0, np.float32)
    codes = segmentation.spell(segmentation.encode(codec, full)[0])
    left, right = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    masks = [f"{detection.encode(*box)}{codes} cat" for box in (left, right)]
    both, one = " ; ".join(masks), masks[0]
    iou = validate.score(validate.SEGMENT, [(answer(one), line("segment cat", both))])
    assert iou == pytest.approx(0.5, abs=0.05)
    same = [(answer(both), line("segment cat", both)), (answer("none"), line("segment cat", both))]
    assert validate.score(validate.SEGMENT, same) == 0.5


def test_the_best_is_by_metrics_then_by_the_loss():
    validation = loop.Validation(None, validate.rank, 1)
    validation.rows = [
        {"step": 1, "loss": 0.1, "exact": 0.5}, {"step": 2, "loss": 0.4, "exact": 0.7},
        {"step": 3, "loss": 0.3, "exact": 0.7}, {"step": 4, "loss": 0.3, "exact": 0.7},
    ]  # fmt: skip
    assert validation.best()["step"] == 3


def test_a_model_is_measured_as_it_answers(tmp_path):
    """The shipped model on scenes whose answers it was asked for: what it says is right, and nothing else is."""
    model, loaded = load()
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    rows = [("caption en", None), ("detect star", None), ("caption en", "nonsense")]
    from numpy_ref.answer import answer
    from numpy_ref.image import open_image
    from torch_impl.load import ModuleEngine

    engine = ModuleEngine(model)
    lines = []
    for prefix, suffix in rows:
        found = answer(engine, tokenizer, open_image(SHIPPED / "example.png"), prefix).text
        lines.append({"image": str(SHIPPED / "example.png"), "prefix": prefix, "suffix": suffix or found})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = data.JsonLines(tmp_path / "rows.jsonl", tokenizer, "bicubic", 0)
    with torch.no_grad():
        found = validate.measure(model, read, prefix_lm_loss, 2, None)
    assert found.keys() == {"loss", "detect_f1", "exact"}
    assert (found["detect_f1"], found["exact"]) == (1.0, 0.5)
    batch = data.collate([read[i] for i in range(3)], loaded.config.pad)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(prefix_lm_loss(model, batch).item(), rel=1e-5)


# --- defaults and the plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "batch", "steps"), [(20, 16, 300), (1600, 16, 300), (20_000, 16, 3750), (20_000, 64, 938)]
)
def test_steps_follow_from_the_data(lines, batch, steps):
    """Three times through; at least 300."""
    examples = data.JsonLines.__new__(data.JsonLines)
    examples.rows = range(lines)
    arguments = SimpleNamespace(
        steps=None, batch_size=batch, accumulate=1, learning_rate=None, lora_rank=8, seed=0, warmup=100,
        weight_decay=0.0, optimizer="adamw", float32=False, freeze=[],
    )  # fmt: skip
    found = finetune.settings_of(arguments, examples)
    assert (found.steps, found.peak) == (steps, 2e-4)
    arguments.lora_rank, arguments.accumulate = None, 2
    found = finetune.settings_of(arguments, examples)
    assert (found.steps, found.peak) == (max(300, -(-steps // 2) if steps > 300 else 300), 2e-5)


def test_a_plan_writes_nothing(own_data, tmp_path, capsys):
    options = ["--data", str(own_data), "--batch-size", "2", "--validation", "0.25", "--plan", "--lora-rank", "4"]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert train.main([*options, "--output", str(tmp_path / "out")]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert lines.keys() == {"weights", "data", "steps", "memory", "time"}
    model, _ = load()
    everything = sum(p.numel() for p in model.parameters())
    trained = 4 * 4 * sum(sum(p.shape) for p in model.text.blocks[0].parameters() if p.dim() == 2)
    assert lines["weights"] == f"{trained:,} are trained, {everything:,} stay as they are"
    assert lines["data"] == "9 lines to train on, 3 to validate on"
    assert lines["steps"] == "300 of 2 examples, learning rate 0.0002 at its peak; 66.7 times through the data"
    assert re.fullmatch(
        r"weights 0\.01 GB, gradients 0\.00 GB, moments of the optimizer 0\.00 GB; \d\.\d\d GB at the peak of a step, "
        "as measured", lines["memory"],
    )  # fmt: skip
    assert re.fullmatch(r"\d+\.\d\d s a step here: \d+ (s|min) in all, and what validation takes", lines["time"])


def test_bytes_are_those_that_tensors_take():
    model, _ = load()
    weights = sum(p.numel() for p in model.parameters())
    assert memory.of_weights(model) == memory.of_gradients(model) == 4 * weights
    for optimizer in ("adamw", "muon"):
        settings = loop.Settings(1, 1, optimizer=optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers = loop.optimizers_for(model, settings)
        for each in optimizers:
            each.step()
        kept = sum(
            tensor.nbytes for each in optimizers for entry in each.state.values()
            for tensor in entry.values() if torch.is_tensor(tensor) and tensor.dim()
        )  # fmt: skip
        assert memory.of_moments(model, optimizer) == kept


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (90000, "25.0 h")],
)
def test_a_duration_in_words(seconds, text):
    assert loop.duration(seconds) == text


def test_progress_without_a_terminal(monkeypatch, capsys):
    """Seconds apart at first, further and further apart in a long run."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    lines = loop._Lines("training", 0, 4000, True)
    for step in range(1, 4001):
        now[0] = step * 2.0
        lines.show(step, 0.5)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "training: step 5 of 4000, loss 0.500, 2.00 s a step, 2.2 h left"
    assert 30 < len(shown) < 100
    quiet = loop._Lines("training", 0, 4000, False)
    now[0] += 100
    quiet.show(1, 0.5)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base-dtype", "bfloat16"], "--base-dtype is for the frozen weights under an adapter; give --lora-rank too"),
        (["--lora-rank", "4", "--freeze", "text"], "--lora-rank leaves the base as it is"),
        (["--lora-rank", "4", "--vision", "x"], "--lora-rank leaves the base as it is"),
        (["--validation", "0.1"], "--validation takes a share of --data"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, words):
    with pytest.raises(PaliGemmaError, match=words):
        train.main(["--output", str(tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan"])
def test_a_share_is_between_nothing_and_all(value, capsys):
    with pytest.raises(SystemExit):
        train.main(["--output", "out", "--validation", value])
    assert "must be a number from 0 to 1, or a file" in capsys.readouterr().err


# --- the example -------------------------------------------------------------------------------------------


def test_the_example_is_annotated_as_drawn(tmp_path, capsys):
    """One arrow a picture, and its color in the middle of its box."""
    assert example.main(["--output", str(tmp_path / "arrows"), "--pictures", "3"]) == 0
    assert {file.name for file in (tmp_path / "arrows").iterdir()} == {"train", "train.json", "test", "test.json"}
    for part in example.PARTS:
        found = json.loads((tmp_path / "arrows" / f"{part}.json").read_text())
        assert len(found["images"]) == 3
        assert [row["image_id"] for row in found["annotations"]] == [0, 1, 2]
        assert [row["name"] for row in found["categories"]] == ["arrow"]
    rng, unit = np.random.default_rng([0, 0]), example.SIZE / 32
    for i, row in enumerate(json.loads((tmp_path / "arrows" / "train.json").read_text())["annotations"]):
        scene = example.novel_scene(rng, "arrow")
        (place,) = (n for n, thing in enumerate(scene.things) if thing.shape == "arrow")
        thing = scene.things[place]
        assert row["bbox"] == [thing.x * unit, thing.y * unit, thing.side * unit, thing.side * unit]
        drawn = np.asarray(Image.open(tmp_path / "arrows" / "train" / f"{i:03d}.png")).astype(int)
        inside = coco.mask_of(row["segmentation"], example.SIZE, example.SIZE)
        assert np.abs(np.median(drawn[inside], 0) - thing.rgb).max() <= 8
