"""Figures of merit from confusion matrices.

A structure missing on both sides has no figure (NaN, counted as undefined); one missing on one side only scores 0 in
every figure, whichever side it is. Means over cases always come with the number of cases they are over.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASS_COUNT, CLASSES, FOREGROUND

SCORES = ("dice", "iou", "precision", "recall", "f1")
MEAN_FOREGROUND = "mean foreground"


def confusion_matrix(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Voxel counts, int64 (classes, classes): row the reference class, column the predicted one.

    Args:
        reference, prediction: uint8 classes of any equal shape.
    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"prediction of shape {prediction.shape}; expected the reference's {reference.shape}")
    pairs = reference.ravel().astype(np.intp) * CLASS_COUNT + prediction.ravel()
    return np.bincount(pairs, minlength=CLASS_COUNT**2).reshape(CLASS_COUNT, CLASS_COUNT).astype(np.int64)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU, precision, recall and F1 of each class; float64 (classes,) each, NaN where both sides lack it.

    Dice and F1 of hard labels are the same number; both stand here because the paper's "Dice" is another one.
    """
    both = np.diag(confusion).astype(np.float64)
    reference, predicted = confusion.sum(axis=1).astype(np.float64), confusion.sum(axis=0).astype(np.float64)

    def ratio(over: np.ndarray) -> np.ndarray:
        # One side missing leaves 0 / 0 in precision or recall: 0 by the convention above.
        score = np.divide(both, over, out=np.zeros_like(both), where=over > 0)
        return np.where(reference + predicted > 0, score, np.nan)

    dice = ratio((reference + predicted) / 2)
    return {
        "dice": dice,
        "iou": ratio(reference + predicted - both),
        "precision": ratio(predicted),
        "recall": ratio(reference),
        "f1": dice.copy(),
    }


def mean_foreground_dice(confusion: np.ndarray) -> float:
    """Mean over classes 1 to 3 of the Dice of one (pooled) confusion matrix; NaN if a class is on neither side."""
    return float(np.mean(class_scores(confusion)["dice"][list(FOREGROUND)]))


def table_by_case(cases: Mapping[str, tuple[str, np.ndarray]]) -> pd.DataFrame:
    """One row per series and class.

    Args:
        cases: series -> (patient, confusion matrix).
    Returns:
        series, patient, class, the SCORES, reference_voxels, predicted_voxels.
    """
    rows = []
    for series, (patient, confusion) in sorted(cases.items()):
        scores = class_scores(confusion)
        for index, name in enumerate(CLASSES):
            rows.append(
                {"series": series, "patient": patient, "class": name}
                | {score: scores[score][index] for score in SCORES}
                | {
                    "reference_voxels": int(confusion[index].sum()),
                    "predicted_voxels": int(confusion[:, index].sum()),
                }
            )
    return pd.DataFrame(rows)


def table_by_class(by_case: pd.DataFrame, pooled: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per class and scope.

    Args:
        by_case: see `table_by_case`.
        pooled: scope -> confusion matrix summed over the cases, e.g. "pooled" and "ceiling".
    Returns:
        class, scope, the SCORES, n_cases, n_undefined (cases of which the class has no figure). The scope "case mean"
        averages the cases with a figure. The last row of each scope is the mean over the foreground classes.
    """
    n_cases = by_case["series"].nunique()
    tables = []
    for scope, confusion in pooled.items():
        tables.append(pd.DataFrame({"class": CLASSES, "scope": scope} | class_scores(confusion)))
    means = by_case.groupby("class", sort=False)[list(SCORES)].mean().reindex(CLASSES).reset_index()
    tables.insert(1, means.assign(scope="case mean"))
    undefined = by_case["dice"].isna().groupby(by_case["class"]).sum()
    rows = []
    for table in tables:
        table["n_cases"] = n_cases
        table["n_undefined"] = [int(undefined[name]) for name in table["class"]]
        foreground = table[table["class"] != CLASSES[0]]
        last = {"class": MEAN_FOREGROUND, "scope": table["scope"].iloc[0], "n_cases": n_cases}
        last |= {score: foreground[score].mean(skipna=False) for score in SCORES}
        last["n_undefined"] = int(foreground["n_undefined"].sum())
        rows += [table, pd.DataFrame([last])]
    columns = ["class", "scope", *SCORES, "n_cases", "n_undefined"]
    return pd.concat(rows, ignore_index=True)[columns]
