"""python -m export.benchmark: it compares two processes that answer alike, and its arithmetic is right."""

import json
import os
import re

import numpy as np
import pytest

from export import benchmark, bundle, verify
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.engine import Features
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import paligemma


def test_both_sides_answer_on_the_shipped_model():
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    results = benchmark.compare({"ours": bundle.shipped().path, "transformers": SHIPPED}, rounds=2, tokens=3, threads=1)
    assert results["ratios"].keys() == {"decode", "prefill", "memory"}
    for side in (benchmark.OURS, benchmark.PEER):
        own = {"outside_share", "beyond_weights_gib", "late_position", "late_step"}
        own |= {"first_s", "second_s", "second_over_first"}
        assert results[side].keys() - own == {
            "load_s",
            "peak_gib",
            "first_token_s",
            "ms_per_token",
        }
        assert all(value > 0 for value in results[side].values())
    assert results["ours"]["outside_share"] < 1
    assert results["ours"]["second_over_first"] < 1
    assert results["bandwidth_share"] > 0  # a model that a cache holds may be read faster than memory
    assert results["bandwidth_gb_per_s"] > 0.1
    settings = {
        "variant": "v",
        "layers": 2,
        "precision": "float32",
        "threads": 1,
        "prepack": False,
        "against": "bfloat16",
    }
    text = benchmark.table({**settings, **results, "ours": results["ours"] | {"export_s": 1.0, "first_load_s": 1.0}})
    assert f"{results['ratios']['decode']:.2f}" in text
    json.dumps(results)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_the_peer_runs_both_versions_and_answers_as_the_reference(tmp_path, kind):
    """Version 2 with its soft caps and windows, which transformers runs eager."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    from . import make_goldens

    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5} if kind == "gemma2" else {}
    make_goldens.build(kind, text=caps).save_pretrained(tmp_path)
    model, loaded = benchmark.peers.load_transformers(tmp_path, "float32"), checkpoint.load(tmp_path)
    towers = model.config.text_config, model.config.vision_config
    decoder = {"gemma": "sdpa", "gemma2": "eager"}[kind]
    assert [tower._attn_implementation for tower in towers] == [decoder, "sdpa"]
    ids, pixels = benchmark.peers.prompt(loaded.config), make_goldens.pixels(model.config, 1)
    logits, _ = make_goldens.answer(model, pixels[0], ids, 1)
    expected, _ = paligemma.prefill(loaded.params, loaded.config, pixels, np.array([ids]), np.array([len(ids)]), 20)
    assert np.abs(logits - expected[0]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_the_decoder_alone_answers_as_the_whole(tmp_path, precision):
    loaded = checkpoint.load()
    bundle.write(loaded, tmp_path / "out", precision)
    opened, example = bundle.load(tmp_path / "out"), verify.example(loaded.config)
    pixels, ids, lengths, capacity = example.prefill(np.float32)
    features = paligemma.encode_image(loaded.params, loaded.config, pixels)
    features = list(map(Features, pixels, features))
    engines = Session(opened, "cpu"), Session(opened, "cpu", in_halves=True)
    found = []
    for engine, given in zip(engines, (pixels, features), strict=True):
        logits, cache = engine.prefill(given, ids, lengths, capacity)
        found.append((logits, engine.decode(example.steps[0], lengths, cache)[0]))
    tolerance = {"float32": 1e-5, "int4": 0.05}[precision]  # the whole one's features come from weights of few bits
    for whole, alone in zip(*found, strict=True):
        assert np.abs(whole - alone).max() < tolerance * np.abs(whole).max()
    logits, _ = engines[1].prefill(features[::-1], ids, lengths, capacity)
    assert np.abs(logits - found[1][0]).max() > 0.1 * np.abs(logits).max()


def test_a_second_question_alone(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "written", lambda folder, arguments: (SHIPPED, bundle.shipped().path, 0.0))
    assert benchmark.main(["--questions", "--rounds", "2", "--threads", "1"]) == 0
    line = capsys.readouterr().out
    assert 0 < float(re.search(r"takes (\d\.\d\d) of the first", line)[1]) < 1


def test_answers_with_boxes_alone(capsys, monkeypatch):
    """The guesses save passes, all the more the more objects there are, and the grammar more than the look-up."""
    monkeypatch.setattr(benchmark, "written", lambda folder, arguments: (SHIPPED, bundle.shipped().path, 0.0))
    assert benchmark.main(["--objects", "--rounds", "2", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "medians of 2 rounds" in lines[0]
    numbers = [[int(number) for number in re.findall(r" (\d+)(?= )", line)[:2]] for line in lines[2:11]]
    tokens, passes = np.array(numbers).reshape(3, 3, 2).transpose(2, 0, 1)
    assert tokens[:, 0].tolist() == [7, 31, 79]
    assert passes[:, 0].tolist() == [6, 30, 78]
    assert passes[:, 1].tolist() == [6, 20, 44]
    assert passes[:, 2].tolist() == [4, 17, 41]


def test_the_first_token_and_the_further_ones_are_timed_apart(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def answer(count, first):
        clock[0] += 2
        first()
        clock[0] += 0.25 * (count - 1)

    assert benchmark.timed(answer, 4) == {"first_token_s": 2, "ms_per_token": 250}


@pytest.mark.parametrize("far", [1000, 10])
def test_a_late_step_is_behind_the_prompt_and_within_the_model(monkeypatch, far):
    monkeypatch.setattr(benchmark, "FAR", far)
    engine = Session(bundle.shipped(), "cpu")
    found = benchmark.late_steps(engine)
    prompted = len(benchmark.peers.prompt(engine.config))
    assert found["late_position"] == {1000: engine.max_length - 1, 10: prompted + 1}[far]
    assert 0 < found["late_step"] < 100


def test_each_begins_as_often():
    assert [benchmark.rotated(["a", "b", "c"], i) for i in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_medians_and_ratios():
    ours = [{"first_token_s": 1.0, "ms_per_token": value} for value in (10, 20, 90)]
    theirs = [{"first_token_s": 3.0, "ms_per_token": value} for value in (20, 60, 90)]
    assert benchmark.medians(ours) == {"first_token_s": 1.0, "ms_per_token": 20}
    assert benchmark.faster(theirs, ours) == {"decode": 2.0, "prefill": 3.0}


def test_a_token_reads_the_decoder_once():
    opened = bundle.shipped()
    text = opened.config.text
    layer = text.width * (2 * text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim + 3 * text.mlp + 2)
    expected = 4 * (text.vocab * text.width + text.depth * layer + text.width)
    assert benchmark.weight_bytes(opened.path, "decode") == expected


def test_the_share_is_the_median_of_steps_against_the_width_beside_each(monkeypatch):
    class Asked:
        times = iter([10.0, 20.0, 40.0])

        def ask(self, what):
            assert what == benchmark.STEP
            return {"ms": next(self.times)}

    widths = iter([50.0, 100.0, 25.0])
    monkeypatch.setattr(benchmark, "PAIRS", 3)
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda arrays: next(widths))
    # 400 MB in 10, 20 and 40 ms are 40, 20 and 10 GB/s.
    assert benchmark.against_bandwidth(Asked(), 400_000_000, 1) == (50.0, 0.4)


def test_bandwidth_is_of_this_world():
    assert 0.1 < benchmark.read_bandwidth([np.ones(2**24, np.float32)]) < 10_000


def test_a_worker_that_cannot_load_says_why(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"process of ours stopped: .*no such bundle"):
        benchmark.Worker("ours", tmp_path / "none", 1, 1)


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(PaliGemmaError, match="exists already"):
        benchmark.main(["--folder", str(tmp_path)])
    assert (tmp_path / "mine").read_text() == "mine"


def test_memory_of_this_process():
    before = benchmark.proportional(os.getpid())
    block = np.ones(50_000_000)
    assert benchmark.proportional(os.getpid()) - before > 0.9 * block.nbytes
    assert benchmark.proportional(2**30) == 0
