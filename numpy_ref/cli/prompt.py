"""The PROMPT of a command: given as it is, or read from a file."""

from pathlib import Path

from ..errors import PaliGemmaError, note
from ..files import read_bytes
from ..tokenizer import prompt_warning

MAX_BYTES = 2**24  # of a prompt's file
HELP = "@FILE reads the prompt from a file, @@TEXT is the prompt @TEXT; line breaks at its end do not count"


def read_prompt(argument: str) -> str:
    """The prompt that HELP describes; a byte order mark in the file is no part of it.

    Raises PaliGemmaError if the file cannot be read, or if there is nothing in the prompt.
    """
    source, prompt = "the prompt", argument
    if argument == "@":
        raise PaliGemmaError("the prompt @ names no file; @FILE reads a prompt from a file, @@ is the prompt @")
    if argument.startswith("@@"):
        prompt = argument[1:]
    elif argument.startswith("@"):
        source = argument[1:]
        prompt = _read(Path(source), f"; the prompt {argument} is asked as @{argument}")
    prompt = prompt.rstrip("\r\n")
    if not prompt.strip():
        raise PaliGemmaError(f'{source} is empty; ask something, for example "caption en"')
    return prompt


def read_prompts(file: Path) -> list[str]:
    """A prompt a line; those without any are left out. Raises PaliGemmaError if there is none."""
    prompts = [line for line in _read(file).split("\n") if line.strip()]
    if not prompts:
        raise PaliGemmaError(f'{file} is empty; it has a prompt a line, for example "caption en"')
    return prompts


def _read(file: Path, hint: str = "") -> str:
    """The text of a file; line ends of other systems are line ends, as in Python's own text files."""
    try:
        return read_bytes(file, MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise PaliGemmaError(f"{file}: cannot read the prompt, which is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PaliGemmaError(f"{file}: cannot read the prompt ({reason}){hint}") from None


def warn_of_prompt(prog: str, prompt: str) -> bool:
    """Say on stderr what `prompt_warning` has to say; whether there was something."""
    if warning := prompt_warning(prompt):
        note(f"{prog}: warning: {warning}")
    return bool(warning)
