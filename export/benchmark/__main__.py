"""The command."""

import sys

from numpy_ref import cli

from . import PROG, main, serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(cli.run(serve.PROG, serve.main, sys.argv[2:]))
    sys.exit(cli.run(PROG, main))
