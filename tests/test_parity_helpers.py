"""The parity runner must be able to fail: on a missing tap, a broadcastable shape, a wrong dtype, a NaN."""

import numpy as np
import pytest

from .parity import Recorder, assert_parity


def taps(**changes):
    values = {"a": np.ones((2, 3)), "b": np.arange(5.0)}
    values.update(changes)
    return {name: value for name, value in values.items() if value is not None}


def test_equal_taps_pass():
    assert assert_parity(taps(), taps(), np.float64, 1e-12) == 0


@pytest.mark.parametrize(
    ("actual", "reason"),
    [
        (taps(b=None), "taps differ"),
        (taps(c=np.ones(3)), "taps differ"),
        (taps(a=np.ones((1, 3))), "shape"),
        (taps(a=np.ones((2, 3), np.float32)), "dtype"),
        (taps(a=np.array([[1, 1, 1], [1, np.nan, 1]])), "not finite"),
        (taps(b=np.array([0, 1, 2, 3, 4 + 1e-9])), "b: error"),
    ],
    ids=["missing tap", "extra tap", "broadcastable shape", "dtype", "nan", "value"],
)
def test_difference_fails(actual, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_parity(actual, taps(), np.float64, 1e-12)


def test_nothing_recorded_fails():
    with pytest.raises(AssertionError, match="no taps"):
        assert_parity({}, {}, np.float64, 1)


def test_the_first_bad_tap_is_named():
    with pytest.raises(AssertionError, match=r"^a: error"):
        assert_parity(taps(a=np.zeros((2, 3)), b=np.zeros(5)), taps(), np.float64, 1e-12)


def test_recorder_refuses_a_name_twice():
    recorder = Recorder()
    recorder("a", 1)
    with pytest.raises(AssertionError, match="twice"):
        recorder("a", 1)
