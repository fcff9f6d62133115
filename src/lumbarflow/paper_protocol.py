"""The figures of Ahmed et al. 2024 as their code computes them, so that ours can stand beside theirs.

They are not comparable with the literature: everything happens at the net's input size, "Dice" is a soft Dice of the
probabilities, and the surface figures are in pixels of a stack of slices of different patients, in which one slice's
neighbour is any other one. Each of these choices is a setting, so that they can be changed one at a time.

Source: arXiv 2409.06018 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    references, predictions, dices = [], [], []
    confusion = np.zeros((CLASS_COUNT, CLASS_COUNT), np.int64)
    for reference, probabilities in batches:
        prediction = probabilities.argmax(axis=-1).astype(np.uint8)
        references.append(reference)
        predictions.append(prediction)
        confusion += confusion_matrix(reference, prediction)
        if settings["dice"] == "soft":
            shared, *both = np.moveaxis(soft_overlap(reference, probabilities), -1, 0)
            total = sum(both)
            dices.append(np.divide(2 * shared, total, out=np.full(total.shape, np.nan), where=total > 0))
        else:
            pairs = zip(reference, prediction, strict=True)
            dices.append([class_scores(confusion_matrix(*pair))["dice"] for pair in pairs])
    if not references:
        raise ValueError("no slice to score; expected those of the side 'test'. Look at slice_index, and preprocess")
    reference, prediction, dice = map(np.concatenate, (references, predictions, dices))
    pooled = class_scores(confusion)
    if settings["stacked"]:
        order = np.random.default_rng(settings["stack_seed"]).permutation(len(reference))
        volumes = [(reference[order], prediction[order])]
    else:
        volumes = list(zip(reference, prediction, strict=True))
    rows = []
    for index, name in enumerate(CLASSES):
        figures = {"iou": pooled["iou"][index], "dice": _mean(dice[:, index])}
        surfaces = _surfaces(index, volumes, settings["nsd_tolerance_pixels"])
        figures |= {name: surfaces.pop(name) for name in ("asd_pixels", "nsd")}
        figures |= {score: pooled[score][index] for score in ("precision", "recall", "f1")}
        counts = {"n_slices": len(dice), "n_undefined": int(np.isnan(dice[:, index]).sum())} | surfaces
        rows.append({"class": name} | figures | counts)
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _surfaces(index: int, volumes: list[tuple[np.ndarray, np.ndarray]], tolerance: float) -> dict[str, float]:
    """Mean distance of the border pixels of all volumes, both ways, and the share of them within the tolerance.

    Pixels whose volume lacks the class on the other side have no distance: the mean leaves them out, and they count as
    too far away, as in `metrics.CONVENTION`. Both are NaN without any border at all, the distance also without a pair.
    """
    total, apart, near, with_both = 0, [], 0, 0
    for reference, prediction in volumes:
        borders = [_border(volume == index) for volume in (reference, prediction)]
        counts = [int(np.count_nonzero(border)) for border in borders]
        total += sum(counts)
        if not all(counts):
            continue
        with_both += 1
        # What both borders share, most of them, is at distance 0; only the others are looked for.
        shared = borders[0] & borders[1]
        points = [np.argwhere(border) for border in borders]
        distances = [np.zeros(2 * np.count_nonzero(shared))]
        for border, other in ((borders[0], points[1]), (borders[1], points[0])):
            tree = cKDTree(other, balanced_tree=False, compact_nodes=False)
            distances.append(tree.query(np.argwhere(border & ~shared))[0])
        together = np.concatenate(distances)
        apart.append((together.sum(), len(together)))
        near += int(np.count_nonzero(together <= tolerance))
    distance, pixels = np.sum(apart, axis=0) if apart else (0.0, 0)
    return {
        "asd_pixels": float(distance / pixels) if pixels else float("nan"),
        "nsd": near / total if total else float("nan"),
        "n_surface": with_both,
        "n_volumes": len(volumes),
    }


def _border(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a face neighbour outside it, bool of its shape; the image's edge is outside."""
    return mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1))
