"""APTA, the paper's "adaptive pixel transformation algorithm": its way from label ids to classes, and what it changes.

The ids of a slice are stretched to grey values, the grey values are cut into classes, and four passes over each
pixel's neighbours mend what that broke. The direct map of `labels.LabelTable` breaks nothing, so it is the default;
APTA is here for whoever wants the paper's own labels, together with an audit of their difference.

Read as follows, where the paper leaves it open:

- A pass reads the slice as the pass before left it and writes a new one; it never sees its own output.
- Neighbours outside the image do not exist: a corner has three 8-neighbours and two 4-neighbours.
- x is the column and y the row of a slice with superior up and anterior left, so "below" is the next row.
- The slices stay on their own grid. The authors resize between grey values and classes, linearly, which invents
  grey values at borders; that belongs to their file conversion, not to the algorithm.

Source: Ahmed et al. 2024, arXiv 2409.06018, its algorithm and the code published with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASS_COUNT, CLASSES

BACKGROUND, VERTEBRAE = CLASSES.index("background"), CLASSES.index("vertebrae")

# Both ends belong to the class; every other grey value is background.
GREY_RANGES = {"vertebrae": (1, 10), "canal": (90, 180), "IVD": (181, 255)}

# (x, y) steps in the order in which ties take the first: x ascending, then y; right, left, below, above.
EIGHT_NEIGHBOURS = tuple((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0))
FOUR_NEIGHBOURS = ((1, 0), (-1, 0), (0, 1), (0, -1))

_OUTSIDE = CLASS_COUNT  # the rim around a slice: no class, and never counted


def normalised_greys(ids: np.ndarray) -> np.ndarray:
    """Stretch each slice from its lowest to its highest label id over 0..255.

    Fractions are cut off, not rounded, since the authors' code converts to 8 bit by a cast. It matters: beside disc
    209, vertebra 9 becomes 10.98, which is still a vertebra at 10 and would be background at 11.

    Args:
        ids: integers (n, rows, columns).
    Returns:
        uint8 (n, rows, columns); 0 throughout a slice that holds one id only.
    Raises:
        ValueError: not integers, or not three axes.
    """
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"label ids of dtype {ids.dtype} and shape {ids.shape}; expected integers (slice, row, column). "
            "Give the raw ids of a sagittal label map."
        )
    greys = np.zeros(ids.shape, np.uint8)
    for plane, grey in zip(ids, greys, strict=True):
        low, high = float(plane.min()), float(plane.max())
        if high > low:
            grey[...] = (plane - low) / (high - low) * 255
    return greys


def classes_from_greys(greys: np.ndarray) -> np.ndarray:
    """Cut grey values into classes by GREY_RANGES.

    Args:
        greys: uint8 of any shape.
    Returns:
        uint8 classes of that shape.
    """
    lookup = np.full(256, BACKGROUND, np.uint8)
    for name, (first, last) in GREY_RANGES.items():
        lookup[first : last + 1] = CLASSES.index(name)
    return lookup[greys]


def neighbourhood_passes(classes: np.ndarray) -> np.ndarray:
    """Passes (a) to (d) and the last rule, each slice by itself.

    (a) A pixel without an equal 8-neighbour becomes background. (b) Every pixel takes the mode of its 4-neighbours.
    (c) A pixel takes the mode of its 8-neighbours where they hold at least two classes. (d) A pixel without an equal
    8-neighbour takes their mode. Last, a slice without a vertebra turns all its foreground into vertebra. A slice of
    a single pixel has no mode and keeps it.

    Args:
        classes: uint8 classes (n, rows, columns).
    Returns:
        uint8 classes (n, rows, columns), a new array.
    """
    result = np.empty(classes.shape, np.uint8)
    padded = np.full((classes.shape[1] + 2, classes.shape[2] + 2), _OUTSIDE, np.uint8)
    for before, after in zip(classes, result, strict=True):
        padded[1:-1, 1:-1] = before
        _apply(_without_equal_to_background, padded, EIGHT_NEIGHBOURS)
        _apply(_mode, padded, FOUR_NEIGHBOURS)
        _apply(_mode_where_divided, padded, EIGHT_NEIGHBOURS)
        _apply(_without_equal_to_mode, padded, EIGHT_NEIGHBOURS)
        after[...] = padded[1:-1, 1:-1]
        if not np.any(after == VERTEBRAE):
            after[after != BACKGROUND] = VERTEBRAE
    return result


def apta(ids: np.ndarray) -> np.ndarray:
    """Raw label ids to classes by APTA, each slice by itself.

    Args:
        ids: integers (n, rows, columns), sagittal: superior up, anterior left.
    Returns:
        uint8 classes (n, rows, columns).
    Raises:
        ValueError: see `normalised_greys`.
    """
    return neighbourhood_passes(classes_from_greys(normalised_greys(ids)))


def audit(direct: np.ndarray, apta: np.ndarray) -> list[dict[str, Any]]:
    """What APTA changes against the direct map.

    Args:
        direct, apta: uint8 classes (n, rows, columns) of the same slices.
    Returns:
        One row per slice and class, background included: slice (from 0), class, direct_pixels, apta_pixels,
        both_pixels, gained (APTA's alone), lost (the direct map's alone), dice (NaN where both lack the class) and
        vanished (the direct map has the class there, APTA has none of it).
    Raises:
        ValueError: shapes differ.
    """
    if direct.shape != apta.shape:
        raise ValueError(
            f"APTA's classes have shape {apta.shape}; expected the direct map's {direct.shape}. "
            "Make both from the same label ids."
        )
    rows = []
    for index, planes in enumerate(zip(direct, apta, strict=True)):
        for number, name in enumerate(CLASSES):
            in_direct, in_apta = (plane == number for plane in planes)
            before, after = int(np.count_nonzero(in_direct)), int(np.count_nonzero(in_apta))
            both = int(np.count_nonzero(in_direct & in_apta))
            rows.append(
                {
                    "slice": index,
                    "class": name,
                    "direct_pixels": before,
                    "apta_pixels": after,
                    "both_pixels": both,
                    "gained": after - both,
                    "lost": before - both,
                    "dice": 2 * both / (before + after) if before + after else math.nan,
                    "vanished": before > 0 and after == 0,
                }
            )
    return rows


def summarise_audit(rows: pd.DataFrame) -> pd.DataFrame:
    """The audit of many slices, one row per class.

    Args:
        rows: of `audit`, all slices below each other.
    Returns:
        class, the pixel counts of `audit` summed, dice (pooled over pixels), then over the slices where the direct map
        has the class: dice_slice_mean, dice_lower_quarter (a quarter of them have at most this), slices (their number)
        and vanished_slices (those where APTA has none of it); last appeared_slices (where only APTA has the class).
    """
    summary = []
    for name, of_class in rows.groupby("class", sort=False):
        pixels = of_class[["direct_pixels", "apta_pixels", "both_pixels", "gained", "lost"]].sum()
        present = of_class[of_class["direct_pixels"] > 0]
        total = pixels["direct_pixels"] + pixels["apta_pixels"]
        summary.append(
            {"class": name}
            | {column: int(value) for column, value in pixels.items()}
            | {
                "dice": 2 * pixels["both_pixels"] / total if total else float("nan"),
                "dice_slice_mean": present["dice"].mean(),
                "dice_lower_quarter": present["dice"].quantile(0.25),
                "slices": len(present),
                "vanished_slices": int(present["vanished"].sum()),
                "appeared_slices": int(((of_class["direct_pixels"] == 0) & (of_class["apta_pixels"] > 0)).sum()),
            }
        )
    return pd.DataFrame(summary)


def _apply(rule: Callable, padded: np.ndarray, steps: Sequence[tuple[int, int]]) -> None:
    """Let a rule(own (k,), neighbours (steps, k)) -> (k,) replace the pixels of a slice inside its rim of _OUTSIDE.

    Where a pixel and its 8-neighbours are all alike, no rule changes it, so only the others are looked at. All
    neighbours are gathered before any pixel is written: the pass reads the state before it.
    """
    mixed = np.zeros(padded.shape, bool)
    mixed[1:-1, 1:-1] = _over_squares(padded, np.maximum) != _over_squares(padded, np.minimum)
    pixels, at = padded.ravel(), np.flatnonzero(mixed)
    neighbours = np.stack([pixels[at + (y * padded.shape[1] + x)] for x, y in steps])
    pixels[at] = rule(pixels[at], neighbours)


def _over_squares(padded: np.ndarray, extreme: np.ufunc) -> np.ndarray:
    """The extreme of each 3 x 3 square: (rows + 2, columns + 2) -> (rows, columns)."""
    of_columns = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
    return extreme(extreme(of_columns[:, :-2], of_columns[:, 1:-1]), of_columns[:, 2:])


def _mode(own: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    votes = np.zeros(neighbours.shape, np.uint8)
    for row in neighbours:
        votes += neighbours == row
    votes[neighbours == _OUTSIDE] = 0
    # argmax takes the first of equals: the tie rule, as the neighbours stand in its order.
    mode = np.take_along_axis(neighbours, votes.argmax(axis=0)[None], axis=0)[0]
    return np.where(mode == _OUTSIDE, own, mode)


def _mode_where_divided(own: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    mode = _mode(own, neighbours)
    divided = np.any((neighbours != mode) & (neighbours != _OUTSIDE), axis=0)
    return np.where(divided, mode, own)


def _without_equal_to_mode(own: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    return np.where(np.any(neighbours == own, axis=0), own, _mode(own, neighbours))


def _without_equal_to_background(own: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    return np.where(np.any(neighbours == own, axis=0), own, np.uint8(BACKGROUND))
