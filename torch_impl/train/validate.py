"""What a model answers to lines that it was not trained on, and how often that is right.

    detect_f1      boxes of the right label at an IoU of one half, for lines whose prefix begins with `detect` or whose
                   suffix has boxes
    segment_miou   the mean IoU of what is painted under each label, for lines with mask codes, where there is a codec
    exact          answers that are the suffix letter by letter, for all other lines

Beside them `loss`, the one of training.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from numpy_ref.answer import Answer, Picture, Question, answer_all
from numpy_ref.engine import MaskDecoder
from numpy_ref.errors import note, plural
from numpy_ref.scenes.evaluate import f1

from ..load import ModuleEngine
from ..model.paligemma import PaliGemma
from . import data
from .loop import Validation

MOST = 500  # lines that are validated on, of more
PAINTED = 256  # pixels a side that masks are compared at
DETECT, SEGMENT, EXACT = "detect_f1", "segment_miou", "exact"


def metric_of(line: data.Line, has_codec: bool) -> str:
    """By what an answer to a line is measured."""
    if has_codec and "<seg" in line.suffix:
        return SEGMENT
    return DETECT if "<loc" in line.suffix or line.prefix.split()[:1] == ["detect"] else EXACT


def mask_iou(answer: Answer, reference: Answer) -> float:
    """The mean over the reference's labels of the IoU of all that is painted under a label."""
    painted, wanted = _by_label(answer), _by_label(reference)
    ious = []
    for label, truth in wanted.items():
        found = painted.get(label, np.zeros_like(truth))
        ious.append((found & truth).sum() / max(1, (found | truth).sum()))
    return float(np.mean(ious)) if ious else float(not painted)


def _by_label(answer) -> dict[str, np.ndarray]:
    masks: dict[str, np.ndarray] = {}
    for box, mask in zip(answer.boxes, answer.masks, strict=True):
        if mask is not None:
            masks[box.label] = masks.get(box.label, np.zeros_like(mask)) | mask
    return masks


def score(metric: str, pairs: Sequence[tuple[Answer, data.Line]]) -> float:
    """The value of a metric, in [0, 1], over answers and their lines."""
    if metric == DETECT:
        return f1([answer.text for answer, _ in pairs], [line.suffix for _, line in pairs])
    if metric == SEGMENT:
        references = [Answer(line.suffix, [], PAINTED, PAINTED, decode_masks=a.decode_masks) for a, line in pairs]
        return float(np.mean([mask_iou(a, r) for (a, _), r in zip(pairs, references, strict=True)]))
    return float(np.mean([answer.text == line.suffix for answer, line in pairs]))


def measure(
    model: PaliGemma, lines: data.JsonLines, loss: Callable, batch_size: int, masks: MaskDecoder | None
) -> dict[str, float]:
    """Greedy answers to the first MOST lines -> the loss, and the value of each metric that a line has."""
    engine = ModuleEngine(model, lines.resize, masks)
    pairs: dict[str, list] = defaultdict(list)
    losses, rows = 0.0, lines.rows[:MOST]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        pixels = [line.pixels(model.config.vision.image_size, lines.resize) for line in batch]
        examples = [(picture, line.prompt, line.answer) for picture, line in zip(pixels, batch, strict=True)]
        device = model.projector.kernel.device
        tensors = {name: value.to(device) for name, value in data.collate(examples, model.config.pad).items()}
        losses += loss(model, tensors).item() * len(batch)
        questions = [
            Question(line.prompt, _room(engine, line), [Picture(each[None], PAINTED, PAINTED) for each in pictures])
            for pictures, line in zip(pixels, batch, strict=True)
        ]
        for answer, line in zip(answer_all(engine, lines.tokenizer, questions), batch, strict=True):
            pairs[metric_of(line, masks is not None)].append((answer, line))
    return {"loss": losses / len(rows), **{name: score(name, pairs[name]) for name in sorted(pairs)}}


def _room(engine, line) -> int:
    """How long an answer may be: twice the right one, so that one that does not end is seen to be wrong."""
    return min(2 * len(line.answer) + 8, engine.max_length - len(line.prompt) + 1)


def rank(row: dict[str, float]) -> tuple[float, ...]:
    """By what one validation is better than another: the mean of its metrics, then the lower loss."""
    metrics = [value for name, value in row.items() if name not in ("step", "loss")]
    return float(np.mean(metrics)), -row["loss"]


def validation(
    lines: data.JsonLines, loss: Callable, batch_size: int, masks: MaskDecoder | None, every: int
) -> Validation:
    """What `fit` measures on the way. Says so on stderr if there are more lines than MOST."""
    if len(lines.rows) > MOST:
        note(f"{lines.file}: validation takes the first {MOST} of {plural(len(lines.rows), 'line')}")
    return Validation(partial(measure, lines=lines, loss=loss, batch_size=batch_size, masks=masks), rank, every)


def in_words(row: dict[str, float]) -> str:
    """What was measured, in a row."""
    return ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
