"""python -m tests.install_sizes: what an install takes on this disk, plain and with each extra.

The sizes are those of the files of all distributions that are needed, in the environment that this runs in; what is not
installed here is named. PyTorch's size is that of the build that is here: the default one for Linux has CUDA's
libraries with it, the one for the CPU alone is a fraction.
"""

import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from numpy_ref.cli.options import Parser

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def needed(requirements: list[str], found: dict[str, Distribution | None]) -> dict[str, Distribution | None]:
    """All distributions that requirements lead to, by name, those in `found` among them; None for one not installed."""
    for text in requirements:
        requirement = Requirement(text)
        extras = ["", *requirement.extras]
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in found and not requirement.extras:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        further = [Requirement(each) for each in found[name].requires or []]
        wanted = [
            str(each).partition(";")[0]
            for each in further
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
        ]
        needed([each for each in wanted if Requirement(each).name.lower().replace("_", "-") not in found], found)
    return found


def size_of(found: Distribution) -> int:
    """Bytes of a distribution's files."""
    files = [Path(str(file.locate())) for file in found.files or []]
    return sum(file.stat().st_size for file in files if file.is_file())


def row(name: str, found: dict[str, Distribution | None]) -> str:
    """A line: the megabytes of distributions, the three largest, and those that are missing."""
    sizes = {each: size_of(there) for each, there in found.items() if there}
    largest = sorted(sizes, key=lambda each: -sizes[each])[:3]
    text = ", ".join(f"{each} {sizes[each] / 1e6:.0f}" for each in largest)
    missing = [each for each, there in found.items() if there is None]
    lacks = f"; not here: {', '.join(missing)}" if missing else ""
    return f"{name:<10}{sum(sizes.values()) / 1e6:>7.0f} MB  ({text}{lacks})"


def main(argv=None):
    options = Parser(prog="python -m tests.install_sizes", description="What an install takes on this disk.")
    options.parse_args(argv)
    plain = needed(PROJECT["dependencies"], {})
    print(row("plain", plain))
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra != "test":
            everything = needed(requirements, dict(plain))
            print(row(f"+ {extra}", {name: there for name, there in everything.items() if name not in plain}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
