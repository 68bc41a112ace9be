"""How well confidence goes with being right: each figure by hand."""

import pytest

from export.evaluate import confidence_table
from numpy_ref.answer import Answer
from numpy_ref.detection import Box
from numpy_ref.scenes import Scene, confidence, evaluate
from numpy_ref.scenes.confidence import Bin
from numpy_ref.scenes.questions import Question


def test_a_reliability_table():
    """Bins are closed below, and the last one above; those in which nothing is are left out."""
    table = confidence.reliability([0.1, 0.19, 0.2, 0.95, 1.0, 1.0], [True, False, False, True, True, False])
    assert [(row.least, row.most, row.count) for row in table] == [(0.1, 0.2, 2), (0.2, 0.3, 1), (0.9, 1.0, 3)]
    assert [row.confidence for row in table] == pytest.approx([0.145, 0.2, 2.95 / 3])
    assert [row.right for row in table] == pytest.approx([0.5, 0, 2 / 3])
    assert confidence.reliability([], []) == []
    (row,) = confidence.reliability([0.3, 0.6], [True, True], bins=1)
    assert row == Bin(0.0, 1.0, 2, pytest.approx(0.45), 1.0)


def test_the_calibration_error():
    table = [Bin(0, 0.5, 1, 0.4, 1.0), Bin(0.5, 1, 3, 0.9, 0.8)]
    assert confidence.calibration_error(table) == pytest.approx((0.6 + 3 * 0.1) / 4)
    assert confidence.calibration_error([]) == 0


def test_the_risk_at_a_coverage():
    """Of ten answers the nine surest: the one that is left out is wrong, and so is another."""
    sure, right = [0.9, 0.1, *[0.8] * 8], [False, False, *[True] * 8]
    assert confidence.risk_at_coverage(sure, right) == pytest.approx(1 / 9)
    assert confidence.risk_at_coverage(sure, right, 1) == pytest.approx(0.2)
    assert confidence.risk_at_coverage(sure, right, 0.1) == 1
    assert confidence.risk_at_coverage([0.5, 0.5], [True, False], 0.5) == 0  # of equal ones the first stays
    assert confidence.risk_at_coverage([0.5] * 11, [True] * 10 + [False]) == 0  # 9.9 are ten
    assert confidence.risk_at_coverage([], []) == 0


def test_average_precision():
    """Hit, miss, hit, of three wanted: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    assert confidence.average_precision([0.9, 0.8, 0.7], [True, False, True], 3) == pytest.approx((1 + 2 / 3) / 3)
    # The order is that of the scores. Precision 0, 1/2, 2/3 is made to fall: 2/3 for both hits.
    assert confidence.average_precision([0.7, 0.8, 0.9], [True, True, False], 2) == pytest.approx(2 / 3)
    assert confidence.average_precision([0.5], [False], 4) == 0
    assert confidence.average_precision([], [], 4) == 0
    assert confidence.average_precision([], [], 0) == 1
    assert confidence.average_precision([0.5], [False], 0) == 0


def box(x, score=None, label="star"):
    return Box(label, x, 0, x + 10, 10, score=score)


def test_which_boxes_hit():
    """The surer box takes the target that it overlaps most; a target is hit once, and by its label."""
    targets = [box(0), box(4)]  # the box at 3 overlaps the second more, by 9/11, and the first by 7/13
    assert confidence.hits([box(3, 0.5), box(3, 0.9)], targets) == [True, True]
    assert confidence.hits([box(2, 0.7), box(0, 0.9), box(1, 0.8)], targets) == [False, True, True]
    assert confidence.hits([box(0, 0.9), box(0, 0.8)], targets) == [True, False]
    assert confidence.hits([box(0, 0.9, "ring")], targets) == [False]
    assert confidence.hits([box(0, 0.4), box(0, 0.6)], [box(0)]) == [False, True]
    assert confidence.hits([box(5, 0.9)], [box(0)]) == [False]  # a third
    assert confidence.hits([box(5, 0.9)], [box(0)], overlap=1 / 3) == [True]
    assert confidence.hits([], targets) == []


def test_boxes_of_several_pictures():
    found = confidence.of_boxes([[box(0, 0.9)], [box(0, 0.6), box(40, 0.7)]], [[box(0)], [box(0)]])
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert [(row["count"], row["right"]) for row in found["reliability"]] == [(1, 1.0), (1, 0.0), (1, 1.0)]
    assert found["calibration_error"] == pytest.approx((0.1 + 0.7 + 0.4) / 3)


def test_a_text_is_as_sure_as_all_of_its_tokens():
    scene = Scene((), "plain", ((0,) * 3, (0,) * 3), 0, 0)
    asked = [Question(scene, "answer", "", "2"), Question(scene, "answer", "", "3")]
    answers = [Answer("2", [5], 1, 1, logprobs=[-0.5, -0.5]), Answer("4", [6], 1, 1, logprobs=[-2.0])]
    found = evaluate.confident("answer", answers, asked)
    assert [row["confidence"] for row in found["reliability"]] == pytest.approx([2.718281828**-2, 2.718281828**-1])
    assert (found["risk_at_90"], found["risk_at_100"]) == (0.5, 0.5)


def test_boxes_of_answers_are_compared_in_fractions():
    scene = Scene((), "plain", ((0,) * 3, (0,) * 3), 0, 0)
    text = "<loc0000><loc0000><loc0512><loc0512> star"
    answered = Answer(text, [1] * 5, 300, 200, logprobs=[-0.1] * 5, begins=[0, 9, 18, 27, 36])
    found = evaluate.confident("detect", [answered], [Question(scene, "detect", "", text)])
    assert found["average_precision"] == 1
    assert found["reliability"][0]["confidence"] == pytest.approx(2.718281828**-0.1)


def test_the_printed_table():
    figures = {
        "answer": confidence.of_answers([0.95, 0.95, 0.05], [True, False, True]),
        "detect": confidence.of_boxes([[box(0, 0.92)]], [[box(0)]]),
    }
    lines = [line.split() for line in confidence_table(figures)]
    assert ["seen", "answer", "detect"] in lines
    assert ["average", "precision", "100.0%"] in lines
    assert ["risk", "at", "90", "33.3%"] in lines
    assert ["sure", "to", "0.1", "100%", "of", "1"] in lines
    assert ["sure", "to", "1.0", "50%", "of", "2", "100%", "of", "1"] in lines
    assert confidence_table({}) == []
