"""The figures of Ahmed et al. 2024 as their code computes them, so that ours can stand beside theirs.

They are not comparable with the literature: everything happens at the net's input size, "Dice" is a soft Dice of the
probabilities, and the surface figures are in pixels of a stack of slices of different patients, in which one slice's
neighbour is any other one. Each of these choices is a setting, so that they can be changed one at a time.

Source: arXiv 2409.06018 and the authors' code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial import cKDTree

from lumbarflow.labels import CLASS_COUNT, CLASSES
from lumbarflow.metrics import class_scores, confusion_matrix, soft_overlap
from lumbarflow.parameters import check_names

SETTINGS = ("dice", "nsd_tolerance_pixels", "stacked", "stack_seed")
DICES = ("soft", "hard")

# Slices of the stack that are in memory at once.
_PART = 64


def paper_scores(batches: Iterable[tuple[np.ndarray, np.ndarray]], settings: Mapping[str, Any]) -> pd.DataFrame:
    """One row per class, background included, with the columns of the paper's tables.

    Args:
        batches: (reference uint8 (n, H, W), probabilities float (n, H, W, classes)) of the scored slices, at the size
            of the net's input.
        settings: SETTINGS. `dice`: "soft" (the paper's: of the probabilities, mean over slices) or "hard" (of the
            decided pixels, mean over slices). `nsd_tolerance_pixels`. `stacked`: True takes one stack of all slices,
            shuffled by `stack_seed`, as a volume of voxels 1 x 1 x 1 (the paper's); False takes each slice by itself.
    Returns:
        class, iou, dice, asd_pixels, nsd, precision, recall, f1 (IoU, precision, recall and F1 of the confusion matrix
        pooled over pixels), n_slices, n_undefined (slices without a Dice because nobody has the class there; of a
        softmax, which is nowhere 0, there are none), n_surface (volumes with the class on both sides) of n_volumes.
    Raises:
        ValueError: an unknown setting or Dice, or no slice.
    """
    check_names(settings, SETTINGS, "paper_protocol")
    if settings["dice"] not in DICES:
        raise ValueError(f"paper_protocol.dice is {settings['dice']!r}; expected one of {', '.join(DICES)}")
    dices: list[Any] = []
    confusion = np.zeros((CLASS_COUNT, CLASS_COUNT), np.int64)
    # The stack needs all slices in an order of its own. They lie in a file that is gone afterwards: in memory, those of
    # a large cohort would be what grows most.
    with tempfile.TemporaryFile() as file:
        for reference, probabilities in batches:
            prediction = probabilities.argmax(axis=-1).astype(np.uint8)
            np.stack([reference, prediction], axis=1).astype(np.uint8).tofile(file)
            confusion += confusion_matrix(reference, prediction)
            if settings["dice"] == "soft":
                shared, *both = np.moveaxis(soft_overlap(reference, probabilities), -1, 0)
                total = sum(both)
                dices.append(np.divide(2 * shared, total, out=np.full(total.shape, np.nan), where=total > 0))
            else:
                pairs = zip(reference, prediction, strict=True)
                dices.append([class_scores(confusion_matrix(*pair))["dice"] for pair in pairs])
        if not dices:
            raise ValueError(
                "no slice to score; expected those of the side 'test'. Look at slice_index, and preprocess"
            )
        file.flush()
        dice = np.concatenate(dices)
        pairs = np.memmap(file, np.uint8, "r", shape=(len(dice), 2, *reference.shape[1:]))
        if settings["stacked"]:
            stacks = [_Stack(pairs, np.random.default_rng(settings["stack_seed"]).permutation(len(pairs)))]
        else:
            stacks = [_Stack(pairs, np.array([index]), flat=True) for index in range(len(pairs))]
        surfaces = [_surfaces(index, stacks, settings["nsd_tolerance_pixels"]) for index in range(CLASS_COUNT)]
    pooled = class_scores(confusion)
    rows = []
    for index, name in enumerate(CLASSES):
        figures = {"iou": pooled["iou"][index], "dice": _mean(dice[:, index])}
        figures |= {name: surfaces[index].pop(name) for name in ("asd_pixels", "nsd")}
        figures |= {score: pooled[score][index] for score in ("precision", "recall", "f1")}
        counts = {"n_slices": len(dice), "n_undefined": int(np.isnan(dice[:, index]).sum())} | surfaces[index]
        rows.append({"class": name} | figures | counts)
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


@dataclass(frozen=True)
class _Stack:
    """Slices as one volume of voxels 1 x 1 x 1.

    Attributes:
        pairs: uint8 (slices, 2, H, W), classes of reference and prediction; may be a mapped file.
        order: which of them lie in the stack, from its first slice to its last.
        flat: a slice by itself, whose pixels have no neighbours but those in its plane.
    """

    pairs: np.ndarray
    order: np.ndarray
    flat: bool = False

    def __len__(self) -> int:
        return len(self.order)

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The slices from `start` up to `stop`, some at a time: where they begin, and (slices, 2, H, W)."""
        for first in range(start, stop, _PART):
            yield first, self.pairs[self.order[first : min(first + _PART, stop)]]

    def points(self, index: int, start: int = 0, stop: int | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Border pixels (slice, row, column) of a class in reference and prediction from `start` up to `stop`; and of
        each side those that the other one does not share."""
        stop = len(self) if stop is None else stop
        found: list[list[np.ndarray]] = [[], [], [], []]
        for first in range(start, stop, _PART):
            last = min(first + _PART, stop)
            # A neighbour on either side, so that the borders are those of the whole stack.
            low = max(first - 1, 0)
            masks = self.pairs[self.order[low : last + 1]] == index
            borders = [_border(masks[:, side], self.flat)[first - low : last - low] for side in (0, 1)]
            shared = borders[0] & borders[1]
            for points, mask in zip(found, (*borders, *(border & ~shared for border in borders)), strict=True):
                points.append(np.argwhere(mask) + [first, 0, 0])
        together = [np.concatenate(points) for points in found]
        return together[:2], together[2:]


def _surfaces(index: int, stacks: Sequence[_Stack], tolerance: float) -> dict[str, float]:
    """Mean distance of the border pixels of all stacks, both ways, and the share of them within the tolerance.

    Pixels whose stack lacks the class on the other side have no distance: the mean leaves them out, and they count as
    too far away, as in `metrics.CONVENTION`. Both are NaN without any border at all, the distance also without a pair.
    """
    total, near, with_both, pixels, distance = 0, 0, 0, 0, 0.0
    for stack in stacks:
        there = np.zeros(2, bool)
        for _, part in stack.parts(0, len(stack)):
            there |= (part == index).any(axis=(0, 2, 3))
        with_both += int(there.all())
        for count, apart in _distances(index, stack, bool(there.all())):
            total += count
            if there.all():
                pixels += count
                distance += apart.sum()
                # What both borders share, most of them, is at distance 0.
                near += count - len(apart) + int(np.count_nonzero(apart <= tolerance))
    return {
        "asd_pixels": float(distance / pixels) if pixels else float("nan"),
        "nsd": near / total if total else float("nan"),
        "n_surface": with_both,
        "n_volumes": len(stacks),
    }


def _distances(index: int, stack: _Stack, measured: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Of some border pixels after the other: how many they are, and the distances of those that are not shared.

    Window by window, so that memory does not grow with the stack. A window reaches so far beyond the slices that are
    looked at that whatever lies outside is farther away than `reach`: a shorter distance is right. Pixels without one,
    which are few unless a net misses a class nearly everywhere, look through the whole stack at the end.
    """
    reach = max(stack.pairs.shape[2:])
    left: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, len(stack), 2 * reach):
        stop = min(start + 2 * reach, len(stack))
        low, high = max(start - reach, 0), min(stop + reach, len(stack))
        borders, unshared = stack.points(index, low, high)
        count = sum(int(np.count_nonzero(_within(points, start, stop))) for points in borders)
        apart = []
        for side in (0, 1) if measured else ():
            asking = unshared[side][_within(unshared[side], start, stop)]
            found = _nearest(asking, borders[1 - side])
            known = (found <= reach) | (low == 0 and high == len(stack))
            apart.append(found[known])
            left[side].append(asking[~known])
            count -= int(np.count_nonzero(~known))
        yield count, np.concatenate([*apart, []])
    remaining = [np.concatenate([*points, np.empty((0, 3), np.intp)]) for points in left]
    if any(map(len, remaining)):
        borders, _ = stack.points(index)
        for side in (0, 1):
            yield len(remaining[side]), _nearest(remaining[side], borders[1 - side])


def _within(points: np.ndarray, start: int, stop: int) -> np.ndarray:
    return (points[:, 0] >= start) & (points[:, 0] < stop)


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest of the others; infinite where there are none."""
    if not len(points) or not len(others):
        return np.full(len(points), np.inf)
    return cKDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0]


def _border(mask: np.ndarray, flat: bool) -> np.ndarray:
    """Pixels of the mask with a face neighbour outside it, bool of its shape; the image's edge is outside."""
    neighbours = generate_binary_structure(2, 1)[None] if flat else generate_binary_structure(3, 1)
    return mask & ~binary_erosion(mask, neighbours)
