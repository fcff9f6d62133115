"""What a net's probabilities say of themselves: how unsure they are of a structure, and whether they can be believed.

Both are of the structures, classes 1 to 3: background is most of a slice, nearly all of it beyond doubt, and would hide
in any mean what happens at the borders that matter.

Entropy needs no reference. Reliability does: of all pixels that the net gives 0.7 for a disc, 7 in 10 should be disc.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lumbarflow.labels import CLASS_COUNT, CLASSES, FOREGROUND

if TYPE_CHECKING:
    import pandas as pd

# Equally wide bins of probability, from 0 to 1; each holds its lower edge, the last one both.
BINS = 10
# Pixels whose probability of a class is lower than this are not counted for it: nearly all of a slice is that far from
# any structure, and would drown the calibration error in agreement. What is left out depends on the probability alone,
# never on the reference, so that the counted pixels are as well calibrated as they were.
FLOOR = 0.01


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of a softmax as a share of its greatest value, ln(classes): 0 is certain, 1 knows nothing.

    Args:
        probabilities: float (classes, ...), at least two classes.
    Returns:
        of the same type, (...).
    """
    # The smallest number of the type stands for 0, whose term is 0.
    terms = probabilities * np.log(np.maximum(probabilities, np.finfo(probabilities.dtype).tiny))
    # Sums of weights that are 1 but for rounding leave [0, 1] by as little.
    return np.clip(terms.sum(axis=0) / -np.log(len(probabilities), dtype=probabilities.dtype), 0, 1)


