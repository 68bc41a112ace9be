"""Where an answer ends: as in transformers, wherever a checkpoint says so, on every engine."""

import json

import numpy as np
import pytest

from export import bundle
from numpy_ref import checkpoint
from numpy_ref.generate import answers, generate

from . import make_goldens
from .make_goldens import PREFIXES
from .test_golden import ENGINES, open_engine

transformers = pytest.importorskip("transformers", reason="it is compared with transformers")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint without any eos, and what it answers to the end."""
    folder = tmp_path_factory.mktemp("saved")
    make_goldens.build("gemma").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config["text_config"]):
        section.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder, theirs(folder)


def theirs(folder):
    """The tokens of transformers' own loop, which reads both files."""
    import torch

    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([make_goldens.row_ids(model.config, PREFIXES[0])])
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=ids, pixel_values=torch.from_numpy(make_goldens.pixels(model.config, 1)), do_sample=False,
            token_type_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
    return tokens[0, ids.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("top", "text", "generation"),
    [
        ("a", None, None), (None, "a", None), ("b", "a", None), (["z", "a"], None, None), (None, ["b", "a"], None),
        ("a", None, "b"), ("a", None, ["z", "b"]), ("a", "a", []), ("a", None, "absent"),
    ],
)  # fmt: skip
def test_stops_are_those_of_transformers(saved, tmp_path, top, text, generation):
    folder, whole = saved
    distinct = list(dict.fromkeys(whole))
    ids = {"a": distinct[1], "b": distinct[2], "z": next(i for i in range(3, 200) if i not in whole)}

    def spelled(value):
        return [ids[each] for each in value] if isinstance(value, list) else ids.get(value)

    changed = tmp_path / "checkpoint"
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["eos_token_id"] = spelled(text)
    if top:
        config["eos_token_id"] = spelled(top)
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "generation_config.json").unlink()
    if generation is not None:
        asked = {} if generation in ("absent", []) else {"eos_token_id": spelled(generation)}
        (changed / "generation_config.json").write_text(json.dumps(asked))
    expected = theirs(changed)
    assert (len(expected) < NEW_TOKENS) == (generation not in ("absent", []))
    loaded = checkpoint.load(changed)
    for kind in ENGINES:
        engine = open_engine(kind, loaded, tmp_path / "bundle")
        pixels = make_goldens.pixels(_Config(config), 1)
        prompts = [make_goldens.row_ids(_Config(config), PREFIXES[0])]
        tokens = list(generate(engine, pixels, prompts, np.ones(config["text_config"]["vocab_size"], bool), NEW_TOKENS))
        assert [int(token[0]) for token in tokens] == expected, kind
        ended = len(expected) < NEW_TOKENS or expected[-1] in engine.config.ends
        assert answers(tokens, engine.config.ends) == [expected[:-1] if ended else expected]
    assert bundle.load(tmp_path / "bundle").description.tokens.stops == list(loaded.config.ends)


class _Config:
    """As much of transformers' config object as the goldens' functions read."""

    def __init__(self, config):
        self.vision_config = type("Vision", (), config["vision_config"])
        self.image_token_index = config["image_token_index"]


def test_what_generation_config_asks_and_nobody_does_is_named(saved, tmp_path, capsys):
    folder, _ = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    asked = {"eos_token_id": 1, "repetition_penalty": 1.3, "suppress_tokens": [4], "cache_implementation": "hybrid"}
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    checkpoint.load(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "generation_config.json asks for repetition_penalty 1.3, suppress_tokens [4]; that is not done" in line
