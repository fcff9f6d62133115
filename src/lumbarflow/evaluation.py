"""From a net, or anybody's masks, to the tables of figures: one path for the model, the baselines and other tools.

Predictions lie in a SeriesStore, one entry per case: `labels.mha` in the storage order of the raw file, and, where they
come from probabilities, what there is to say of these, slice by slice: `soft_overlap.npy` (see `metrics.soft_overlap`),
`entropy.npy` and `reliability.npy` (see `uncertainty.entropy_sums` and `reliability_counts`). Cases are read one at a
time.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import (
    augmentation,
    imaging,
    inference,
    intensity,
    metrics,
    model_input,
    onnx_network,
    resampling,
    statistics,
    uncertainty,
)
from lumbarflow.files import code_digest, value_digest
from lumbarflow.imaging import LabelMap, Orientation
from lumbarflow.inference import Segmenter
from lumbarflow.labels import FOREGROUND
from lumbarflow.model_input import INGESTED, PREDICTION, SIDES, ModelInput
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.parallel import Workers, raise_failures
from lumbarflow.parameters import check_names
from lumbarflow.progress import track
from lumbarflow.provenance import check_ingested
from lumbarflow.store import RECORD, SeriesStore, Work

# The section `evaluation` of the parameters.
SETTINGS = (*PREDICTION, "metrics", "intervals")
LABELS, SOFT_OVERLAP, ENTROPY, RELIABILITY = "labels.mha", "soft_overlap.npy", "entropy.npy", "reliability.npy"


def check_figures(names: Iterable[str], settings: Mapping[str, Any], section: str) -> None:
    """Stop at a figure that the tables will not have, before anything is trained for it.

    Args:
        names: columns asked for.
        settings: SETTINGS.
        section: what asks for them.
    Raises:
        ValueError: names it and what there is.
    """
    there = metrics.figure_columns(settings["metrics"]["nsd_tolerances_mm"])
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"{section} names {unknown}; expected some of {there}")


@dataclass(frozen=True)
class Case:
    """One series to score, uint8 classes (slice, row, column) on both sides.

    Attributes:
        spacing_mm: (slice, row, column).
        tested: indices of the slices that count; all of them unless the split is by slice.
        soft_overlap: float64 (slices, classes, 3) of `metrics.soft_overlap`; None if there are no probabilities.
        entropy: float64 (slices, structures, 2) of `uncertainty.entropy_sums`; None likewise.
        reliability: float64 (slices, structures, bins, 3) of `uncertainty.reliability_counts`; None likewise.
    """

    series: str
    patient: str
    reference: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, float, float]
    tested: np.ndarray
    soft_overlap: np.ndarray | None = None
    entropy: np.ndarray | None = None
    reliability: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """The tables of some cases, see `metrics` for their columns.

    Attributes:
        by_slice, by_case, by_class: figures of each slice, case and class. Cases have an entropy besides: the mean over
            the pixels decided as the structure, see `uncertainty.entropy`; NaN where there are none, for background,
            and without probabilities.
        intervals: scope, class, metric, value, low, high, n_cases (those with the class on either side; for the mean
            foreground all), n_patients, n_undefined (the other cases), n_undefined_draws (draws of patients that the
            figure could not be computed of): bootstrap of the pooled overlap figures and of the means over cases.
        confusion: voxels of all cases, int64 (classes, classes).
        reliability: float64 (structures, bins, 3) of all cases with probabilities, see `uncertainty.reliability_table`.
    """

    by_slice: pd.DataFrame
    by_case: pd.DataFrame
    by_class: pd.DataFrame
    intervals: pd.DataFrame
    confusion: np.ndarray
    reliability: np.ndarray


def prediction_work(
    load_network: Callable[[], Any],
    weights: str,
    network: str,
    model_input: ModelInput,
    series: SeriesStore,
    settings: Mapping[str, Any],
    side: str = "test",
) -> dict[str, Work]:
    """Plan the segmentation of every series with slices of a side; each is made only if something has changed.

    Args:
        load_network: returns the net, see `Segmenter`; called when the first series needs it.
        weights: digest of its weights.
        network: digest of what it does with them.
        model_input: what it was trained on.
        series: ingested series, with the references that the probabilities are weighed against.
        settings: SETTINGS, of which PREDICTION matters here.
        side: one of `model_input.SIDES`.
    """
    segmenter_settings = model_input.segmenter_settings(settings)
    code = _prediction_code()
    predict = partial(_predict, _OneSegmenter(load_network, segmenter_settings), series, weights)

    def key(name: str) -> str:
        return value_digest([code, series.record(name)["key"], weights, network, segmenter_settings])

    names = sorted(_slices_of_side(model_input.manifest, side))
    _check_ingested(model_input.manifest, names, series)
    return {name: Work(key(name), partial(predict, name)) for name in names}


class _OneSegmenter:
    """The Segmenter of all series, made when the first needs it. To a worker goes the net's graph with each series."""

    def __init__(self, load_network: Callable[[], Any], settings: Mapping[str, Any]):
        self._load_network, self._settings = load_network, settings
        self._made: Segmenter | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Segmenter:
        with self._lock:
            if self._made is None:
                self._made = Segmenter(self._load_network(), self._settings)
        return self._made

    def __reduce__(self) -> tuple:
        if not isinstance(network := self().model, OnnxNetwork):
            raise pickle.PicklingError("ONNX Runtime does not compute this net")
        return Segmenter, (network, self._settings)


