"""python -m tests.calibrate [SEEDS]: the worst errors behind the budgets in cases.py."""

import sys

import numpy as np

from .cases import CASES, with_dtype
from .parity import DTYPES, ENGINES, relative_error, run_case


def main(seeds=20):
    worst = {}
    for case in CASES:
        for seed in range(seeds):
            expected = run_case(with_dtype(case, np.float64), "numpy", np.float64, seed)
            if next(iter(expected.values())).dtype == bool:
                continue
            for engine in ENGINES:
                for dtype in DTYPES:
                    actual = run_case(with_dtype(case, dtype), engine, dtype, seed)
                    error = max(relative_error(actual[name], expected[name]) for name in expected)
                    key = case.level, dtype.__name__
                    worst[key] = max(worst.get(key, (0.0,)), (error / np.finfo(dtype).eps, case.name, engine, seed))
    for (level, dtype), (error, name, engine, seed) in sorted(worst.items()):
        print(f"{level:<6} {dtype:<8} {error:6.1f} eps  ({name}, {engine}, seed {seed})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
