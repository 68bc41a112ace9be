"""Whether a model knows what it does not know: what its confidence says of how right it is.

A confidence is a number in [0, 1] that a model gives each of its answers, or each of its boxes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..detection import Box, intersection_over_union


@dataclass(frozen=True)
class Bin:
    """A row of a reliability table: what has a confidence in [least, most), or up to 1 and with it in the last."""

    least: float
    most: float
    count: int
    confidence: float  # the mean
    right: float  # the share that is right


def reliability(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """The reliability table (Guo et al. 2017) over equal bins of confidence; without the empty ones."""
    scores, is_right = np.asarray(confidences, float), np.asarray(right, bool)
    place = np.minimum((scores * bins).astype(int), bins - 1)
    return [
        Bin(i / bins, (i + 1) / bins, int(own.sum()), float(scores[own].mean()), float(is_right[own].mean()))
        for i in range(bins)
        if (own := place == i).any()
    ]


def calibration_error(table: Sequence[Bin]) -> float:
    """The expected calibration error of a reliability table (Guo et al. 2017): sum count |right - confidence| / all."""
    everything = sum(row.count for row in table)
    return sum(row.count * abs(row.right - row.confidence) for row in table) / everything if everything else 0.0


def risk_at_coverage(confidences: Sequence[float], right: Sequence[bool], coverage: float = 0.9) -> float:
    """The share that is wrong of the most confident answers (Geifman and El-Yaniv 2017); 0 of none.

    Of n answers these are the first ceil(coverage x n) by falling confidence; of equal ones the first stay.
    """
    order = np.argsort(-np.asarray(confidences, float), kind="stable")
    kept = np.asarray(right, bool)[order][: int(np.ceil(round(coverage * len(order), 9)))]  # 0.9 x 10 is 9.000…01
    return float(1 - kept.mean()) if kept.size else 0.0


def average_precision(scores: Sequence[float], hits: Sequence[bool], wanted: int) -> float:
    """The area below the curve of precision over recall, precision made to fall (Everingham et al. 2010, PASCAL VOC).

        sum over i of (r_i - r_{i-1}) max over j >= i of p_j

    where p_i and r_i are precision and recall of the i boxes of highest score. Of the `wanted` things each is hit by
    one box at most. 1 where nothing was wanted and nothing found.
    """
    if not wanted:
        return float(not len(scores))
    hit = np.asarray(hits, bool)[np.argsort(-np.asarray(scores, float), kind="stable")]
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hit].sum() / wanted)


def hits(boxes: Sequence[Box], targets: Sequence[Box], overlap: float = 0.5) -> list[bool]:
    """Which boxes of a picture find a target, in the order of the boxes.

    In the order of falling scores each takes, of the targets that are still free and have its label, the one that it
    overlaps most, if the overlap over the union is at least `overlap`.
    """
    free, found = list(targets), [False] * len(boxes)
    for i in sorted(range(len(boxes)), key=lambda i: -(boxes[i].score or 0)):
        alike = [target for target in free if target.label == boxes[i].label]
        best = max(alike, key=lambda target: intersection_over_union(boxes[i], target), default=None)
        if best is not None and intersection_over_union(boxes[i], best) >= overlap:
            free.remove(best)
            found[i] = True
    return found


def of_answers(confidences: Sequence[float], right: Sequence[bool]) -> dict:
    """What there is to say about answers, as plain values."""
    table = reliability(confidences, right)
    risk = {"risk_at_90": risk_at_coverage(confidences, right), "risk_at_100": risk_at_coverage(confidences, right, 1)}
    return {**risk, **_calibration(table)}


def of_boxes(found: Sequence[Sequence[Box]], wanted: Sequence[Sequence[Box]]) -> dict:
    """What there is to say about the boxes of pictures, beside those that were wanted, as plain values."""
    scores = [box.score or 0.0 for boxes in found for box in boxes]
    right = [hit for boxes, targets in zip(found, wanted, strict=True) for hit in hits(boxes, targets)]
    precision = average_precision(scores, right, sum(map(len, wanted)))
    return {"average_precision": precision, **_calibration(reliability(scores, right))}


def _calibration(table):
    return {"calibration_error": calibration_error(table), "reliability": [asdict(row) for row in table]}