def _predict(segmenter: _OneSegmenter | Segmenter, series: SeriesStore, weights: str, name: str) -> dict[str, Any]:
    if isinstance(segmenter, _OneSegmenter):
        segmenter = segmenter()
    image, reference = series.volume(name, "image.mha"), series.label_map(name, "labels.mha").array
    column, row, _ = image.spacing_mm
    labels, overlaps, entropies, reliabilities, start = [], [], [], [], 0
    for batch in segmenter.batches(image.array, (row, column)):
        truth = reference[start : start + len(batch)]
        labels.append(batch.argmax(axis=-1).astype(np.uint8))
        overlaps.append(metrics.soft_overlap(truth, batch))
        entropies.append(uncertainty.entropy_sums(labels[-1], batch))
        reliabilities.append(uncertainty.reliability_counts(truth, batch))
        start += len(batch)
    record = series.record(name)
    stored = Orientation.from_dict(record["orientation"]).restore(np.concatenate(labels))
    return {
        LABELS: LabelMap(stored, **record["geometry"]),
        SOFT_OVERLAP: np.concatenate(overlaps),
        ENTROPY: np.concatenate(entropies),
        RELIABILITY: np.concatenate(reliabilities),
        RECORD: {"model": weights},
    }


def _prediction_code() -> str:
    """Digest of the modules that predictions, and what is stored beside them, depend on."""
    modules = (
        inference, onnx_network, model_input, augmentation, resampling, intensity, imaging, metrics, uncertainty,
    )  # fmt: skip
    # `networks` makes the graph, and would import Keras.
    return code_digest([*(module.__file__ for module in modules), Path(__file__).with_name("networks.py")])


def predicted_cases(
    manifest: Mapping[str, Any],
    series: SeriesStore,
    predictions: SeriesStore,
    entry: Callable[[str], str] = str,
    side: str = "test",
) -> dict[str, Callable[[], Case]]:
    """The cases of one side of a model input, to be read one at a time; that side's slices are what counts of them.

    Args:
        manifest: of the model input; its sides name series and slices.
        series, predictions: references and predictions.
        entry: series -> its entry's name in `predictions`.
        side: one of `model_input.SIDES`.
    """
    slices = _slices_of_side(manifest, side)
    _check_ingested(manifest, slices, series)
    return {
        name: partial(read_case, series, predictions, name, entry(name), tested)
        for name, tested in sorted(slices.items())
    }


def _check_ingested(manifest: Mapping[str, Any], names: Iterable[str], series: SeriesStore) -> None:
    # A manifest of an earlier version does not say.
    keys = manifest.get(INGESTED, {})
    check_ingested({name: keys[name] for name in names if name in keys}, series, "the model input")


def _slices_of_side(manifest: Mapping[str, Any], side: str) -> dict[str, list[int]]:
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; expected one of {', '.join(SIDES)}")
    return manifest["sides"][side]


def read_case(
    series: SeriesStore, predictions: SeriesStore, name: str, entry: str | None = None, tested: Iterable[int] = ()
) -> Case:
    """One case of the two stores; without `tested`, all its slices count."""
    entry = entry or name
    record = series.record(name)
    reference = series.label_map(name, "labels.mha")
    orientation = Orientation.from_dict(record["orientation"])
    column, row, slice_spacing = reference.spacing_mm
    # Masks of other tools come without.
    of_probabilities = (
        predictions.array(entry, file) if predictions.path(entry, file).is_file() else None
        for file in (SOFT_OVERLAP, ENTROPY, RELIABILITY)
    )
    return Case(
        name,
        record["patient"],
        reference.array,
        orientation.apply(predictions.label_map(entry, LABELS).array),
        (slice_spacing, row, column),
        np.array(sorted(tested) or range(len(reference.array))),
        *of_probabilities,
    )


