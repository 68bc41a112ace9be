"""LoRA adapters as `peft` saves them (Hu et al. 2021): merged into a checkpoint's weights as these are read, and saved.

An adapter is a directory with adapter_config.json and adapter_model.safetensors. For a weight W it has two thin
matrices, and the weight that the model was trained with is

    W' = W + scale * B A        A [r, in], B [out, r]
    scale = alpha / r           or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)

The sum is made in float32 and rounded once, to the dtype of W, as peft's `merge_and_unload` does. Nothing is merged
before it is read: a `Merged` stands where the weight was and computes the rows that it is asked for, so that the
checkpoint stays mapped and exporting holds a block at a time. Other whole tensors that the adapter brings
(`modules_to_save`, trained biases) take the place of the base's.

The tensors themselves say which weights are adapted: `target_modules`, `layers_to_transform` and `exclude_modules`
are not needed. `fan_in_fan_out` has no meaning for PaliGemma's layers, and peft ignores it there too.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError, listed, note, quote
from ..files import new_directory, read_json, within
from .blocks import BLOCK, check_finite
from .layouts import Parameter, canonical, module_name, parameters, unwrapped
from .safetensors import map_safetensors_file, write_safetensors_file
from .tree import flatten, unflatten

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGE_FIRST = "merge it first with peft (merge_and_unload, then save_pretrained) and give the result as CHECKPOINT"
#: "all-linear" adapts this too where transformers made one; PaliGemma never calls it.
POOLING_HEAD = "vision_tower.head."
TABLE, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
#: Kinds of adapters that are no change of weights, so that nothing can be merged.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
            "CARTRIDGE", "XLORA", "POLY")  # fmt: skip
#: Variants of LoRA whose merged weight is another than above, by the field that turns them on.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow", "kasa_config": "KaSA", "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters", "layer_replication": "replicated layers",
}  # fmt: skip
#: Ways to begin training that leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others do not.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
#: Fields that are read here, or that change nothing once training is over.
_FIELDS = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
    "init_lora_weights", "ensure_weight_tying", "base_model_name_or_path", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "lora_bias", "lora_dropout", "inference_mode",
    "task_type", "auto_mapping", "revision", "peft_version", "megatron_core", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# Names of tensors: peft's save_pretrained leaves out the adapter's own name (mostly "default"), a state_dict has it.
_PAIR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<part>weight|bias))?"
)
_COPY = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")
_BASE_LAYER = ".base_layer."


# --- a merged weight ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Merged:
    """base + scale * left @ right in the dtype of the base, computed where it is read.

    base [R, C], left [R, r], right [r, C]. It has what the writers of files ask of an array: sizes, slices of rows
    and columns, and a transpose; `np.asarray` makes it whole.
    """

    base: np.ndarray
    left: np.ndarray
    right: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    @property
    def T(self) -> "Merged":  # noqa: N802 (NumPy's name)
        return Merged(self.base.T, self.right.T, self.left.T, self.scale)

    def __len__(self):
        return len(self.base)

    def __getitem__(self, key) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return _sum(self.base[rows, columns], (self.left[rows] @ self.right[:, columns]) * self.scale)

    def __array__(self, dtype=None, copy=None):
        whole = np.empty(self.shape, self.dtype)
        step = max(1, BLOCK // (4 * self.shape[1]))
        for start in range(0, len(self), step):
            whole[start : start + step] = self[start : start + step]
        return whole if dtype is None else whole.astype(dtype, copy=False)


def in_memory(params: dict) -> dict:
    """The tree with every merged weight as an array in memory; the others stay views of mapped files."""
    return unflatten({path: np.asarray(array) for path, array in flatten(params).items()})


# --- the directory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says that counts once training is over."""

    rank: int
    alpha: float
    ranks: dict[str, int]  # by the end of a module's name, a regular expression
    alphas: dict[str, float]
    rank_stabilized: bool
    saved_modules: tuple[str, ...]
    ties: bool  # whether peft kept table and head of the adapter the same
    base: str | None
    revision: str | None

    def rank_of(self, module: str) -> int:
        """The rank of a module's pair."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's pair is multiplied with."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def is_saved(self, module: str) -> bool:
        """Whether a module was trained whole, in a copy of its own."""
        return any(f".{saved}." in f".{module}." for saved in self.saved_modules)


def _by_pattern(patterns, module, default):
    """The value of the first pattern that matches the end of a name, as in peft's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter, and no model beside it."""
    return (Path(path) / CONFIG).is_file() and not any(
        (Path(path) / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    )


def read_settings(path: str | Path) -> Settings:
    """Read `adapter_config.json`. Raises PaliGemmaError for all but plain LoRA, by name, and says what to do."""
    folder = Path(path)
    if not folder.is_dir():
        raise PaliGemmaError(f"{path}: no such adapter directory")
    file = within(folder, CONFIG)
    if not file.exists():
        what = " it is a checkpoint, which is given as CHECKPOINT" if (folder / "config.json").exists() else ""
        raise PaliGemmaError(f"{path}: not an adapter, {CONFIG} is missing;{what or ' peft writes one beside each'}")
    try:
        return _settings(read_json(file))
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None


def _settings(fields) -> Settings:
    _require(isinstance(fields, dict), "it is not a JSON object")
    kind = fields.get("peft_type")
    if kind in _PROMPTS:
        raise PaliGemmaError(f"an adapter of kind {kind}, which is no change of weights; only LoRA can be used")
    if kind != "LORA":
        raise PaliGemmaError(f"an adapter of kind {quote(kind)}, not LORA; {MERGE_FIRST}")
    for field, name in _VARIANTS.items():
        if fields.get(field):
            raise PaliGemmaError(f"an adapter with {name} ({field}), not plain LoRA; {MERGE_FIRST}")
    start = fields.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise PaliGemmaError(
            f"an adapter that began as {quote(start)}, which changes the base's weights too; {MERGE_FIRST}"
        )
    if unknown := sorted(field for field, value in fields.items() if value and field not in _FIELDS):
        raise PaliGemmaError(f"{CONFIG} has {listed(map(quote, unknown))}, unknown here; {MERGE_FIRST}")
    modules = fields.get("modules_to_save") or []
    _require(isinstance(modules, list) and all(isinstance(name, str) for name in modules), "modules_to_save is no list")
    for name in ("base_model_name_or_path", "revision"):
        value = fields.get(name)
        _require(value is None or isinstance(value, str), f"{name} is {quote(value)}, not a string")
    return Settings(
        rank=_number("r", fields.get("r", 8), whole=True),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        ranks=_patterns("rank_pattern", fields, whole=True),
        alphas=_patterns("alpha_pattern", fields),
        rank_stabilized=bool(fields.get("use_rslora")),
        saved_modules=tuple(modules),
        ties=bool(fields.get("ensure_weight_tying")),
        base=fields.get("base_model_name_or_path") or None,
        revision=fields.get("revision") or None,
    )


def _patterns(field, fields, whole=False) -> dict:
    patterns = fields.get(field) or {}
    _require(isinstance(patterns, dict), f"{field} is {quote(patterns)}, not an object")
    for key, value in patterns.items():
        try:
            re.compile(f"({key})$")
        except (re.error, RecursionError, OverflowError):
            _require(False, f"{field} has {quote(key)}, which is no regular expression")
        _number(f"{field} of {quote(key)}", value, whole)
    return patterns


def _number(field, value, whole=False):
    kinds = int if whole else int | float
    good = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e9 and (value > 0 or not whole)
    _require(good, f"{field} is {quote(value)}, not a {'whole number from 1' if whole else 'number'}")
    return value


def _require(holds, problem) -> None:
    if not holds:
        raise PaliGemmaError(f"{CONFIG}: {problem}")


def base_of(path: str | Path) -> str:
    """The directory or Hub id (with its revision) of the base that an adapter was trained on, as its config has it."""
    settings = read_settings(path)
    if not settings.base:
        raise PaliGemmaError(f"{path}: {CONFIG} names no base; give it as CHECKPOINT")
    is_path = Path(settings.base).is_absolute() or Path(settings.base).exists()
    if is_path and not Path(settings.base).exists():
        raise PaliGemmaError(f"{path}: its base {settings.base} is not on this machine; give it as CHECKPOINT")
    return settings.base if is_path or not settings.revision else f"{settings.base}@{settings.revision}"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of an adapter: its name as stored, and the module that it belongs to, as spelled there."""

    name: str
    module: str
    array: np.ndarray


#: What a tensor is to the weight that it belongs to: half of a pair, an addend of a bias, or the weight itself, for the
#: base (as where a vocabulary was resized) or trained as a copy (modules_to_save), which leaves tied weights alone.
A, B, ADDEND, WHOLE, COPY = "A", "B", "addend", "whole", "copy"
Found = dict[str, dict[str, _Tensor]]  # a weight's name as the table spells it -> what the tensor is -> the tensor


def read_tensors(path: str | Path, settings: Settings) -> Found:
    """The adapter's tensors by the weight that they belong to.

    Raises PaliGemmaError for a file that is not whole, NaN and infinity, two spellings of one tensor, and two adapters.
    """
    file = within(path, WEIGHTS)
    if not file.exists() and (Path(path) / PICKLE).exists():
        raise PaliGemmaError(
            f"{path}: {PICKLE} is a pickle, which could run anything and is not opened; "
            "load it with peft, and save_pretrained writes it as safetensors"
        )
    tensors, _ = unwrapped(map_safetensors_file(file))
    if not tensors:
        raise PaliGemmaError(f"{file}: holds no tensors")
    found: Found = {}
    adapters = set()
    for name, array in tensors.items():
        try:
            check_finite(name, array)
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{file}: {error}") from None
        weight, role, module, adapter = _parse(name, settings)
        if role in found.setdefault(weight, {}):
            raise PaliGemmaError(f"{file}: tensor {name} is stored twice, under two spellings of its name")
        found[weight][role] = _Tensor(name, module, array)
        adapters |= {adapter} if adapter else set()
    if len(adapters) > 1:
        raise PaliGemmaError(f"{file}: holds several adapters ({listed(sorted(adapters))}); save one of them alone")
    return found


def _parse(name, settings) -> tuple[str, str, str, str | None]:
    """A tensor's name -> the weight it belongs to, what it is to it, its module, the adapter's name if it has one."""
    if pair := _PAIR.fullmatch(name):
        module, side, part = pair["module"], pair["side"], pair["part"]
        if part != "bias":
            return canonical(f"{module}.weight"), side, module, pair["adapter"]
        if side == B:
            return canonical(f"{module}.bias"), ADDEND, module, pair["adapter"]
    copy = _COPY.search(name)
    plain = _COPY.sub("", name).replace(_BASE_LAYER, ".")
    module = plain.rpartition(".")[0]
    is_copy = copy or (settings.is_saved(module) and _BASE_LAYER not in name)
    return canonical(plain), COPY if is_copy else WHOLE, module, copy and copy["adapter"]


# --- merging -----------------------------------------------------------------------------------------------


def adapt(checkpoint: Any, path: str | Path) -> Any:
    """A checkpoint with an adapter's weights in place of its own; a `Checkpoint`, whose module imports this one.

    Raises PaliGemmaError that names the tensors of the adapter for which the base has no use, or one of a wrong shape.
    """
    settings = read_settings(path)
    found = read_tensors(path, settings)
    flat, config = flatten(checkpoint.params), checkpoint.config
    if config.text.tied and not _stays_tied(found):
        if settings.ties:
            raise PaliGemmaError(
                f"{path}: table and head were kept the same in training (ensure_weight_tying); {MERGE_FIRST}"
            )
        note(f"{path}: with this adapter the head is no longer the embedding table; there are both")
        config = replace(config, text=replace(config.text, tied=False))
        flat["text.head.kernel"] = flat["text.embedding"].T
    table = {parameter.hf.name: parameter for parameter in parameters(config)}
    found = {weight: roles for weight, roles in found.items() if not weight.startswith(POOLING_HEAD)}
    unused = [t.name for weight, roles in found.items() for role, t in roles.items() if not _fits(table, weight, role)]
    if unused:
        raise PaliGemmaError(
            f"{path}: the base has no place for {len(unused)} of the adapter's tensors: {listed(sorted(unused))}"
        )
    for weight, roles in found.items():
        parameter = table[weight]
        flat[parameter.path] = _adapted(path, parameter, flat[parameter.path], roles, settings)
    return replace(checkpoint, config=config, params=unflatten(flat))


def _stays_tied(found: Found) -> bool:
    """Whether the table of a tied base is its head with the adapter too. Changes `found` so that it says so for each.

    What replaces the base's weight under one name replaces it under both; a pair, or a copy that was trained, is for
    one of the two, as while it was trained.
    """
    table, head = found.pop(TABLE, {}), found.pop(HEAD, {})
    if whole := table.get(WHOLE) or head.get(WHOLE):
        table, head = {WHOLE: whole, **table}, {WHOLE: whole, **head}
    tied = table.keys() == head.keys() <= {WHOLE, COPY} and all(
        table[role] is head[role] or np.array_equal(table[role].array, head[role].array) for role in table
    )
    found |= {name: roles for name, roles in [(TABLE, table), (HEAD, {} if tied else head)] if roles}
    return tied


def _fits(table, weight, role) -> bool:
    """Whether a weight can have such a tensor."""
    parameter = table.get(weight)
    return parameter is not None and (role not in (A, B) or len(parameter.shape) == 2)


def _adapted(path, parameter: Parameter, base, roles: dict[str, _Tensor], settings):
    """A weight with what an adapter brings for it."""
    whole = roles.get(COPY) or roles.get(WHOLE)
    if whole:
        _check_shape(path, whole, parameter.hf.shape)
        base = parameter.hf.layout.read(whole.array, parameter.shape)
    if ADDEND in roles:
        addend = roles[ADDEND]
        _check_shape(path, addend, parameter.hf.shape)
        base = _sum(base, addend.array.astype(_working(base)) * settings.scale_of(addend.module))
    if A in roles or B in roles:
        base = _merged(path, parameter, base, roles, settings)
    return base


def _merged(path, parameter, base, roles, settings) -> Merged:
    for one, other in [(A, B), (B, A)]:
        if other not in roles:
            raise PaliGemmaError(f"{path}: {roles[one].name} has no lora_{other} beside it; save the adapter again")
    a, b, module = roles[A], roles[B], roles[A].module
    rank, (rows, columns) = settings.rank_of(module), parameter.shape
    convolves = len(parameter.hf.shape) == 4
    _check_shape(path, a, (rank, *(parameter.hf.shape[1:] if convolves else (rows,))))
    _check_shape(path, b, (columns, rank, *((1, 1) if convolves else ())))
    dtype = _working(base)
    left, right = a.array.reshape(rank, rows).T.astype(dtype), b.array.reshape(columns, rank).T.astype(dtype)
    return Merged(base, left, right, settings.scale_of(module))


def _check_shape(path, tensor, shape) -> None:
    if tensor.array.shape != shape:
        raise PaliGemmaError(
            f"{path}: {tensor.name} has shape {list(tensor.array.shape)}; base and {CONFIG} ask for {list(shape)}: "
            "is it the base that the adapter was trained on?"
        )


def _working(base) -> np.dtype:
    """The dtype in which a sum is made: float32, or float64 for a base that has it."""
    return np.result_type(base.dtype, np.float32)


def _sum(base, change) -> np.ndarray:
    """base + change, rounded once to the dtype of the base."""
    with np.errstate(over="ignore", invalid="ignore"):  # whoever reads weights looks at whether they are finite
        return (base.astype(change.dtype) + change).astype(base.dtype)


# --- saving ------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    config: PaliGemmaConfig,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    alpha: float,
    base: str,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an adapter of plain LoRA that `adapt` and `peft` load, and `files` (name -> contents) beside it.

    `pairs` has for the path of each adapted kernel [in, out] its a [in, r] and b [r, out], all of one rank r; the
    adapted kernel is kernel + alpha / r * a @ b. `base` is the directory, or the Hub id with its revision, of what
    was trained. Raises PaliGemmaError if the folder exists.
    """
    table = {parameter.path: parameter for parameter in parameters(config)}
    tensors: dict[str, np.ndarray] = {}
    for kernel, (a, b) in pairs.items():
        module = f"{_WRAPPER}{module_name(table[kernel].hf.name)}"
        tensors |= {f"{module}.lora_A.weight": a.T, f"{module}.lora_B.weight": b.T}
    rank = next(iter(pairs.values()))[0].shape[1]
    modules = [module_name(table[kernel].hf.name) for kernel in pairs]
    with new_directory(path) as folder:
        write_safetensors_file(folder / WEIGHTS, tensors)
        (folder / CONFIG).write_text(json.dumps(_config_json(modules, rank, alpha, base), indent=2) + "\n")
        for name, contents in (files or {}).items():
            (folder / name).write_bytes(contents)


_WRAPPER = "base_model.model."  # of the classes that peft puts around a model


def _config_json(modules: list[str], rank: int, alpha: float, base: str) -> dict:
    """The fields of `peft.LoraConfig` that say how the tensors are applied, and to what."""
    name, at, revision = (base, "", "") if Path(base).exists() else base.rpartition("@")
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": name if at else base,
        "revision": revision if at else None, "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "target_modules": modules, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