def entropy_sums(decided: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """What mean entropies are made of, float64 (n, structures, 2): of the pixels of each slice that were decided as
    classes 1 to 3, the sum of their entropies and their number.

    Args:
        decided: uint8 classes (n, rows, columns).
        probabilities: float (n, rows, columns, classes) that they were decided by.
    Raises:
        ValueError: shapes do not fit each other.
    """
    sums = np.zeros((len(decided), CLASS_COUNT, 2))
    for row, classes, p in _slices(decided, probabilities, sums):
        found, p = _chosen(classes > 0, classes, p)
        row[:, 0] = np.bincount(found, entropy(p), minlength=CLASS_COUNT)
        row[:, 1] = np.bincount(found, minlength=CLASS_COUNT)
    return sums[:, FOREGROUND.start :]


def mean_entropy(sums: np.ndarray) -> dict[str, float]:
    """Structure -> mean entropy; NaN where no pixel was decided as it.

    Args:
        sums: float64 (n, structures, 2), see `entropy_sums`.
    """
    total, count = np.moveaxis(sums.sum(axis=0), -1, 0)
    return dict(zip(CLASSES[1:], _ratio(total, count).tolist(), strict=True))


def reliability_counts(reference: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """What reliability is made of, float64 (n, structures, BINS, 3): of the pixels of each slice whose probability of
    a class is in a bin, their number, the sum of that probability, and how many of them have the class.

    Each class stands against all others, and for its own probability, whether or not that decided the pixel: a border
    is where 0.3 should mean 3 in 10. Pixels below FLOOR are left out; those of them that have the class nevertheless
    are misses beyond doubt, which recall shows.

    Args:
        reference: uint8 classes (n, rows, columns).
        probabilities: float (n, rows, columns, classes).
    Raises:
        ValueError: shapes do not fit each other.
    Source: Naeini et al. 2015 and Guo et al. 2017 (bins); one class against the others: Kull et al. 2019.
    """
    sums = np.zeros((len(reference), len(FOREGROUND), BINS, 3))
    for row, classes, p in _slices(reference, probabilities, sums):
        # One look at background, with room for rounding, spares most pixels three of their own.
        truth, p = _chosen(p[:, 0] <= 1 - FLOOR + 1e-5, classes, p)
        for of_class, index in zip(row, FOREGROUND, strict=True):
            counted = np.flatnonzero(p[index] >= FLOOR)
            confidence = p[index].take(counted)
            bins = np.minimum((confidence * BINS).astype(np.intp), BINS - 1)
            for column, weights in enumerate((None, confidence, truth.take(counted) == index)):
                of_class[:, column] = np.bincount(bins, weights, minlength=BINS)
    return sums


def _slices(
    classes: np.ndarray, probabilities: np.ndarray, sums: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each slice the row of `sums` that it fills, its classes (pixels,) and its probabilities (pixels, classes)."""
    if probabilities.shape != (*classes.shape, CLASS_COUNT):
        raise ValueError(
            f"probabilities of shape {probabilities.shape}; expected {(*classes.shape, CLASS_COUNT)}, "
            "one for each class at every pixel of the label slices"
        )
    for row, plane, p in zip(sums, classes, probabilities, strict=True):
        yield row, plane.ravel(), p.reshape(-1, CLASS_COUNT)


def _chosen(mask: np.ndarray, classes: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes (chosen,) and probabilities (classes, chosen) of some pixels of a slice; whole rows are fast."""
    pixels = np.flatnonzero(mask)
    return classes.take(pixels), np.ascontiguousarray(probabilities.take(pixels, axis=0).T)


def reliability_table(counts: np.ndarray) -> pd.DataFrame:
    """One row per structure and bin: class, low, high (the bin), count (pixels), confidence (their mean probability of
    the class) and frequency (the share of them that has it), NaN in an empty bin.

    Args:
        counts: float64 (structures, BINS, 3), `reliability_counts` summed over slices.
    """
    import pandas as pd

    count, confidence, hits = np.moveaxis(counts, -1, 0).reshape(3, -1)
    low = FLOOR, *(np.arange(1, BINS) / BINS)
    return pd.DataFrame(
        {
            "class": np.repeat(CLASSES[1:], BINS),
            "low": np.tile(low, len(FOREGROUND)),
            "high": np.tile(np.arange(1, BINS + 1) / BINS, len(FOREGROUND)),
            "count": count.astype(np.int64),
            "confidence": _ratio(confidence, count),
            "frequency": _ratio(hits, count),
        }
    )


def calibration_error(reliability: pd.DataFrame) -> dict[str, float]:
    """Structure -> expected calibration error: the mean over its counted pixels of how far, in their bin, confidence
    and frequency lie apart; NaN without such pixels.

    Args:
        reliability: see `reliability_table`.
    Source: Naeini et al. 2015, https://doi.org/10.1609/aaai.v29i1.9602.
    """
    apart = (reliability["confidence"] - reliability["frequency"]).abs() * reliability["count"]
    sums = reliability.assign(apart=apart).groupby("class")[["apart", "count"]].sum()
    return {name: float(_ratio(*sums.loc[name])) for name in CLASSES[1:]}


def entropy_dice_correlation(by_case: pd.DataFrame) -> dict[str, float]:
    """Structure -> Spearman's rank correlation of the cases' entropy and Dice; near -1, entropy tells bad cases.

    NaN with fewer than three cases that have both (a structure that was nowhere found has no entropy), or where all of
    them are equal in one.

    Args:
        by_case: class, entropy and dice, a row per case and class.
    Source: that the mean entropy of what was found as a structure goes with its Dice: Mehrtash et al. 2020,
        https://doi.org/10.1109/TMI.2020.3006437.
    """
    correlations = {}
    for name in CLASSES[1:]:
        both = by_case.loc[by_case["class"] == name, ["entropy", "dice"]].dropna()
        told = len(both) >= 3 and (both.nunique() > 1).all()
        # Pearson's of the ranks, where ties share their mean rank.
        correlations[name] = float(both["entropy"].rank().corr(both["dice"].rank())) if told else np.nan
    return correlations


def _ratio(figure: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Quotient of float64 arrays, NaN where `over` is 0."""
    return np.divide(figure, over, out=np.full(np.shape(figure), np.nan), where=np.asarray(over) > 0)
