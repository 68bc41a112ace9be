"""knows.json: what a model was taught, said by the model itself, and hints for what it was not."""

import itertools
import json
import shutil

import numpy as np
import pytest

from export import bundle
from numpy_ref import checkpoint, knows, things
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image
from numpy_ref.scenes import evaluate
from numpy_ref.scenes import questions as shape_questions
from numpy_ref.things import demo
from numpy_ref.things import questions as thing_questions

WHOLE = {
    "about": "two things",
    "scenes": "things",
    "prompts": ["caption en", "detect {a} ; {a}"],
    "words": {"a": ["dog", "red dog"]},
}


@pytest.fixture(scope="module")
def shipped():
    return knows.load(SHIPPED)


def test_prompts_that_fit():
    known = knows.parse(WHOLE, "x")
    assert known.covers("caption en")
    assert known.covers("detect red dog ; dog")
    for other in (
        "caption",
        "caption en ",
        "detect dog",
        "detect cat ; dog",
        "detect dog ; dog ; dog",
        "",
        "Caption en",
    ):
        assert not known.covers(other), other
        assert '"detect dog ; dog"' in known.hint(other)
    assert known.hint("caption en") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"about": "a\nb"}, "about"), ({"about": 3}, "about"), ({"scenes": "birds"}, "scenes"), ({"prompts": []}, "prompts"),
        ({"prompts": ["detect {b}"]}, "prompts"), ({"prompts": ["{a}{a}{a}"]}, "prompts"), ({"words": {"a": "dog"}}, "words"),
        ({"words": {"a": [""]}}, "words"), ({"examples": [{"picture": 1, "prompts": ["x"]}]}, "examples"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, words):
    with pytest.raises(PaliGemmaError, match=f"^knows.json: {words}"):
        knows.parse({**WHOLE, **change}, "knows.json")


def test_every_question_that_is_trained_is_covered(shipped):
    rng = np.random.default_rng(2)
    for _ in range(500):
        question = shape_questions.random_question(rng, lambda mask, box: "")
        assert shipped.covers(question.prefix), question.prefix
    known = knows.parse(demo.knowledge([]), "it")
    for i in range(600):
        task = thing_questions.MEASURED[i % len(thing_questions.MEASURED)]
        question = thing_questions.random_question(rng, lambda mask, box: "", task, compositional=bool(i % 2))
        assert known.covers(question.prefix), question.prefix
    assert not known.covers("detect unicorn")


def test_the_bundle_says_the_same(shipped):
    assert knows.load(bundle.shipped().path) == shipped


def test_a_wrong_file_is_not_exported(tmp_path):
    source = shutil.copytree(SHIPPED, tmp_path / "source")
    (source / knows.FILE).write_text(json.dumps({**WHOLE, "scenes": "birds"}))
    with pytest.raises(PaliGemmaError, match="scenes is not one of"):
        bundle.write(checkpoint.load(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_preset_is_answered_right(shipped):
    """About the pictures that ship, through the bundle, as the page asks."""
    from export import PaliGemma as Bundled

    model = Bundled.load()
    assert shipped.examples
    for example in shipped.examples:
        picture = open_image(SHIPPED / example["picture"])
        scene, prompts = scene_of(picture, shipped), example["prompts"]
        assert len(prompts) >= 4
        for prompt in prompts:
            assert shipped.covers(prompt)
            question = question_about(scene, prompt)
            answer = model.answer(picture, prompt)
            assert evaluate.is_right(answer, question), (prompt, answer.text)


def scene_of(picture, known):
    """The scene that the picture was drawn from."""
    from torch_impl.train import recipe

    if known.scenes == "shapes":
        return recipe.example_scene()
    found = itertools.chain(*(itertools.islice(demo.candidates(kind), demo.MOST_TRIED) for kind in demo.KINDS))
    return next(scene for scene in found if np.array_equal(scene.draw(224), picture))


def question_about(scene, prompt):
    """The question of a prompt, with the answer that follows from the scene."""
    if isinstance(scene, things.Scene):
        return next(question for question in demo.ask(scene) if question.prefix == prompt)
    task, _, rest = prompt.partition(" ")
    named = [i for i, thing in enumerate(scene.things) if rest in (thing.shape, thing.name)]
    if task == "caption":
        return shape_questions.Question(scene, task, prompt, shape_questions.caption(scene))
    if task == "detect":
        return shape_questions.Question(scene, task, prompt, shape_questions.detect(scene, rest.split(" ; ")))
    if task == "segment":
        (target,) = named
        return shape_questions.Question(scene, task, prompt, shape_questions.detect(scene, [rest]), target)
    shape = rest.removeprefix("en how many ").removesuffix("s are there?")
    return shape_questions.Question(scene, task, prompt, str(sum(thing.shape == shape for thing in scene.things)))


def test_a_hint_on_stderr(shipped, capfd):
    from export.cli import run_onnx

    picture = str(SHIPPED / "example.png")
    assert run_onnx([picture, "what is the meaning of life"]) == 0
    shown = capfd.readouterr()
    assert shown.err.startswith("hint: this model was not taught such a prompt")
    assert shipped.about in shown.err
    assert run_onnx([picture, "detect star"]) == 0
    assert capfd.readouterr().err == ""


def test_a_model_that_does_not_say_gets_no_hint(tmp_path, capfd):
    from numpy_ref.__main__ import main

    source = shutil.copytree(SHIPPED, tmp_path / "source")
    (source / knows.FILE).unlink()
    assert main([str(source), str(SHIPPED / "example.png"), "detect cat", "--max-new-tokens", "2"]) == 0
    assert capfd.readouterr().err == ""
