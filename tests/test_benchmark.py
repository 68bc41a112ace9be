"""python -m export.benchmark: it compares two processes that answer alike, and its arithmetic is right."""

import json
import os
import re
import shutil
import warnings

import numpy as np
import pytest

from export import benchmark, bundle, verify
from export.benchmark import bounds, compare, footprint, peer_service, peers, report, serve, workers
from export.benchmark.peers import pytorch
from export.benchmark.peers.prompt import prompt, text_prompt
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.checkpoint.synthetic import shallower
from numpy_ref.config import VARIANTS
from numpy_ref.engine import Features
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import paligemma

SETTINGS = {"precision": "int4", "prepack": True, "against": "bfloat16", "threads": 1, "rounds": 2}


@pytest.fixture
def of_the_shipped_model(monkeypatch):
    """The command, with the shipped model in place of a random one of full size."""
    monkeypatch.setattr(compare, "written", lambda *_: (SHIPPED, bundle.shipped().path, 0.5))
    monkeypatch.setattr(bounds, "READ", 2**24)
    monkeypatch.setattr(workers, "PAIRS", 2)


def test_both_sides_answer_on_the_shipped_model(of_the_shipped_model, capsys):
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    assert benchmark.main(["--rounds", "2", "--tokens", "3", "--threads", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    (row,) = results["rows"]
    ours, theirs = row["sides"]["ours"], row["sides"]["transformers"]
    timed = {"load_s", "peak_gib", "private_gib", "first_token_s", "ms_per_token"}
    assert ours.keys() - theirs.keys() == {
        "tera_operations_per_s", "bandwidth_gb_per_s", "least_first_token_s", "least_ms_per_token",
        "first_token_over_least", "token_over_least", "early_position", "late_position", "late_step", "outside_share",
        "first_s", "second_s", "second_over_first", "beyond_weights_gib", "export_s", "first_load_s",
    }  # fmt: skip
    assert theirs.keys() == {*timed, "ratios"}
    assert theirs["ratios"].keys() == {"first_token_s", "ms_per_token", "peak_gib"}
    assert all(value > 0 for value in (*ours.values(), *theirs["ratios"].values(), *(theirs[name] for name in timed)))
    assert ours["outside_share"] < 1
    assert ours["private_gib"] <= ours["peak_gib"]
    assert row["reasons"] == {}
    text = report.table(results)
    for name, found in theirs["ratios"].items():
        assert f"{found:.2f}" in text, name


class Shared(compare.Worker):
    """Ours, which is a process of its own; a peer in this one, so that a test can let it fail."""

    def __init__(self, side, *arguments):
        self.side = side
        if side == workers.OURS:
            super().__init__(side, *arguments)
        elif side == "unopened":
            raise PaliGemmaError("the process of unopened stopped: no such kernel")
        self.figures = getattr(self, "figures", {"load_s": 1.0, "peak_gib": 2.0, "private_gib": 1.0})
        self.asked = 0

    def ask(self, what="answer"):
        if self.side == workers.OURS:
            return super().ask(what)
        self.asked += 1
        if self.side == "unsteady" and self.asked > 1:
            raise PaliGemmaError("the process of unsteady stopped: exit code -11")
        return {"first_token_s": 1.0, "ms_per_token": 10.0}

    def close(self):
        if self.side == workers.OURS:
            super().close()


def test_a_peer_that_is_missing_or_fails_leaves_a_line(of_the_shipped_model, monkeypatch, capsys):
    """Not installed, not made, not opened, stopped after a round: the others' figures stand."""

    def unmade(folder, checkpoint):
        raise AssertionError  # in another process, where it is not known at all

    known = {
        "steady": peers.Peer("steady's note", {}, pytorch.transformers),
        "absent": peers.Peer("", {"numpy": "numpy", "no_such_module": "no-such-package"}, pytorch.transformers),
        "unmade": peers.Peer("", {}, pytorch.transformers, unmade),
        "large": peers.Peer("", {}, pytorch.transformers, unmade, memory=1e12),
        "unopened": peers.Peer("", {}, pytorch.transformers),
        "unsteady": peers.Peer("", {}, pytorch.transformers),
    }
    for name, peer in known.items():
        monkeypatch.setitem(peers.PEERS, name, peer)
    monkeypatch.setattr(compare, "Worker", Shared)
    options = ["--rounds", "2", "--tokens", "3", "--threads", "1", "--peers", *known]
    assert benchmark.main([*options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    (row,) = results["rows"]
    assert list(row["sides"]) == ["ours", "steady"]
    assert row["reasons"].keys() == known.keys() - {"steady"}
    text = report.table(results)
    for line in (
        "absent: not installed: pip install no-such-package",
        "unmade: it cannot be made: ",
        "large: making it takes about ",
        "unopened: the process of unopened stopped: no such kernel",
        "unsteady: the process of unsteady stopped: exit code -11",
        "steady: steady's note",
    ):
        assert line in text


def test_transformers_may_be_missing_too(of_the_shipped_model, monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "transformers", peers.Peer("", {"no_torch": "torch"}, pytorch.transformers))
    assert benchmark.main(["--rounds", "1", "--tokens", "2", "--threads", "1"]) == 0
    assert "transformers: not installed: pip install torch\n" in capsys.readouterr().out


def side(first, further, **more):
    return {
        "first_token_s": first, "ms_per_token": further, "load_s": 3.0, "peak_gib": 4.0, "private_gib": 1.0, **more,
    }  # fmt: skip


def shape(variant, layers, jobs):
    """A row of results."""
    ours = side(
        2.0, 50.0, late_position=1000, early_position=270, late_step=1.25, least_first_token_s=1.6,
        first_token_over_least=1.25, least_ms_per_token=20.0, token_over_least=2.5, tera_operations_per_s=0.72,
        bandwidth_gb_per_s=61.3, **jobs,
    )  # fmt: skip
    ratios = {"first_token_s": 2.0, "ms_per_token": 8.0, "peak_gib": 0.5, **dict.fromkeys(jobs, 3.0)}
    theirs = side(4.0, 400.0, ratios=ratios, **{name: value / 3 for name, value in jobs.items()})
    sides = {"ours": ours, "transformers": theirs}
    return {"variant": variant, "layers": layers, "sides": sides, "reasons": {}, "decode_bytes": 1_330_000_000}


def test_the_table_of_several_shapes():
    rows = [
        shape("paligemma2-3b-448", None, {"caption": 6.0, "detect four objects": 4.5}),
        shape("paligemma2-3b-896", 4, {"read a document": 1.5}),
    ]
    lines = report.table({**SETTINGS, "rows": rows}).splitlines()
    assert lines[0] == "int4 bundle, prepacked; transformers in bfloat16; 1 thread, medians of 2 rounds in turns"
    shown = [" ".join(line.split()) for line in lines]
    assert shown[2:6] == [
        "answers a minute ours transformers ratio",
        "caption, 16 tokens paligemma2-3b-448 6.00 2.00 3.00",
        "detect four objects, 31 tokens paligemma2-3b-448 4.50 1.50 3.00",
        "read a document, 128 tokens paligemma2-3b-896, 4 layers a tower 1.50 0.50 3.00",
    ]
    assert shown[8:13] == [
        "paligemma2-3b-448",
        "ours 2.000 50.00 3.0 4.00 1.00",
        "bound 1.600 1.25 20.00 2.50 0.72 TOP/s; 1.33 GB at 61.3 GB/s",
        "a step at 1000 positions takes 1.250 of one at 270",
        "transformers 4.000 2.00 400.00 8.00 3.0 4.00 1.00 0.50",
    ]
    assert shown[13] == "paligemma2-3b-896, 4 layers a tower"
    assert max(map(len, lines)) <= 125


def test_the_matrix_has_every_3b_shape_and_says_where_layers_are_left_out(monkeypatch, capsys, tmp_path):
    assert list(benchmark.MATRIX) == [
        f"{name}-3b-{size}" for size in (224, 448, 896) for name in ("paligemma", "paligemma2")
    ]
    asked = []

    def measured(folder, variant, layers, arguments, threads, more):
        assert folder.is_dir()
        asked.append((variant, layers, arguments.rounds, more))
        return shape(variant, layers, {})

    monkeypatch.setattr(compare, "measure", measured)
    assert benchmark.main(["--matrix", "--folder", str(tmp_path / "work")]) == 0
    assert asked == [(variant, layers, benchmark.MATRIX_ROUNDS, False) for variant, layers in benchmark.MATRIX.items()]
    text = capsys.readouterr().out
    assert all(f"{name}, {layers} layers a tower" in text for name, layers in benchmark.MATRIX.items() if layers)
    assert not (tmp_path / "work").exists()
    asked.clear()
    assert benchmark.main(["--matrix", "--variant", "paligemma2-3b-896", "--layers", "1"]) == 0
    assert asked == [("paligemma2-3b-896", 1, benchmark.MATRIX_ROUNDS, True)]


@pytest.mark.parametrize(
    "options",
    [["--plan"], ["--questions", "--variant", "paligemma-3b-224", "paligemma-3b-448"], ["--peers", "nobody"]],
)
def test_options_that_do_not_go_together(options, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(options)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 300


def test_answers_a_minute():
    """A caption of 16 tokens: two seconds to the first, and fifteen further ones."""
    run = {"first_token_s": 2.0, "ms_per_token": 200.0}
    assert compare.with_jobs(run, 448) == {**run, "caption": 12.0, "detect four objects": 7.5}
    assert compare.with_jobs(run, 896) == {**run, "read a document": 60 / 27.4}
    assert compare.with_jobs(run, 224) == run


def test_the_bound_counts_every_product_once():
    """By hand, for one layer a tower: of the last block, which is the only one, all positions need keys and values."""
    config = shallower(VARIANTS["paligemma2-3b-224"], 1)
    tower = 588 * 1152 + 4 * 1152**2 + 2 * 1152 * 4304 + 1152 * 2304
    one = 2 * 2304 * 2048 + 3 * 2304 * 9216
    assert bounds.operations(config, 263) == 2 * (256 * tower + 263 * 2 * 2304 * 1024 + one)
    deeper = bounds.operations(shallower(config, 1), 263) - bounds.operations(config, 263)
    assert deeper == 0
    two = shallower(VARIANTS["paligemma2-3b-224"], 2)
    block = 4 * 1152**2 + 2 * 1152 * 4304
    further = 2 * (256 * block + 263 * (one + 2 * 2304 * 1024))
    assert bounds.operations(two, 263) - bounds.operations(config, 263) == further


def test_a_bound_and_its_multiples():
    run = {"first_token_s": 3.0, "ms_per_token": 50.0}
    found = compare.beside_bounds(run, 2 * 10**12, 10**12, 10**9, 50.0)
    assert (found["least_first_token_s"], found["least_ms_per_token"]) == (2.0, 20.0)
    assert (found["first_token_over_least"], found["token_over_least"]) == (1.5, 2.5)


@pytest.mark.parametrize("precision", ["int4", "float32"])
def test_the_rate_of_products_is_of_this_world(precision):
    config = shallower(checkpoint.load_config(SHIPPED), 1)
    assert 1e7 < bounds.multiplier(config, precision, 50, 1)() < 1e15


def test_memory_of_export_and_run(of_the_shipped_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(footprint, "synthetic", lambda folder, *_: shutil.copytree(SHIPPED, folder))
    options = ["--memory", "--rounds", "1", "--tokens", "2", "--threads", "1"]
    assert benchmark.main([*options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    (row,) = results["rows"]
    for part in ("export", "run"):
        assert 0 < row[part]["private_gib"] <= row[part]["peak_gib"] < 3
    assert row["export"]["seconds"] > 0
    assert row["bytes"] > 8e6
    assert "load 0." in footprint.table(results) or "load " in footprint.table(results)


def test_what_28b_would_take(capsys):
    options = ["--memory", "--plan", "--precision", "int4", "--variant", "paligemma2-28b-224", "paligemma2-10b-224"]
    assert benchmark.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["paligemma2-28b-224", "55.3", "41.0"]
    assert lines[2].split()[:3] == ["paligemma2-10b-224", "19.3", "13.7"]


def test_transformers_exporter_answers_as_transformers(tmp_path):
    """The peer that is traced, run by ONNX Runtime: PaliGemma 2 with soft caps and windows, prefill and steps."""
    for name in peers.PEERS["exporter"].packages:
        pytest.importorskip(name, reason=f"the peer takes {name}")
    from . import make_goldens

    make_goldens.build("gemma2", text={"attn_logit_softcapping": 2.0}).save_pretrained(tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        peers.PEERS["exporter"].make(tmp_path / "exported", tmp_path / "hf")
    called = []
    tokens = peers.PEERS["exporter"].open(tmp_path / "exported", 1)(6, lambda: called.append(1))
    # What comes before the decoder is in bfloat16, which may be so on the other side, too: then in all of it.
    expected = pytorch.transformers(tmp_path / "hf", 1, "float32")(6, lambda: None)
    assert len(tokens) == 6
    assert called == [1]
    assert tokens == expected


def test_a_decoder_alone_gets_as_many_ids():
    config = checkpoint.load_config(SHIPPED)
    assert len(text_prompt(config)) == len(prompt(config))
    assert config.image_token not in text_prompt(config)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_the_peer_runs_both_versions_and_answers_as_the_reference(tmp_path, kind):
    """Version 2 with its soft caps and windows, which transformers runs eager."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    from . import make_goldens

    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5} if kind == "gemma2" else {}
    make_goldens.build(kind, text=caps).save_pretrained(tmp_path)
    model, loaded = pytorch.load(tmp_path, "float32"), checkpoint.load(tmp_path)
    towers = model.config.text_config, model.config.vision_config
    decoder = {"gemma": "sdpa", "gemma2": "eager"}[kind]
    assert [tower._attn_implementation for tower in towers] == [decoder, "sdpa"]
    ids, pixels = prompt(loaded.config), make_goldens.pixels(model.config, 1)
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


def test_a_second_question_alone(capsys, of_the_shipped_model):
    assert benchmark.main(["--questions", "--rounds", "2", "--threads", "1"]) == 0
    line = capsys.readouterr().out
    assert 0 < float(re.search(r"takes (\d\.\d\d) of the first", line)[1]) < 1


def test_answers_with_boxes_alone(capsys, of_the_shipped_model):
    """The guesses save passes, all the more the more objects there are, and the grammar more than the look-up."""
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
    monkeypatch.setattr(workers.time, "perf_counter", lambda: clock[0])

    def answer(count, first):
        clock[0] += 2
        first()
        clock[0] += 0.25 * (count - 1)

    assert workers.timed(answer, 4) == {"first_token_s": 2, "ms_per_token": 250}


@pytest.mark.parametrize("far", [1000, 200])
def test_a_late_step_is_behind_an_early_one_and_within_the_model(monkeypatch, far):
    monkeypatch.setattr(workers, "FAR", far)
    engine = Session(bundle.shipped(), "cpu")
    found = workers.late_steps(engine)
    late = {1000: engine.max_length - 1, 200: 200}[far]
    assert (found["early_position"], found["late_position"]) == (late - 1, late)
    assert 0 < found["late_step"] < 100


def test_each_begins_as_often():
    assert [compare.rotated(["a", "b", "c"], i) for i in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_medians_and_ratios():
    ours = [{"first_token_s": 1.0, "ms_per_token": value} for value in (10, 20, 90)]
    theirs = [{"first_token_s": 3.0, "ms_per_token": value} for value in (20, 60, 90)]
    assert compare.medians(ours) == {"first_token_s": 1.0, "ms_per_token": 20}
    assert compare.ratios(theirs, ours) == {"first_token_s": 3.0, "ms_per_token": 2.0}
    assert compare.ratios([{"caption": 2.0}], [{"caption": 6.0}]) == {"caption": 3.0}  # a minute: the more the better


def test_a_token_reads_the_decoder_once():
    opened = bundle.shipped()
    text = opened.config.text
    layer = text.width * (2 * text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim + 3 * text.mlp + 2)
    expected = 4 * (text.vocab * text.width + text.depth * layer + text.width)
    assert bounds.weight_bytes(opened.path, "decode") == expected


def test_bandwidth_is_of_this_world():
    assert 0.1 < bounds.read_bandwidth([np.ones(2**24, np.float32)]) < 10_000


def test_a_worker_that_cannot_load_says_why(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"process of ours stopped: .*no such bundle"):
        workers.Worker("ours", tmp_path / "none", 1, 1)


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(PaliGemmaError, match="exists already"):
        benchmark.main(["--folder", str(tmp_path)])
    assert (tmp_path / "mine").read_text() == "mine"


def test_memory_of_this_process():
    before = workers.memory(os.getpid())
    block = np.ones(50_000_000)
    after = workers.memory(os.getpid())
    assert all(after[name] - before[name] > 0.9 * block.nbytes for name in ("Pss", "Anonymous"))
    assert set(workers.memory(2**30).values()) == {0}


def test_mapped_files_are_not_private(tmp_path):
    (tmp_path / "file").write_bytes(bytes(400_000_000))
    before = workers.memory(os.getpid())
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    assert mapped.sum() == 0
    after = workers.memory(os.getpid())
    assert after["Pss"] - before["Pss"] > 0.9 * len(mapped)
    assert after["Anonymous"] - before["Anonymous"] < 0.1 * len(mapped)


def test_services_side_by_side(capsys):
    serve.main(["--clients", "1", "2", "--requests", "4", "--rounds", "1", "--beside-transformers", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("same_answers") == 1
    assert list(found) == ["serve-onnx", "transformers"]
    for figures in found.values():
        assert list(figures) == ["1", "2"]
        assert all(figure > 0 for by_count in figures.values() for figure in by_count.values())


def test_a_table_of_services():
    run = serve.Run(seconds=2, requests=4, tokens=8, first=[0.1] * 4, gaps=[0.01] * 4)
    lines = serve.table({"a": {1: run.figures(), 8: {**run.figures(), "requests_per_s": 5.0}}}).splitlines()
    assert lines[2].split() == ["a", "1", "2", "1.00", "100.0", "100.0", "100.0", "10.0", "10.0", "10.0"]
    assert lines[3].split()[:4] == ["a", "8", "5", "2.50"]


def test_services_that_cannot_be_compared(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        serve.main([str(tmp_path), "--beside-transformers"])
    assert "a bundle is no checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(peer_service, "NEEDED", ("no_such_package",))
    with pytest.raises(PaliGemmaError, match="needs no_such_package: pip install"):
        serve.main(["--beside-transformers"])
