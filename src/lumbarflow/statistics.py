"""Uncertainty of figures: bootstrap intervals over patients, and paired tests between models.

Patients are what is drawn anew, never slices or series: those of one patient resemble each other, and counted as
independent they would make every interval too narrow. Undefined figures (NaN) are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASSES, FOREGROUND
from lumbarflow.metrics import MEAN_FOREGROUND, class_scores

SAMPLES = 2000
LEVEL = 0.95


def patient_bootstrap(
    values: pd.DataFrame,
    columns: Sequence[str],
    *,
    by: Sequence[str] = ("class",),
    patient: str = "patient",
    samples: int = SAMPLES,
    seed: int,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Percentile intervals of means over cases, with whole patients drawn anew.

    A draw takes as many patients as there are, with replacement, each with all its cases. Patients without any figure
    are not drawn from, so that no draw is without one. Every group and metric uses the same seed: a row does not
    depend on which others are asked for.

    Args:
        values: one row per case (e.g. series and class): the columns `by`, `patient` and `columns`; NaN is undefined.
        columns: the metrics.
        by: what groups the rows.
        samples: number of draws.
        level: share of the draws between low and high.
    Returns:
        `by`, metric, mean (over the cases with a figure), low, high, n_cases (those cases), n_patients (who have one),
        n_undefined (the other cases). With fewer than two patients low and high are NaN: every draw would be the same,
        and its interval of width 0 would look like certainty.
    Raises:
        ValueError: missing columns, a row without group or patient, infinite figures, samples or level out of range.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals); the unit
        drawn is the patient because only patients are independent.
    """
    by, columns = list(by), list(columns)
    _check_table(values, by, columns, patient)
    _check_draws(samples, level)
    counts: dict[int, np.ndarray] = {}  # number of patients -> how often each draw takes each patient
    rows = []
    for group, cases in values.groupby(by, sort=False):
        patients = cases.groupby(patient)[columns]
        sums, figures = patients.sum(), patients.count()
        for metric in columns:
            there = figures[metric] > 0
            total, number = sums.loc[there, metric].to_numpy(np.float64), figures.loc[there, metric].to_numpy()
            low = high = np.nan
            if len(total) > 1:
                if len(total) not in counts:
                    counts[len(total)] = _draws(len(total), samples, seed)
                taken = counts[len(total)]
                low, high = _interval((taken @ total) / (taken @ number), level)
            rows.append(
                dict(zip(by, group, strict=True))
                | {
                    "metric": metric,
                    "mean": total.sum() / number.sum() if len(total) else np.nan,
                    "low": low,
                    "high": high,
                    "n_cases": int(number.sum()),
                    "n_patients": len(total),
                    "n_undefined": len(cases) - int(number.sum()),
                }
            )
    return pd.DataFrame(rows, columns=[*by, "metric", "mean", "low", "high", "n_cases", "n_patients", "n_undefined"])


