"""--trace: a line for each tap, with letters that stand for the sizes of the configuration, and functions that are there."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from numpy_ref.__main__ import main
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import trace
from numpy_ref.cli.trace import AXES, TracedEngine
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import generate
from numpy_ref.model import paligemma

from .models import CONFIGS, random_batch, random_params
from .parity import Recorder

ROOT = Path(__file__).parent.parent
EXAMPLE = str(SHIPPED / "example.png")
ROW = re.compile(
    r"(?P<name>\S+) +\[(?P<shape>[^\]]*)\] +(?P<dtype>\w+) +(?P<range>.*?) +"
    r"(?P<function>[\w.]+) +(?P<file>[\w/]+\.py):(?P<line>\d+)"
)
NEW_TOKENS = 4


class Spelling:
    """A tokenizer that a random model does not have."""

    def decode(self, ids):
        return f"word{ids[0]}"


def tiny_checkpoint(config):
    params = random_params(config, dtype=np.float32)
    return SimpleNamespace(params=params, config=config, resize="bicubic", folder=ROOT / "tests")


def traced(config):
    """The lines of a tiny model's trace, its tokens, and what it was given."""
    lines, checkpoint = [], tiny_checkpoint(config)
    engine = TracedEngine(checkpoint, Spelling(), lines.append)
    pixel_values = engine.preprocess(Image.effect_noise((31, 37), 50).convert("RGB"))
    _, input_ids, lengths = random_batch(config, (5,))
    known = np.arange(config.text.vocab) > 2  # no control token
    prompt = input_ids[0, : lengths[0]].tolist()
    tokens = [int(token[0]) for token in generate(engine, pixel_values, [prompt], known, NEW_TOKENS)]
    return lines, tokens, (checkpoint, pixel_values, prompt, known)


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request):
    config = replace(CONFIGS[request.param], eos=-1)  # which is never drawn
    return config, *traced(config)


def stages(lines) -> dict:
    rows, stage = {}, None
    for line in lines:
        if line.startswith("\n# "):
            stage = line[3:].partition(":")[0]
        elif match := ROW.fullmatch(line):
            rows.setdefault(stage, []).append(match)
    return rows


def recorded(config, checkpoint, pixel_values, prompt, known):
    """The taps of prefill and of the first decode step, of the model itself."""
    prefill, decode = Recorder(), Recorder()
    ids, lengths = np.array([prompt]), np.array([len(prompt)])
    capacity = len(prompt) + NEW_TOKENS - 1
    logits, cache = paligemma.prefill(checkpoint.params, config, pixel_values, ids, lengths, capacity, prefill)
    first = np.where(known, logits, -np.inf).argmax(-1)
    paligemma.decode(checkpoint.params, config, first[:, None], lengths, cache, decode)
    return {"prefill": prefill.values, "decode 1": decode.values}


def test_every_tap_in_order(tiny):
    config, lines, _, inputs = tiny
    rows = stages(lines)
    for stage, values in recorded(config, *inputs).items():
        shown = [row for row in rows[stage] if not row["name"].startswith(("cache", "input_ids", "lengths"))]
        assert [row["name"] for row in shown] == [*values]
        for row, value in zip(shown, values.values(), strict=True):
            assert [int(part.rpartition("=")[2]) for part in row["shape"].split(", ")] == [*value.shape]
            assert row["dtype"] == str(value.dtype)
            least, most = map(float, row["range"].split(" … "))
            np.testing.assert_allclose([least, most], [value.min(), value.max()], rtol=1e-3)


def sizes(config, tower, prompt, stage) -> dict:
    """What each axis letter stands for."""
    vision, text, patches = config.vision, config.text, config.vision.patches
    if tower == "vision":
        return {"B": 1, "P": patches, "D": vision.width, "N": vision.heads, "H": vision.head_dim}
    capacity = len(prompt) + NEW_TOKENS - 1
    length = len(prompt) if stage == "prefill" else 1
    group = text.heads // text.kv_heads
    return {
        "B": 1, "T": length, "S": length if stage == "prefill" else capacity, "N": text.heads, "K": text.kv_heads,
        "G*T": group * length, "H": text.head_dim, "D": text.width, "V": text.vocab, "P": patches,
        "T-P": length - patches, "C": capacity,
    }  # fmt: skip


