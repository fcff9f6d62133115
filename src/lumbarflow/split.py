"""Which slices train, choose and test the model. By patient, unless the paper's slice split is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow.model_input import SIDES
from lumbarflow.parameters import check_names

logger = logging.getLogger(__name__)

METHODS = ("patient", "official", "slice")
SETTINGS = ("method", "seed", "validation_fraction", "test_fraction", "validation_is_test")
COLUMNS = ["patient", "sequence", "series", "slice", "side"]


def split_slices(series_index: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """Assign every slice to a side.

    Args:
        series_index: one row per series with `series`, `patient`, `sequence`, `subset` ("training", "validation" or
            ""), `n_slices`.
        settings: `method` (one of METHODS), `seed`, `validation_fraction`, `test_fraction`, `validation_is_test`
            (slice method only).
    Returns:
        One row per slice and side: patient, sequence, series, slice, side. Under `validation_is_test` a slice has two.
    Raises:
        ValueError: unknown method, an empty side, or a patient on two sides (unless the method is `slice`).
    """
    check_names(settings, SETTINGS, "split")
    method = settings["method"]
    if method not in METHODS:
        raise ValueError(f"split.method is {method!r}; expected one of {', '.join(METHODS)}")
    if settings.get("validation_is_test") and method != "slice":
        raise ValueError(
            f"split.validation_is_test goes with split.method 'slice' only, not {method!r}: "
            "choosing a checkpoint on test patients would spoil their figures"
        )
    named = series_index[["patient", "sequence", "series"]]
    slices = named.loc[named.index.repeat(series_index["n_slices"])].copy()
    slices["slice"] = slices.groupby("series", sort=False).cumcount()
    if method == "slice":
        split = _by_slice(slices, settings)
        logger.warning(
            "split by slice: neighbouring slices of a patient stand on several sides, so the figures are too good. "
            "Use it to compare with the paper only"
        )
    else:
        assign = _official_sides if method == "official" else _patient_sides
        split = slices.assign(side=slices["patient"].map(assign(series_index, settings)))
    split = split[COLUMNS].sort_values(["series", "slice", "side"], ignore_index=True)
    check_split(split, leaky=method == "slice", explanation=_EXPLANATIONS[method])
    return split


_EXPLANATIONS = {
    "patient": "Each side needs a patient, three at least: add patients, or lower the fractions of the other sides.",
    "official": (
        "The official split tests on the patients whose subset is 'validation' in overview.csv; a partial copy may "
        "hold none of them. Add their scans, or use split.method=patient."
    ),
    "slice": "Raise split.validation_fraction or split.test_fraction, or add scans.",
}


def check_split(split: pd.DataFrame, leaky: bool, explanation: str = "") -> None:
    """Stop at an empty side, and, unless `leaky`, at a patient on two sides.

    Args:
        split: as returned by `split_slices`.
        leaky: whether the method puts slices of one patient on several sides knowingly.
        explanation: what to do about an empty side.
    """
    present = set(split["side"])
    empty = [side for side in SIDES if side not in present]
    if empty:
        counts = split.groupby("side")["patient"].nunique().to_dict()
        raise ValueError(f"the split leaves {' and '.join(empty)} empty (patients: {counts}). {explanation}".strip())
    if leaky:
        return
    sides = split.groupby("patient")["side"].nunique()
    shared = sides[sides > 1]
    if len(shared):
        # Numbers, not names: patients' names stay out of logs.
        raise ValueError(
            f"{len(shared)} patients stand on more than one side of the split; expected each on one. "
            "Was the split table edited? Run preprocess again."
        )


def _by_slice(slices: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    order = np.random.default_rng(settings["seed"]).permutation(len(slices))
    n_test = round(settings["test_fraction"] * len(slices))
    n_validation = 0 if settings.get("validation_is_test") else round(settings["validation_fraction"] * len(slices))
    side = np.full(len(slices), "train", dtype=object)
    side[order[:n_test]] = "test"
    side[order[n_test : n_test + n_validation]] = "validation"
    split = slices.assign(side=side)
    if settings.get("validation_is_test"):
        split = pd.concat([split, split[split["side"] == "test"].assign(side="validation")])
    return split


def _patient_sides(series_index: pd.DataFrame, settings: Mapping[str, Any]) -> dict[str, str]:
    patients = _sequences_of_patients(series_index)
    fractions = {"validation": settings["validation_fraction"], "test": settings["test_fraction"]}
    return _share_out(patients, fractions, settings["seed"])


def _official_sides(series_index: pd.DataFrame, settings: Mapping[str, Any]) -> dict[str, str]:
    subsets = series_index[series_index["subset"] != ""].groupby("patient")["subset"].unique()
    torn = int((subsets.map(len) > 1).sum())
    if torn:
        raise ValueError(
            f"overview.csv puts {torn} patients into both 'training' and 'validation'; expected one subset per "
            "patient. Correct the subset column."
        )
    # A series without a row follows its patient; a patient without any row joins the training patients.
    official = {patient: subset[0] for patient, subset in subsets.items()}
    sequences = _sequences_of_patients(series_index)
    test = {patient: "test" for patient in sequences if official.get(patient) == "validation"}
    training = {patient: value for patient, value in sequences.items() if patient not in test}
    return test | _share_out(training, {"validation": settings["validation_fraction"]}, settings["seed"])


def _sequences_of_patients(series_index: pd.DataFrame) -> dict[str, str]:
    """Patient -> its sequences in words, e.g. "t1+t2": the stratum that it is drawn from."""
    grouped = series_index.groupby("patient")["sequence"]
    return {patient: "+".join(sorted(set(sequences))) for patient, sequences in grouped}


def _share_out(strata: Mapping[str, str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Patients -> sides, in exact numbers and evenly within each stratum.

    Patients are shuffled, lined up by stratum, and each takes the side that is furthest behind its share so far.
    """
    counts = {side: max(1, round(fraction * len(strata))) for side, fraction in fractions.items() if fraction > 0}
    counts["train"] = max(0, len(strata) - sum(counts.values()))
    shuffled = np.random.default_rng(seed).permutation(sorted(strata)).tolist()
    sides, taken = {}, dict.fromkeys(counts, 0)
    for done, patient in enumerate(sorted(shuffled, key=lambda patient: strata[patient]), start=1):
        side = max(counts, key=lambda side: counts[side] * done / len(strata) - taken[side])
        sides[patient] = side
        taken[side] += 1
    return sides
