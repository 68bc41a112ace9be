"""python -m tests.calibrate: the worst errors behind the budgets of the tests and of --verify."""

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export import bundle, verify
from export.bundle import weights
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.cli.options import Parser, whole

from .cases import CASES, with_dtype
from .models import CONFIGS, random_params, with_heads
from .parity import DTYPES, ENGINES, relative_error, run_case

#: The others quantize nothing more of models whose sizes are primes: int2 is int4, the last two are half precision.
PRECISIONS = (*weights.FLOATS, "int8", "int4")


def functions(seeds):
    """Every case on every engine, in eps of the dtype."""
    worst = {}
    for case in tqdm(CASES, desc="functions", leave=False, disable=None):
        for seed in range(seeds):
            expected = run_case(with_dtype(case, np.float64), "numpy", np.float64, seed)
            if next(iter(expected.values())).dtype == bool:
                continue
            for engine in ENGINES:
                for dtype in filter(lambda dtype: case.runs_on(engine, dtype), DTYPES):
                    actual = run_case(with_dtype(case, dtype), engine, dtype, seed)
                    error = max(relative_error(actual[name], expected[name]) for name in expected)
                    key = case.level, dtype.__name__
                    worst[key] = max(worst.get(key, (0.0,)), (error / np.finfo(dtype).eps, f"{case.name}, {engine}"))
    for (level, dtype), (error, name) in sorted(worst.items()):
        print(f"{level:<8}{dtype:<10}{error:8.1f} eps  ({name})")


def bundles(seeds):
    """Every part of a verified bundle, as a fraction of the largest reference value."""
    worst = {}
    configs = CONFIGS | {f"{name}, fused": with_heads(name) for name in CONFIGS}  # the others are portable in float16
    for name, config in configs.items():
        for seed in tqdm(range(seeds), desc=name, leave=False, disable=None):
            for precision in PRECISIONS:
                with tempfile.TemporaryDirectory() as folder:
                    loaded = Checkpoint(Path(folder), config, random_params(config, seed), np.dtype("f8"))
                    bundle.write(loaded, Path(folder) / "out", precision)
                    opened = bundle.load(Path(folder) / "out")
                    for row in verify.rows(opened, loaded):
                        worst[precision] = max(
                            worst.get(precision, (0.0,)), (row.error, f"{name}, {row.stage}, {row.part}")
                        )
    for precision, (error, part) in worst.items():
        print(f"bundle  {precision:<14}{error:8.1e}  ({part})")


def main(argv=None):
    options = Parser(prog="python -m tests.calibrate", description=__doc__.partition(": ")[2])
    options.add_argument(
        "seeds", nargs="?", type=whole(1), default=20, metavar="SEEDS", help="random models of each (20)"
    )
    seeds = options.parse_args(argv).seeds
    functions(seeds)
    bundles(seeds)


if __name__ == "__main__":
    main()
