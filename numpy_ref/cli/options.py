"""The argument parser of every command."""

import argparse
import difflib

from .. import __version__


class Parser(argparse.ArgumentParser):
    """An argparse parser with `--version`, without abbreviations, that guesses what a misspelt option should be."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords | {"allow_abbrev": False})
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str):
        """Print usage and message, and exit with 2."""
        super().error(message + self._suggestion(message))

    def _suggestion(self, message) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            option = word.partition("=")[0]
            close = difflib.get_close_matches(option, known, 1) if option.startswith("--") else []
            if close and close[0] != option:
                return f" (did you mean {close[0]}?)"
        return ""
