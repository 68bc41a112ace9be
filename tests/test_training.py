"""Training: the loss, the rate, what a kill costs (nothing), and a user's own data."""

import csv
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from export import bundle
from numpy_ref import checkpoint, files
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import preprocess
from numpy_ref.model import paligemma, segmentation
from numpy_ref.tokenizer import SentencePiece, Tokenizer
from torch_impl.load import from_params, load, to_params
from torch_impl.model.paligemma import PaliGemma
from torch_impl.train import data, loop, pretrain, recipe
from torch_impl.train import tokenizer as tokenizer_training
from torch_impl.train.finetune import fingerprint, prefix_lm_loss, take_vision

from . import faults
from .models import CONFIGS, random_batch, random_params
from .test_checkpoint import same

CONFIG = checkpoint.load_config(SHIPPED)
SETTINGS = loop.Settings(12, 4, peak=1e-3, warmup=3, bfloat16=False)


def test_the_loss_is_the_mean_over_suffix_tokens_then_rows():
    """Against the formula written out over the reference's logits."""
    config = CONFIGS["paligemma1"]
    params = random_params(config)
    model = from_params(config, params, torch.float64)
    rng = np.random.default_rng(0)
    pixels, _, _ = random_batch(config)
    image = [config.image_token] * config.vision.patches
    examples = [
        (pixels[i].astype(np.float64), [*image, 2, *rng.integers(3, 50, n)], [*rng.integers(3, 50, m), config.eos])
        for i, (n, m) in enumerate([(3, 2), (1, 5), (4, 1)])
    ]
    batch = data.collate(examples, config.pad)
    loss = prefix_lm_loss(model, batch)

    logits = paligemma.forward(
        params, config, batch["pixel_values"].numpy(), batch["input_ids"].numpy(),
        batch["lengths"].numpy(), batch["prefix_lengths"].numpy(),
    )  # fmt: skip
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = []
    for row, (_, prompt, suffix) in zip(log_probabilities, examples, strict=True):
        places = range(len(prompt) - 1, len(prompt) + len(suffix) - 1)
        rows.append(-np.mean([row[place, token] for place, token in zip(places, suffix, strict=True)]))
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_the_loss_of_several_pictures(tmp_path, tokenizer):
    """A file whose lines have two each: the loss is that of a forward over each row, put together by hand."""
    config, colors = tokenizer.config, ("red", "teal", "navy")
    for i, color in enumerate(colors):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{i}.png")
    asked = [((0, 1), "caption en", "a star"), ((2, 0), "same?", "no, a ring and a cross")]
    lines = [{"image": [f"{i}.png" for i in shown], "prefix": prompt, "suffix": text} for shown, prompt, text in asked]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = from_params(config, random_params(config), torch.float64)
    examples = data.JsonLines(tmp_path / "data.jsonl", tokenizer, "bicubic", 0)
    batch = data.collate([examples[0], examples[1]], config.pad)
    batch["pixel_values"] = batch["pixel_values"].double()

    size, places = config.vision.image_size, [config.image_token] * config.vision.patches
    losses = []
    for shown, prefix, text in asked:
        pictures = [preprocess(Image.new("RGB", (9, 9), colors[i]), size, np.float64) for i in shown]
        prompt = [*places, *places, config.bos, *tokenizer.encode(prefix), *tokenizer.encode("\n")]
        suffix = [*tokenizer.encode(text), config.eos]
        lengths = torch.tensor([[len(prompt) + len(suffix)], [len(prompt)]])
        logits = model(torch.from_numpy(np.concatenate(pictures)), torch.tensor([[*prompt, *suffix]]), *lengths)
        losses.append(torch.nn.functional.cross_entropy(logits[0, len(prompt) - 1 : -1], torch.tensor(suffix)))
    assert prefix_lm_loss(model, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_no_gradient_from_padding():
    """Changing what is padded changes neither loss nor gradient."""
    config = CONFIGS["paligemma1"]
    model = from_params(config, random_params(config), torch.float64)
    pixels, ids, lengths = random_batch(config)
    examples = [
        (p.astype(np.float64), row[: n - 1].tolist(), [7, 1]) for p, row, n in zip(pixels, ids, lengths, strict=True)
    ]
    gradients = []
    for pad in (0, 9):
        model.zero_grad()
        prefix_lm_loss(model, data.collate(examples, pad)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


def test_the_learning_rate():
    settings = replace(SETTINGS, steps=1000, peak=1.0, warmup=100, decay=0.5)
    rates = [loop.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == rates[500] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert 0 < rates[-1] < 0.01
    assert rates[775] == pytest.approx(0.5, abs=0.01)


def test_the_tokenizer_repeats():
    first, second = (tokenizer_training.train_tokenizer(0) for _ in range(2))
    assert first == second
    config = recipe.small_config()
    tokenizer = Tokenizer(SentencePiece(first), config)
    assert len(tokenizer.encode("an orange star, a blue circle and a white cross on a striped ground")) == 15
    assert tokenizer.size == config.image_token == tokenizer_training.VOCAB


# --- the loop ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(SHIPPED, CONFIG)


def fresh(seed=0):
    torch.manual_seed(seed)
    model = PaliGemma(CONFIG)
    pretrain.initialise(model)
    return model


def run(folder, tokenizer, settings, model=None, **options):
    """Train a fresh model on scenes."""
    model = model or fresh()
    examples = data.Scenes(tokenizer, segmentation.load(segmentation.find(SHIPPED)), CONFIG.vision.image_size, seed=3)
    loop.fit(model, prefix_lm_loss, examples, partial(data.collate, pad=0), settings, folder, **options)
    return to_params(model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_steps_lower_the_loss(tmp_path, tokenizer, optimizer):
    model = fresh()
    run(tmp_path, tokenizer, replace(SETTINGS, steps=40, batch_size=8, optimizer=optimizer), model)
    examples = data.Scenes(tokenizer, segmentation.load(segmentation.find(SHIPPED)), CONFIG.vision.image_size, seed=99)
    batch = data.collate([examples[i] for i in range(32)], 0)
    with torch.inference_mode():
        assert prefix_lm_loss(model, batch) < 0.7 * prefix_lm_loss(fresh(), batch)
    with (tmp_path / loop.LOG).open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[-1]["step"] == "40"
    assert set(rows[0]) == {"step", "seconds", "loss", "rate"}


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "adamw"}, {"optimizer": "muon", "bfloat16": True}, {"accumulate": 2, "batch_size": 2}],
    ids=["adamw", "muon in bfloat16", "accumulated"],
)
def test_interrupted_or_not_the_weights_are_the_same(tmp_path, tokenizer, changes, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 5)
    settings = replace(SETTINGS, **changes)
    whole = run(tmp_path / "whole", tokenizer, settings)
    step, steps = loop.take_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 8:
            raise StopError
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", interrupted)
    with pytest.raises(StopError):
        run(tmp_path / "parts", tokenizer, settings, save_every=0)
    monkeypatch.setattr(loop, "take_step", step)
    assert same(run(tmp_path / "parts", tokenizer, settings), whole)
    logs = []
    for name in ("whole", "parts"):
        with (tmp_path / name / loop.LOG).open() as stream:
            logs.append(list(csv.DictReader(stream)))
    assert [[row[key] for key in ("step", "loss", "rate")] for row in logs[0]] == [
        [row[key] for key in ("step", "loss", "rate")] for row in logs[1]
    ]


def test_a_kill_costs_no_more_than_the_last_interval(tmp_path, tokenizer, monkeypatch):
    """By a clock on which a step takes a second and all else nothing."""
    clock, step = itertools.count(), loop.take_step
    now = [next(clock)]

    def timed(*arguments):
        now[0] = next(clock)
        if now[0] == 11:
            raise StopError
        return step(*arguments)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "take_step", timed)
    with pytest.raises(StopError):
        run(tmp_path, tokenizer, SETTINGS, save_every=2.5)
    assert faults.steps_of(tmp_path / loop.STATE) == 9  # kept after steps 3, 6 and 9