def pooled_bootstrap(
    confusions: Mapping[str, np.ndarray],
    metrics: Sequence[str] = ("dice",),
    *,
    samples: int = SAMPLES,
    seed: int,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Percentile intervals of figures pooled over all voxels, with whole patients drawn anew.

    Args:
        confusions: patient -> confusion matrix (classes, classes), summed over the patient's cases.
        metrics: names of `metrics.class_scores`.
        samples, level: see `patient_bootstrap`.
    Returns:
        class, metric, value (of the patients as they are), low, high, n_patients, n_undefined_draws (draws in which
        neither side has the class; low and high are over the others). One row per class and, as the last of each
        metric, the mean over the foreground classes, undefined if one of them is. With fewer than two patients low and
        high are NaN, as in `patient_bootstrap`.
    Raises:
        ValueError: no patients, samples or level out of range.
    """
    if not confusions:
        raise ValueError("confusion matrices of 0 patients; expected at least one. Evaluate some cases first.")
    _check_draws(samples, level)
    metrics = list(metrics)
    matrices = np.stack([confusions[patient] for patient in sorted(confusions)]).astype(np.int64)
    taken = _draws(len(matrices), samples, seed)
    value = _pooled_scores(matrices.sum(axis=0), metrics)
    draws = np.stack([_pooled_scores(matrix, metrics) for matrix in np.tensordot(taken, matrices, axes=1)])
    rows = []
    for i, metric in enumerate(metrics):
        for j, name in enumerate([*CLASSES, MEAN_FOREGROUND]):
            defined = draws[:, i, j][~np.isnan(draws[:, i, j])]
            low, high = _interval(defined, level) if len(matrices) > 1 and len(defined) else (np.nan, np.nan)
            rows.append(
                {
                    "class": name,
                    "metric": metric,
                    "value": value[i, j],
                    "low": low,
                    "high": high,
                    "n_patients": len(matrices),
                    "n_undefined_draws": samples - len(defined),
                }
            )
    return pd.DataFrame(rows)


def paired_wilcoxon(
    values: pd.DataFrame,
    reference_model: str,
    metric: str,
    *,
    by: str = "class",
    patient: str = "patient",
) -> pd.DataFrame:
    """Two-sided Wilcoxon signed-rank tests of every other model against one, paired by patient.

    A patient counts once, with the mean over its cases that have a figure. Patients without difference are left out of
    the ranks, as Wilcoxon did. The p-value is exact for up to 50 differing patients (up to 13 if differences tie) and
    the normal approximation with continuity correction beyond.

    Args:
        values: one row per model and case: model, `patient`, `by` and `metric`; NaN is undefined.
        reference_model: the model that the others are compared with.
    Returns:
        model, `by`, n_patients (those with a figure of both models), n_unpaired (the other patients of the class),
        median_difference (model minus reference), statistic (the smaller rank sum), p, p_smallest (the smallest p that
        so many differing patients can reach: 0.03125 with 6; a test that cannot fall below its level says nothing),
        p_holm (over all tests of this table). Without pairs the figures are NaN; without any difference p is 1.
    Raises:
        ValueError: missing columns, a row without group or patient, infinite figures, no such model or no other one.
    Source: Wilcoxon, Biometrics Bulletin 1(6):80-83, 1945.
    """
    _check_table(values, ["model", by], [metric], patient)
    models = list(dict.fromkeys(values["model"]))
    if reference_model not in models or len(models) < 2:
        raise ValueError(
            f"the table holds the models {models}; expected {reference_model!r} and at least one other. "
            "Evaluate the missing ones first."
        )
    groups = values.groupby([by, patient, "model"], sort=False)
    means = groups[metric].mean().unstack("model")
    rows = []
    for model in models:
        if model == reference_model:
            continue
        for group, figures in means.groupby(level=by, sort=False):
            differences = (figures[model] - figures[reference_model]).to_numpy(np.float64)
            paired = differences[~np.isnan(differences)]
            rows.append(
                {
                    "model": model,
                    by: group,
                    "n_patients": len(paired),
                    "n_unpaired": len(differences) - len(paired),
                    "median_difference": np.median(paired) if len(paired) else np.nan,
                    **_signed_rank(paired),
                }
            )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of some p-values, float64 in the order given.

    NaN is no test: it stays NaN and does not count.

    Raises:
        ValueError: values outside 0 to 1.
    Source: Holm, Scandinavian Journal of Statistics 6(2):65-70, 1979.
    """
    p = np.asarray(p, dtype=np.float64)
    tests = np.flatnonzero(~np.isnan(p))
    if np.any((p[tests] < 0) | (p[tests] > 1)):
        raise ValueError(f"p-values from {p[tests].min():g} to {p[tests].max():g}; expected 0 to 1. Pass p, not z.")
    order = tests[np.argsort(p[tests])]
    corrected = np.full(p.shape, np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def _signed_rank(differences: np.ndarray) -> dict[str, float]:
    """Statistic, p and the smallest possible p of paired differences without NaN."""
    from scipy import stats  # here: every command imports this module, and few compare models

    differing = differences[differences != 0]
    if not len(differing):
        return {"statistic": 0.0, "p": 1.0, "p_smallest": 1.0} if len(differences) else dict.fromkeys(_TEST, np.nan)
    # Without zeros "auto" is exact, or complete enumeration where differences tie, as far as the docstring above says.
    result = stats.wilcoxon(differing, zero_method="wilcox", correction=True, alternative="two-sided", method="auto")
    smallest = 2.0 ** (1 - len(differing))  # all differences of one sign: 2 of the 2^n equally likely outcomes
    return {"statistic": float(result.statistic), "p": float(result.pvalue), "p_smallest": smallest}


_TEST = ("statistic", "p", "p_smallest")


def _draws(patients: int, samples: int, seed: int) -> np.ndarray:
    """int64 (samples, patients): how often each draw takes each patient."""
    drawn = np.random.default_rng(seed).integers(patients, size=(samples, patients))
    drawn += patients * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * patients).reshape(samples, patients)


def _interval(draws: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])


def _pooled_scores(confusion: np.ndarray, metrics: list[str]) -> np.ndarray:
    """float64 (metrics, classes and their foreground mean)."""
    scores = class_scores(confusion)
    table = np.stack([scores[metric] for metric in metrics])
    return np.column_stack([table, table[:, list(FOREGROUND)].mean(axis=1)])


def _check_table(values: pd.DataFrame, by: list[str], columns: list[str], patient: str) -> None:
    missing = [name for name in (*by, patient, *columns) if name not in values]
    if missing:
        raise ValueError(f"a table without {missing}; expected them beside {list(values)}. Name its columns.")
    for name in (*by, patient):
        if unnamed := int(values[name].isna().sum()):
            raise ValueError(f"{unnamed} rows without {name!r}; expected one in each. Complete that column.")
    if infinite := int(np.isinf(values[columns].to_numpy(np.float64)).sum()):
        raise ValueError(f"{infinite} infinite figures in {columns}; expected finite ones. Undefined is written NaN.")


def _check_draws(samples: int, level: float) -> None:
    if samples < 1 or not 0 < level < 1:
        raise ValueError(
            f"{samples} samples at level {level:g}; expected at least 1 at a level between 0 and 1, e.g. 0.95 for 95 %."
        )