def test_letters_stand_for_the_sizes_of_the_configuration(tiny):
    config, lines, _, (_, _, prompt, _) = tiny
    checked = set()
    for stage, rows in stages(lines).items():
        for row in rows if stage in ("prefill", "decode 1") else []:
            tower = row["name"].split(".")[0]
            for axis in row["shape"].split(", "):
                letter, _, size = axis.partition("=")
                assert sizes(config, tower, prompt, stage)[letter] == int(size), row[0]
                checked.add((tower, letter))
    assert {letter for tower, letter in checked if tower == "text"} >= {*"BTNKHDS", "G*T"}
    assert {letter for tower, letter in checked if tower == "vision"} == set("BPDNH")
    assert {("logits", "V"), ("projector", "P"), ("embed", "T-P"), ("cache", "C")} <= checked


def test_every_letter_is_declared():
    import numpy_ref

    for letters in [*AXES.values(), ["C"], ["P"]]:
        for letter in letters:
            for part in re.split(r"\W", letter):
                assert re.search(rf"\b{part} [a-z=]", numpy_ref.__doc__), part


def test_no_axis_is_declared_for_a_value_that_is_not_there():
    taps = {
        [word for word in name.split(".") if not word.isdigit()][-1]
        for config in CONFIGS.values()
        for name in recorded(config, *traced(config)[2])["prefill"]
    }
    assert taps == AXES.keys()


def test_functions_and_lines_are_where_the_trace_has_them(tiny):
    _, lines, _, _ = tiny
    rows = [row for stage in stages(lines).values() for row in stage]
    assert {row["function"] for row in rows} >= {
        "image.preprocess", "Tokenizer.prompt", "siglip.encoder", "siglip.block", "siglip.attention", "layers.attend",
        "paligemma.encode_image", "paligemma.embed_prefix", "gemma.block", "gemma.attention", "gemma.decoder",
        "paligemma.prefill", "paligemma.decode", "paligemma.pad_cache", "sampling.sample",
    }  # fmt: skip
    for row in rows:
        source = (ROOT / row["file"]).read_text().splitlines()
        function = row["function"].rpartition(".")[2]
        code = source[int(row["line"]) - 1]
        word = [word for word in row["name"].split(".") if not word.isdigit()][-1]
        assert f"def {function}(" in code or f'tap("{word}"' in code or f'tap(f"{word}' in code, row[0]
        above = [line for line in source[: int(row["line"])] if re.match(r"\s*def ", line)]
        assert f"def {function}(" in above[-1], row[0]


def test_tokens_text_and_probability(tiny):
    _, lines, tokens, (checkpoint, pixel_values, prompt, _) = tiny
    shown = [row for stage in stages(lines).values() for row in stage if row["name"].startswith("token.")]
    assert [row["name"] for row in shown] == [f"token.{i + 1}" for i in range(NEW_TOKENS)]
    engine = NumpyEngine(checkpoint)
    logits, cache = engine.prefill(pixel_values, np.array([prompt]), np.array([len(prompt)]), len(prompt) + NEW_TOKENS)
    for i, row in enumerate(shown):
        token, text, probability = row["range"].split()
        weights = np.exp(logits[0])
        assert (int(token), text) == (tokens[i], f"'word{tokens[i]}'")
        assert float(probability) == pytest.approx(float(weights[tokens[i]] / weights.sum()), abs=1e-4)
        logits, cache = engine.decode(np.array([[tokens[i]]]), np.array([len(prompt) + i]), cache)


def test_later_steps_are_tokens_alone(tiny):
    _, lines, _, _ = tiny
    later = stages(lines)["decode 2 and on"]
    assert [row["name"] for row in later] == [f"token.{i + 1}" for i in range(2, NEW_TOKENS)]


