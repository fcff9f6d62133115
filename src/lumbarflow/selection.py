"""Which slices of a side are used: the paper's filters, each slice kept in the table with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.parameters import check_names

SETTINGS = ("sides", "minimum_classes", "imbalance_rule", "imbalance_limit", "slices_per_sequence", "seed")
SLICE = ["series", "slice"]  # the columns that name a slice; one may stand on two sides
COUNT_COLUMNS = [f"pixels_{name}" for name in CLASSES]


def lowest_over_highest(counts: np.ndarray) -> np.ndarray:
    """int (n, classes) pixels -> float (n,): smallest over largest foreground class, 0 without foreground.

    Source: the journal's reading of the "class imbalance" in Ahmed et al. 2024.
    """
    foreground = counts[:, list(FOREGROUND)]
    highest = foreground.max(axis=1)
    return np.divide(foreground.min(axis=1), highest, out=np.zeros(len(counts)), where=highest > 0)


def highest_over_lowest(counts: np.ndarray) -> np.ndarray:
    """int (n, classes) pixels -> float (n,): largest over smallest foreground class, infinite where one is missing.

    Never below 1, so a limit of 0.55 drops every slice: this reading cannot be what the paper did.
    Source: the preprint's reading in Ahmed et al. 2024, arXiv 2409.06018.
    """
    foreground = counts[:, list(FOREGROUND)]
    lowest = foreground.min(axis=1)
    return np.divide(foreground.max(axis=1), lowest, out=np.full(len(counts), np.inf), where=lowest > 0)


def largest_share(counts: np.ndarray) -> np.ndarray:
    """int (n, classes) pixels -> float (n,): the largest foreground class's share of the foreground, 1/3 to 1.

    NaN without foreground: a share of nothing is no number, and NaN lies above no limit, so that the class filter
    alone decides on such a slice.
    Source: a third reading of Ahmed et al. 2024, which agrees with its pictures.
    """
    foreground = counts[:, list(FOREGROUND)]
    whole = foreground.sum(axis=1)
    return np.divide(foreground.max(axis=1), whole, out=np.full(len(counts), np.nan), where=whole > 0)


# What "class imbalance above 55 %" may mean. Every rule drops the slices whose measure lies above the limit.
IMBALANCE_RULES = {
    "lowest_over_highest": lowest_over_highest,
    "highest_over_lowest": highest_over_lowest,
    "largest_share": largest_share,
}


def index_slices(split: pd.DataFrame, counts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Apply the filters.

    Args:
        split: see `split.split_slices`.
        counts: series -> (n, classes) pixels of each class in each slice, on the native grid.
        settings: `sides` filtered; `minimum_classes` (background counts); `imbalance_rule` (a name of IMBALANCE_RULES
            or null) with `imbalance_limit`; `slices_per_sequence` (null for no cap) with `seed`. The cap counts the
            slices of a sequence over all filtered sides together. One that stands on two of them counts once, and
            is kept or dropped on both.
    Returns:
        `split` with the counts, `classes_present`, `imbalance` (the rule's measure; the first rule's under null),
        `kept` and `reason` ("" if kept).
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
        names = pd.MultiIndex.from_frame(index[SLICE])
        left = filtered & (index["reason"] == "")
        for _, slices in index[left].drop_duplicates(SLICE).groupby("sequence"):
            beyond = pd.MultiIndex.from_frame(slices[SLICE])[rng.permutation(len(slices))[cap:]]
            index.loc[left & names.isin(beyond), "reason"] = f"beyond {cap} slices of its sequence"
    index["kept"] = index["reason"] == ""

    emptied = sorted(set(index["side"]) - set(index.loc[index["kept"], "side"]))
    if emptied:
        reasons = index[index["side"].isin(emptied)]["reason"].value_counts().to_dict()
        raise ValueError(
            f"the slice filter leaves {' and '.join(emptied)} empty ({reasons}). "
            "Loosen filter.minimum_classes, filter.imbalance_limit or filter.slices_per_sequence."
        )
    return index


def compare_rules(index: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """What each reading of the 55 % rule would keep, whichever of them is in force and whatever the cap left out.

    Args:
        index: see `index_slices`. The slices of all its sides are looked at, each once.
        settings: as for `index_slices`; `minimum_classes` and `imbalance_limit` are used.
    Returns:
        One row per rule and sequence, and per rule a last one for "all" of them: rule, sequence, limit, considered
        (slices with `minimum_classes` classes), kept, dropped, undefined (how many of the kept have no measure), and
        minimum, median and maximum of the measure (NaN where no slice has one).
    """
    slices = index.drop_duplicates(SLICE)
    considered = slices[slices["classes_present"] >= settings["minimum_classes"]]
    limit, rows = settings["imbalance_limit"], []
    for rule, measure in IMBALANCE_RULES.items():
        imbalance = pd.Series(measure(considered[COUNT_COLUMNS].to_numpy()), considered.index)
        parts = {name: imbalance[considered["sequence"] == name] for name in sorted(set(slices["sequence"]))}
        for sequence, values in [*parts.items(), ("all", imbalance)]:
            dropped = int((values > limit).sum())
            rows.append(
                {
                    "rule": rule,
                    "sequence": sequence,
                    "limit": limit,
                    "considered": len(values),
                    "kept": len(values) - dropped,
                    "dropped": dropped,
                    "undefined": int(values.isna().sum()),
                    "minimum": values.min(),
                    "median": values.median(),
                    "maximum": values.max(),
                }
            )
    return pd.DataFrame(rows)
