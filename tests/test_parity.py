"""Every function of the case table, on every engine, in float64 and float32, tap by tap."""

import numpy as np
import pytest

from .cases import BUDGETS, CASES, with_dtype
from .parity import DTYPES, ENGINES, assert_parity, run_case

RUNS = [
    (case, engine, dtype) for case in CASES for engine in ENGINES for dtype in DTYPES if case.runs_on(engine, dtype)
]


@pytest.mark.parametrize(
    ("case", "engine", "dtype"), RUNS, ids=[f"{c.name}-{engine}-{dtype.__name__}" for c, engine, dtype in RUNS]
)
def test_case(case, engine, dtype):
    expected = run_case(with_dtype(case, np.float64), "numpy", np.float64)
    actual = run_case(with_dtype(case, dtype), engine, dtype)
    if next(iter(expected.values())).dtype == bool:
        assert expected.keys() == actual.keys()
        assert all(np.array_equal(actual[name], expected[name]) for name in expected)
    else:
        assert_parity(actual, expected, dtype, BUDGETS[case.level][dtype])