def evaluate_cases(
    cases: Mapping[str, Callable[[], Case]],
    settings: Mapping[str, Any],
    ceiling: np.ndarray | None = None,
    workers: Workers | None = None,
) -> Evaluation:
    """Score cases, each worker one at a time; memory does not grow with their number, but for a few rows a slice.

    Args:
        cases: name -> what reads the case; at least one.
        settings: SETTINGS.
        ceiling: confusion matrix of the references against themselves, resampled to the net's size and back.
        workers: who scores; None for this process alone. The sums are taken in the order of the cases in any case, so
            that the figures are the same to the last bit.
    Raises:
        parallel.WorkFailed: a case could not be read or scored.
    """
    check_names(settings, SETTINGS, "evaluation")
    nothing = metrics.Pooled.of_nothing(settings["metrics"]["nsd_tolerances_mm"])
    scored, patients, pooled, entropies, failures = {}, {}, nothing, {}, {}
    reliability = np.zeros((len(FOREGROUND), uncertainty.BINS, 3))
    outcomes = (workers or Workers(workers=1)).run(partial(_score, settings), cases, "score", ordered=True)
    for outcome in track(outcomes, "score", "cases"):
        if outcome.failure:
            failures[outcome.name] = outcome.failure
            continue
        case = outcome.result
        pooled += case.scores.pooled
        # Only the rows are kept: the histograms of all cases would be what grows most.
        scored[case.series] = (case.patient, replace(case.scores, pooled=nothing))
        patients[case.patient] = patients.get(case.patient, 0) + case.scores.pooled.confusion
        if case.entropy is not None:
            entropies[case.series] = case.entropy
        if case.reliability is not None:
            reliability += case.reliability
    raise_failures(failures, len(cases), "score", "cases")
    by_slice, by_case = metrics.table_by_slice(scored), metrics.table_by_case(scored)
    of = zip(by_case["series"], by_case["class"], strict=True)
    by_case["entropy"] = [entropies.get(series, {}).get(name, np.nan) for series, name in of]
    by_class = metrics.table_by_class(by_slice, by_case, pooled, ceiling)
    intervals = _intervals(by_case, patients, settings)
    return Evaluation(by_slice, by_case, by_class, intervals, pooled.confusion, reliability)


@dataclass(frozen=True)
class _Scored:
    """What is kept of a case: `metrics.score_case`, `uncertainty.mean_entropy` and the sum of its reliability."""

    series: str
    patient: str
    scores: metrics.CaseScores
    entropy: dict[str, float] | None
    reliability: np.ndarray | None


def _score(settings: Mapping[str, Any], name: str, read: Callable[[], Case]) -> _Scored:
    case = read()
    scores = metrics.score_case(
        case.reference,
        case.prediction,
        case.spacing_mm,
        settings["metrics"],
        tested=case.tested,
        soft=case.soft_overlap,
    )
    return _Scored(
        case.series,
        case.patient,
        scores,
        None if case.entropy is None else uncertainty.mean_entropy(case.entropy[case.tested]),
        None if case.reliability is None else case.reliability[case.tested].sum(axis=0),
    )


def _intervals(by_case: pd.DataFrame, patients: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> pd.DataFrame:
    options = settings["intervals"]
    check_names(options, ("samples", "seed"), "evaluation.intervals")
    columns = [*metrics.figure_columns(settings["metrics"]["nsd_tolerances_mm"]), "detection_rate"]
    of_cases = statistics.patient_bootstrap(by_case, columns, by=["class"], **options)
    pooled = statistics.pooled_bootstrap(patients, metrics.SCORES, **options)
    there = (by_case["missing"] != "both").groupby(by_case["class"]).sum()
    counts = pooled["class"].map(there).fillna(by_case["series"].nunique()).astype(int)  # (the mean has no rows)
    tables = [
        pooled.assign(scope="pooled", n_cases=counts, n_undefined=by_case["series"].nunique() - counts),
        of_cases.rename(columns={"mean": "value"}).assign(scope="case mean", n_undefined_draws=0),
    ]
    columns = ["scope", "class", "metric", "value", "low", "high", "n_cases", "n_patients", "n_undefined"]
    return pd.concat(tables, ignore_index=True)[[*columns, "n_undefined_draws"]]
