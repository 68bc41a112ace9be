"""The command."""

import sys

from numpy_ref import cli

from . import PROG, main

if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
