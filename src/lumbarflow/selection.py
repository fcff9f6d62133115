"""Which slices of a side are used: the paper's filters, each slice kept in the table with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.parameters import check_names

SETTINGS = ("sides", "minimum_classes", "imbalance_rule", "imbalance_limit", "slices_per_sequence", "seed")
COUNT_COLUMNS = [f"pixels_{name}" for name in CLASSES]


def lowest_over_highest(counts: np.ndarray) -> np.ndarray:
    """int (n, classes) pixels -> float (n,): smallest over largest foreground class, 0 without foreground.

    Source: the journal's reading of the "class imbalance" in Ahmed et al. 2024.
    """
    foreground = counts[:, list(FOREGROUND)]
    highest = foreground.max(axis=1)
    return np.divide(foreground.min(axis=1), highest, out=np.zeros(len(counts)), where=highest > 0)


IMBALANCE_RULES = {"lowest_over_highest": lowest_over_highest}


def index_slices(split: pd.DataFrame, counts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Apply the filters.

    Args:
        split: see `split.split_slices`.
        counts: series -> (n, classes) pixels of each class in each slice, on the native grid.
        settings: `sides` filtered; `minimum_classes` (background counts); `imbalance_rule` (a name of IMBALANCE_RULES
            or null) with `imbalance_limit`; `slices_per_sequence` (null for no cap) with `seed`.
    Returns:
        `split` with the counts, `classes_present`, `imbalance`, `kept` and `reason` ("" if kept).
    Raises:
        ValueError: an unknown rule, or a side left without a slice.
    """
    check_names(settings, SETTINGS, "filter")
    rule_name = settings["imbalance_rule"]
    if rule_name is not None and rule_name not in IMBALANCE_RULES:
        raise ValueError(
            f"filter.imbalance_rule is {rule_name!r}; expected null or one of {', '.join(IMBALANCE_RULES)}"
        )
    pixels = np.array(
        [counts[series][index] for series, index in zip(split["series"], split["slice"], strict=True)], np.int64
    )
    index = split.copy()
    index[COUNT_COLUMNS] = pixels
    index["classes_present"] = np.count_nonzero(pixels, axis=1)
    index["imbalance"] = IMBALANCE_RULES[rule_name or "lowest_over_highest"](pixels)
    index["reason"] = ""
    filtered = index["side"].isin(settings["sides"])

    few = index["classes_present"] < settings["minimum_classes"]
    index.loc[filtered & few, "reason"] = f"fewer than {settings['minimum_classes']} classes"
    if rule_name is not None:
        above = index["imbalance"] > settings["imbalance_limit"]
        index.loc[filtered & above & (index["reason"] == ""), "reason"] = (
            f"{rule_name} above {settings['imbalance_limit']}"
        )
    cap = settings["slices_per_sequence"]
    if cap is not None:
        rng = np.random.default_rng(settings["seed"])
        left = index[filtered & (index["reason"] == "")]
        for _, group in left.groupby(["side", "sequence"]):
            beyond = rng.permutation(group.index.to_numpy())[cap:]
            index.loc[beyond, "reason"] = f"beyond {cap} slices of its sequence"
    index["kept"] = index["reason"] == ""

    emptied = sorted(set(index["side"]) - set(index.loc[index["kept"], "side"]))
    if emptied:
        reasons = index[index["side"].isin(emptied)]["reason"].value_counts().to_dict()
        raise ValueError(
            f"the slice filter leaves {' and '.join(emptied)} empty ({reasons}). "
            "Loosen filter.minimum_classes, filter.imbalance_limit or filter.slices_per_sequence."
        )
    return index
