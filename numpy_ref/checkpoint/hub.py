"""Models named by their id on the Hugging Face Hub: `google/paligemma2-3b-mix-224`, or with a revision behind `@`.

What the local cache holds is used as it is, without asking anyone. The rest is downloaded by huggingface_hub, whose own
environment variables say from where (HF_ENDPOINT), as whom (HF_TOKEN), into which cache (HF_HOME), and that nothing may
be (HF_HUB_OFFLINE).
"""

import os
import re
from pathlib import Path

from ..errors import PaliGemmaError, quote
from ..files import read_json

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_OFFLINE = "HF_HUB_OFFLINE is set; unset it to download the model, or name a local directory"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: What a repository may hold besides: weights in other formats, which are not read, and would be gigabytes more.
PATTERNS = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "model*.safetensors", _INDEX, "vae.npz", "vae-oid.npz",
    "adapter_config.json", "adapter_model.safetensors", "bundle.json", "example.json", "knows.json", "*.onnx",
    "weights.bin",
]  # fmt: skip


def directory(name: str | Path) -> Path:
    """The directory that a path or a Hub id names: a path as it is, an id from the cache, or downloaded.

    What exists is a path. Raises PaliGemmaError if an id cannot be had.
    """
    path, found = Path(name), _ID.fullmatch(str(name))
    if not found or os.path.lexists(path) or path.suffix in (".npz", ".safetensors"):
        return path
    return _cached(found["repo"], found["revision"]) or _download(found["repo"], found["revision"])


def _cached(repo, revision) -> Path | None:
    """The snapshot in the cache, if it has all that is needed to run."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise PaliGemmaError(f"{repo}: not an id of the Hub ({error})") from None
    return folder if _is_whole(folder) else None


def _is_whole(folder) -> bool:
    """Whether a snapshot has its configuration, its weights (those of every shard), and a tokenizer."""
    has = {file.name for file in folder.iterdir() if file.exists()}
    if "bundle.json" in has:
        return _names(folder / "bundle.json", "files") <= has
    if "adapter_config.json" in has:
        return "adapter_model.safetensors" in has
    weights = _names(folder / _INDEX, "weight_map") if _INDEX in has else {_WEIGHTS}
    return {"config.json"} | weights <= has and bool({"tokenizer.model", "tokenizer.json"} & has)


def _names(file, key) -> set[str]:
    """The files that an index lists; of a damaged one a name that no folder has, so that it is fetched again."""
    try:
        listed = read_json(file)[key]
        return {*listed.values()} if key == "weight_map" else {*listed}
    except (PaliGemmaError, KeyError, TypeError, AttributeError):
        return {""}


def _download(repo, revision) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = constants.ENDPOINT
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise PaliGemmaError(
            f"{repo}: its licence has to be accepted first, at {where}/{repo}; then log in with `hf auth login`, or "
            "set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise PaliGemmaError(f"{repo}: there is no revision {quote(revision)} at {where}") from None
    except RepositoryNotFoundError:
        raise PaliGemmaError(
            f"{repo}: no such directory here, and no such model at {where} (a private one needs `hf auth login`, or "
            "HF_TOKEN)"
        ) from None
    except OfflineModeIsEnabled:
        raise PaliGemmaError(_absent(repo, revision, _OFFLINE)) from None
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        reason = _OFFLINE if constants.HF_HUB_OFFLINE else f"{where} cannot be reached"
        detail = "" if constants.HF_HUB_OFFLINE else f" ({type(cause).__name__}: {cause})"
        raise PaliGemmaError(_absent(repo, revision, reason + detail)) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PaliGemmaError(f"{repo}: cannot be downloaded from {where} ({error})") from None
    return folder


def _absent(repo, revision, reason) -> str:
    named = repo + (f"@{revision}" if revision else "")
    return f"{named}: no such directory here, nor is all of it in the Hugging Face cache, and {reason}"