def test_left_overs_of_a_killed_run_are_removed(tmp_path, tokenizer):
    """Its own, and those of the library that writes the state."""
    for name in ("state.123.part", ".tmpAbC123"):
        (tmp_path / name).write_bytes(b"half")
    run(tmp_path, tokenizer, replace(SETTINGS, steps=1))
    assert {file.name for file in tmp_path.iterdir()} == {loop.STATE, loop.LOG}


def test_a_state_that_cannot_be_kept(tmp_path, tokenizer, monkeypatch):
    """The folder vanishes in the middle: one line that names it."""
    step = loop.take_step

    def vanish(*arguments):
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", vanish)
    with pytest.raises(PaliGemmaError, match=r"state/(log\.csv: cannot be written|state\.safetensors: cannot keep)"):
        run(tmp_path / "state", tokenizer, replace(SETTINGS, steps=2), save_every=0)


def test_a_full_disk_keeps_the_state_that_was_kept(tmp_path, tokenizer):
    """No file may grow: training says so in one line, what was kept before is whole, and the next run goes on."""
    once, twice = (replace(SETTINGS, steps=steps) for steps in (1, 2))
    run(tmp_path, tokenizer, once)
    kept = (tmp_path / loop.STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(PaliGemmaError, match=r"state\.safetensors: cannot keep the state of training .*too large"):
            run(tmp_path / "new", tokenizer, twice)
        with pytest.raises(PaliGemmaError, match="cannot keep"):
            loop._save(tmp_path / loop.STATE, fresh(), [], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / loop.STATE).read_bytes() == kept
    run(tmp_path / "new", tokenizer, twice)
    assert faults.steps_of(tmp_path / "new" / loop.STATE) == 2
    assert {file.name for file in (tmp_path / "new").iterdir()} == {loop.STATE, loop.LOG}


def damaged(change):
    """A function that changes what a state file says of itself, or its tensors."""

    def apply(file):
        with safe_open(file, framework="pt") as stored:
            progress = json.loads(stored.metadata()["progress"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        progress = change(progress, tensors) or progress
        save_file(tensors, file, {"progress": json.dumps(progress)})

    return apply


def entries(**changes):
    return damaged(lambda progress, tensors: {**progress, **changes})


def without(key):
    return damaged(lambda progress, tensors: {name: value for name, value in progress.items() if name != key})


def reshape(progress, tensors):
    name = next(name for name in tensors if name.endswith("exp_avg") and tensors[name].dim() == 2)
    tensors[name] = tensors[name].T.contiguous()


def forget_moments(progress, tensors):
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def add_nameless(progress, tensors):
    tensors["optimizer"] = torch.zeros(1)
    return {**progress, "tensors": sorted(tensors)}


DAMAGES = {
    "a list": damaged(lambda progress, tensors: [progress]),
    "a number": damaged(lambda progress, tensors: 7),
    "no settings": without("settings"),
    "no step": without("step"),
    "no tensors": without("tensors"),
    "step as text": entries(step="1"),
    "step of nobody": entries(step=10**9),
    "step below zero": entries(step=-500),
    "no curve": entries(curve=None),
    "short rows": entries(curve=[[1, 2]]),
    "losses as text": entries(recent=["x"]),
    "settings as text": entries(settings="x"),
    "another shape": damaged(reshape),
    "no moments": damaged(forget_moments),
    "a nameless tensor": damaged(add_nameless),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_one_line(tmp_path, tokenizer, damage):
    run(tmp_path, tokenizer, replace(SETTINGS, steps=1))
    DAMAGES[damage](tmp_path / loop.STATE)
    with pytest.raises(PaliGemmaError, match=r"state\.safetensors: (not a state of training|a state of another model)"):
        run(tmp_path, tokenizer, replace(SETTINGS, steps=1))


def test_accumulated_batches_are_one_larger_batch(tmp_path, tokenizer):
    once = run(tmp_path / "once", tokenizer, replace(SETTINGS, steps=1, batch_size=6))
    twice = run(tmp_path / "twice", tokenizer, replace(SETTINGS, steps=1, batch_size=3, accumulate=2))
    start = checkpoint.flatten(to_params(fresh()))
    for name, array in checkpoint.flatten(once).items():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is noise, which Adam makes a step of
            assert np.allclose(array, checkpoint.flatten(twice)[name], atol=1e-4), name
    assert any(not np.array_equal(array, start[name]) for name, array in checkpoint.flatten(once).items())


def test_frozen_parts_stay(tmp_path, tokenizer):
    before = checkpoint.flatten(to_params(fresh()))
    after = checkpoint.flatten(run(tmp_path, tokenizer, replace(SETTINGS, steps=2, freeze=("vision", "projector"))))
    for name, array in after.items():
        moved = not np.array_equal(array, before[name])
        assert moved != name.startswith(("vision.", "projector.")), name


def test_two_at_once_are_refused(own_data, tmp_path):
    """The second does not go on from the state of the first, nor remove what that is writing."""
    arguments = ["-m", "torch_impl.train", "--data", own_data, "--output", tmp_path / "out", "--batch-size", "2",
                 "--steps", "3000", "--save-every", "0"]  # fmt: skip
    first = subprocess.Popen([sys.executable, *map(str, arguments)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        state = tmp_path / "out.training" / loop.STATE
        while not state.exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = call("--data", own_data, "--output", tmp_path / "out", "--batch-size", "2", "--steps", "3000",
                      "--save-every", "0")  # fmt: skip
        assert second.returncode == 1
        assert "out.training: another process is at work in it" in second.stderr.splitlines()[-1]
        assert first.poll() is None
        before = faults.steps_of(state)
        while faults.steps_of(state) == before:
            assert first.poll() is None
            time.sleep(0.05)
    finally:
        first.kill()  # and not its loader, which must not keep the lock
        first.wait()
    with files.claimed(tmp_path / "out.training"):
        assert state.exists()
    os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.parametrize("change", ["no moments", "one moment fewer", "another's moments"])
def test_a_state_without_its_moments_is_not_taken(tmp_path, tokenizer, change):
    """Though it says itself that it is complete."""
    run(tmp_path, tokenizer, replace(SETTINGS, steps=1))
    file = tmp_path / loop.STATE
    tensors = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    with safe_open(file, "pt") as stored:
        progress = json.loads(stored.metadata()["progress"])
    moments = [name for name in tensors if name.startswith("optimizer.")]
    gone = moments if change == "no moments" else moments[:1]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    if change == "another's moments":
        kept[f"{gone[0].rpartition('.')[0]}.momentum_buffer"] = tensors[gone[0]].clone()
    save_file(kept, file, {"progress": json.dumps({**progress, "tensors": sorted(kept)})})
    with pytest.raises(PaliGemmaError, match="a state of another model"):
        run(tmp_path, tokenizer, replace(SETTINGS, steps=1))


def test_another_run_is_not_gone_on_with(tmp_path, tokenizer):
    run(tmp_path, tokenizer, replace(SETTINGS, steps=1))
    with pytest.raises(PaliGemmaError, match=r"was begun with steps 1, batch_size 4"):
        run(tmp_path, tokenizer, replace(SETTINGS, steps=2, batch_size=5))
    (tmp_path / loop.STATE).write_bytes(b"nonsense")
    with pytest.raises(PaliGemmaError, match="not a state of training"):
        run(tmp_path, tokenizer, SETTINGS)


def test_contrastive_pretraining_learns(tmp_path, tokenizer):
    """After so few steps the right caption of 100 is found far more often than by chance."""
    settings = replace(pretrain.SETTINGS, steps=60, batch_size=32, warmup=10)
    model, curve = pretrain.pretrain(CONFIG, tokenizer, settings, tmp_path, "siglip")
    assert curve[-1][2] < 3
    assert pretrain.recall(model, tokenizer, 100) > 0.05


# --- a user's own data -------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path):
    return faults.own_data(tmp_path / "data")


def test_picture_tokens_in_front_are_warned_of_once(own_data, tokenizer, capsys):
    rows = [json.loads(line) for line in own_data.read_text().splitlines()]
    lines = [json.dumps(row | {"prefix": f"<image>{row['prefix']}"}) for row in rows]
    own_data.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    examples = data.JsonLines(own_data, tokenizer, "bicubic", 0)
    assert len(examples.rows) == len(rows) > 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "line 1: warning: the prompt begins with <image>" in line


def command(*arguments):
    return [sys.executable, "-m", "torch_impl.train", *map(str, arguments)]


def call(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


def test_fine_tuning_end_to_end(own_data, tmp_path):
    """Own data in, a directory out that exports, that transformers loads, and that answers right."""
    output = tmp_path / "tuned"
    result = call("--data", own_data, "--output", output, "--steps", 60, "--batch-size", 6, "--learning-rate", 1e-3)
    assert result.returncode == 0, result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"data", "tuned"}
    model, loaded = load(output)
    tokenizer = Tokenizer.load(output, loaded.config)
    batch = data.collate([data.JsonLines(own_data, tokenizer, "bicubic", 0)[i] for i in range(12)], 0)
    with torch.inference_mode():
        assert prefix_lm_loss(model, batch) < 0.05
    bundle.write(loaded, tmp_path / "bundle")
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    foreign = transformers.PaliGemmaForConditionalGeneration.from_pretrained(output)
    assert foreign.config.text_config.vocab_size == loaded.config.text.vocab
    record = json.loads((output / "training.json").read_text())
    assert record["arguments"]["steps"] == 60
    assert (output / loop.LOG).read_text().startswith("step,seconds,loss,rate")


def test_bfloat16_results(own_data, tmp_path):
    result = call("--data", own_data, "--output", tmp_path / "out", "--steps", 1, "--save-dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert str(checkpoint.load(tmp_path / "out").dtype) == "bfloat16"


def test_killed_at_random_moments(own_data, tmp_path):
    """SIGKILL, again and again: in the end the weights are those of a run that was left alone."""
    options = ["--data", own_data, "--steps", 40, "--batch-size", 2, "--learning-rate", 1e-3, "--float32"]
    assert call(*options, "--output", tmp_path / "whole").returncode == 0
    moments, kills = random.Random(0), 0
    state, result = tmp_path / "parts.training" / loop.STATE, tmp_path / "parts"
    while not result.exists():
        before = modified(state)
        process = subprocess.Popen(
            command(*options, "--output", result, "--save-every", 0), stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        # Every run gets as far as keeping something, and no further than a random while after that.
        while kills < 5 and process.poll() is None and modified(state) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        if kills < 5 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert kills > 1
    assert same(checkpoint.load(result).params, checkpoint.load(tmp_path / "whole").params)


def modified(file) -> int:
    """When a file was last written; 0 if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_changed_data_are_not_gone_on_with(own_data, tmp_path, tokenizer):
    """A run that was begun with other lines is refused; the state stays for whoever puts the lines back."""
    first, once = fingerprint(own_data), replace(SETTINGS, steps=1)
    run(tmp_path / "state", tokenizer, once, about={"from": first})
    own_data.write_text(own_data.read_text() + "\n")
    assert fingerprint(own_data) != first
    with pytest.raises(PaliGemmaError, match="was begun with from"):
        run(tmp_path / "state", tokenizer, once, about={"from": fingerprint(own_data)})
    assert (tmp_path / "state" / loop.STATE).exists()
    assert fingerprint(SHIPPED) == fingerprint(SHIPPED) != fingerprint(None)


def test_a_broken_picture_is_named_by_its_line(own_data, tmp_path):
    """It is opened in another process, in the middle of training; still one line, with the place."""
    (own_data.parent / "3.png").write_bytes((own_data.parent / "3.png").read_bytes()[:40])
    result = call("--data", own_data, "--output", tmp_path / "out", "--steps", 30, "--batch-size", 2)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "line 4" in result.stderr
    assert "3.png" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_pretrained_tower_is_taken_over(tmp_path, tokenizer):
    output = tmp_path / "towers"
    assert pretrain.main(["--output", str(output), "--steps", "2", "--batch-size", "4", "--loss", "clip"]) == 0
    record = json.loads((output / "pretraining.json").read_text())
    assert record["loss"] == "clip"
    assert 0 <= record["recall_at_1"] < 0.1
    model = fresh()
    before = model.vision.norm.bias.clone()
    take_vision(model, output)
    stored = load_file(output / "model.safetensors")
    assert np.array_equal(model.vision.norm.bias.detach().numpy(), stored["vision.norm.bias"])
    assert not torch.equal(model.vision.norm.bias, before)
    assert stored["log_temperature"].shape == ()
    with pytest.raises(PaliGemmaError, match="not of this model's sizes"):
        take_vision(PaliGemma(CONFIGS["paligemma1"]), output)


def test_the_whole_recipe_in_small(tmp_path, monkeypatch):
    """Tokenizer, codec, contrastive stage and all tasks, killed between stages and gone on with."""
    monkeypatch.setattr(recipe, "train_codec", lambda seed: (segmentation.load(segmentation.find(SHIPPED)), []))
    small = replace(SETTINGS, steps=3, batch_size=4)
    whole, _, record = recipe.train_all(tmp_path / "whole", 0, small, small, small)
    assert record.keys() == {"mask codec", "contrastive", "all tasks", "mostly captions"}
    assert record["all tasks"]["curve"]["rows"][-1][0] == 3
    fit = recipe.fit
    monkeypatch.setattr(recipe, "fit", lambda *arguments, **options: (_ for _ in ()).throw(StopError))
    with pytest.raises(StopError):
        recipe.train_all(tmp_path / "parts", 0, small, small, small)
    monkeypatch.setattr(recipe, "fit", fit)
    again, _, _ = recipe.train_all(tmp_path / "parts", 0, small, small, small)
    assert same(to_params(again), to_params(whole))
    with pytest.raises(PaliGemmaError, match="begun with seed 0"):
        recipe.train_all(tmp_path / "parts", 1, small, small, small)


def test_evaluating_and_drawing_from_the_command_line(tmp_path):
    """Through the bundle; only what is printed and drawn is looked at here."""
    modules = {name: [sys.executable, "-m", f"export.{name}"] for name in ("evaluate", "gallery")}
    result = subprocess.run([*modules["evaluate"], "--scenes", "3", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == {"caption", "answer", "detect_f1", "segment_miou", "confidence", "compositional"}
    assert found["compositional"].keys() == found.keys() - {"compositional"}
    table = subprocess.run([*modules["evaluate"], "--scenes", "3"], capture_output=True, text=True).stdout
    assert f"{found['caption']:.1%}" in table
    assert found["confidence"].keys() == found["compositional"]["confidence"].keys() == {"caption", "answer", "detect"}
    precision = found["confidence"]["detect"]["average_precision"]
    assert re.search(rf"^average precision +{precision:.1%}$", table, re.MULTILINE)
    rows = found["confidence"]["answer"]["reliability"]
    assert sum(row["count"] for row in rows) == 3
    drawn = subprocess.run(
        [*modules["gallery"], tmp_path / "out.png", "--columns", "1"], capture_output=True, text=True
    )
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 448 * 3 // 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 13: not an object"),
        ('{"image": "0.png", "prefix": "a"}', "line 13: not an object with"),
        ('{"image": "0.png", "prefix": "a", "suffix": 3}', "line 13: image, prefix and suffix must be text"),
        (
            '{"image": "data:image/png;base64,' + "A" * 5000 + '", "prefix": "a", "suffix": "b"}',
            "line 13: no such picture",
        ),
        ('{"image": "0.png", "prefix": "a", "suffix": "\\ud800"}', "line 13: the text"),
        ('{"image": "99.png", "prefix": "a", "suffix": "b"}', "line 13: no such picture"),
        ('{"image": ["0.png", "99.png"], "prefix": "a", "suffix": "b"}', "line 13: no such picture"),
        ('{"image": ["0.png", 3], "prefix": "a", "suffix": "b"}', "line 13: image, prefix and suffix must be text"),
        ('{"image": [], "prefix": "a", "suffix": "b"}', "line 13: image, prefix and suffix must be text"),
        ('{"image": ["0.png", "1.png"], "prefix": "a", "suffix": "b"}', "line 13: 2 pictures, but line 1 has 1"),
        ('{"image": "0.png", "prefix": "a", "suffix": "' + "long " * 99 + '"}', "the model has room for 256"),
    ],
)
def test_a_wrong_line_is_named(own_data, tmp_path, line, words):
    with own_data.open("a") as stream:
        stream.write(line + "\n")
    result = call("--data", own_data, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"data"}


def test_no_masks_without_a_codec(tmp_path):
    bare = shutil.copytree(SHIPPED, tmp_path / "bare", ignore=shutil.ignore_patterns("vae.npz"))
    result = call("--init", bare, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "no vae.npz" in result.stderr