def test_a_heading_for_each_block(tiny):
    config, lines, _, _ = tiny
    headings = [line[3:] for line in lines if line.startswith("\n# ")]
    for tower, depth in (("vision", config.vision.depth), ("text", config.text.depth)):
        found = [heading for heading in headings if heading.startswith(f"prefill: {tower}.blocks.")]
        assert found == [f"prefill: {tower}.blocks.{i}" for i in range(depth)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.5, -2, 0], "-2 … 1.5"),
        ([1, np.nan, 3, np.nan], "1 … 3, 2 NOT FINITE"),
        ([-np.inf, 4], "4 … 4, 1 NOT FINITE"),
        ([np.nan, np.inf], "2 NOT FINITE"),
        ([True, False], "0 … 1"),
    ],
)
def test_ranges(values, expected):
    assert trace.range_of(np.array(values)) == expected


def test_ranges_of_half_precision():
    import ml_dtypes

    assert trace.range_of(np.array([1, 300, -0.5], ml_dtypes.bfloat16)) == "-0.5 … 300"
    assert trace.range_of(np.array([1, np.inf], np.float16)) == "1 … 1, 1 NOT FINITE"


def test_what_overflows_is_seen_where_it_arises():
    config = CONFIGS["paligemma1"]
    lines, checkpoint = [], tiny_checkpoint(config)
    checkpoint.params["text"]["blocks"][1]["mlp"]["down"]["kernel"][:] = 3e38
    engine = TracedEngine(checkpoint, Spelling(), lines.append)
    pixel_values, input_ids, _ = random_batch(config, (5,))
    with pytest.raises(PaliGemmaError, match="not finite"):
        list(generate(engine, pixel_values, input_ids.tolist(), np.ones(config.text.vocab, bool), 2))
    assert next(line for line in lines if "NOT FINITE" in line).startswith("text.blocks.1.mlp ")


def test_taps_change_nothing():
    outputs = []
    for engine in (NumpyEngine, lambda checkpoint: TracedEngine(checkpoint, Spelling(), lambda line: None)):
        config = CONFIGS["paligemma2"]
        pixel_values, input_ids, lengths = random_batch(config, (5,))
        outputs.append(engine(tiny_checkpoint(config)).prefill(pixel_values, input_ids, lengths, 40)[0])
    assert np.array_equal(*outputs)


# --- the command ------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    assert main([EXAMPLE, *arguments]) == 0
    return capsys.readouterr().out


def test_the_answer_is_the_same(capsys):
    text = run(capsys, "caption en")
    lines = run(capsys, "caption en", "--trace").splitlines()
    assert lines[-1] == repr(text.rstrip("\n"))
    assert lines[0].split()[:2] == ["name", "shape"]
    assert "# prompt: 64 x <image>, <bos>, 'caption', ' en', '\\n'" in lines


def test_drawn_tokens_are_the_same(capsys):
    options = ["caption en", "--temperature", "1.5", "--seed", "3", "--max-new-tokens", "5"]
    text = run(capsys, *options)
    assert run(capsys, *options, "--trace").splitlines()[-1] == repr(text.rstrip("\n"))


def test_boxes_and_masks(capsys):
    lines = run(capsys, "segment star", "--trace").splitlines()
    rows = [match["name"] for line in lines[lines.index("# box: 'star'") :] if (match := ROW.fullmatch(line))]
    assert rows == ["corners", "codes", "mask", "painted"]


def test_a_picture_besides(capsys, tmp_path):
    run(capsys, "caption en", "--trace", "--heatmap", str(tmp_path / "a.png"), "--draw", str(tmp_path / "b.png"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_json_is_refused(capsys):
    with pytest.raises(PaliGemmaError, match="--trace prints lines to read and --json one object"):
        main([EXAMPLE, "caption en", "--trace", "--json"])
    assert capsys.readouterr().out == ""


def test_memory_does_not_grow_with_the_trace():
    """No value is kept: what the tap was given is freed as soon as the model drops it."""
    import weakref

    config, kept = CONFIGS["paligemma1"], []
    engine = TracedEngine(tiny_checkpoint(config), Spelling(), lambda line: None)
    row = engine.row
    engine.row = lambda name, value, *others: (kept.append((name, weakref.ref(value))), row(name, value, *others))
    pixel_values, input_ids, lengths = random_batch(config, (5,))
    engine.prefill(pixel_values, input_ids, lengths, 40)
    alive = [name for name, value in kept if value() is not None]
    assert set(alive) <= {"input_ids", "logits", "cache.0.key", "cache.0.value"}
