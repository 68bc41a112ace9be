"""The one exception that the project raises for input that it cannot use."""


class PaliGemmaError(Exception):
    """Bad input, told in one line: what was wrong, where, and what to do."""
