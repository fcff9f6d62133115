"""How good the model is on patients it has not seen, on the native grid."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import imaging, inference, intensity, metrics, resampling, tracking
from lumbarflow.figures import Overlay, confusion_figure, overlay_figure
from lumbarflow.files import source_digest, value_digest
from lumbarflow.imaging import LabelMap, Orientation
from lumbarflow.inference import Segmenter, weights_digest
from lumbarflow.labels import CLASSES
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.provenance import check_training
from lumbarflow.store import SeriesStore, Work

logger = logging.getLogger(__name__)


def predict_test(
    model: Any,
    training_record: dict[str, Any],
    model_input: ModelInput,
    series: SeriesStore,
    split: pd.DataFrame,
    settings: dict[str, Any],
) -> dict[str, Work]:
    """Plan the segmentation of every series with test slices, in the storage order of its raw file."""
    check_names(settings, ("batch_size",), "evaluation")
    weights = weights_digest(model)
    check_training(training_record, weights, model_input.manifest)
    tracking.tag_manifest(model_input.manifest)
    segmenter_settings = model_input.segmenter_settings(settings["batch_size"])
    segmenter = Segmenter(model, segmenter_settings)
    code = source_digest(inference, resampling, intensity, imaging)

    def predict(name: str) -> dict[str, Any]:
        image = series.volume(name, "image.mha")
        column, row, _ = image.spacing_mm
        labels = segmenter.labels(image.array, (row, column))
        record = series.record(name)
        stored = Orientation.from_dict(record["orientation"]).restore(labels)
        return {"labels.mha": LabelMap(stored, **record["geometry"]), "record.json": {"model": weights}}

    names = sorted(split.loc[split["side"] == "test", "series"].unique())
    return {
        name: Work(
            value_digest([code, weights, segmenter_settings, series.record(name)["key"]]), partial(predict, name)
        )
        for name in names
    }


def score_cases(
    predictions: SeriesStore,
    series: SeriesStore,
    prepared: SeriesStore,
    model_input: ModelInput,
    split: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Compare predictions with references, over all test slices, none filtered out."""
    test = split[split["side"] == "test"]
    cases, ceiling = {}, np.zeros((len(CLASSES),) * 2, np.int64)
    for name, rows in test.groupby("series"):
        reference, predicted = _sagittal_pair(predictions, series, name)
        slices = np.sort(rows["slice"].to_numpy())
        cases[name] = (rows["patient"].iloc[0], metrics.confusion_matrix(reference[slices], predicted[slices]))
        ceiling += np.array(prepared.record(name)["ceiling"])
    pooled = sum(confusion for _, confusion in cases.values())
    by_case = metrics.table_by_case(cases)
    by_class = metrics.table_by_class(by_case, {"pooled": pooled, "ceiling": ceiling})
    mean = metrics.mean_foreground_dice(pooled)
    at_pooled = by_class[by_class["scope"] == "pooled"].set_index("class")
    summary = {
        "mean_foreground_dice": mean,
        "ceiling_mean_foreground_dice": metrics.mean_foreground_dice(ceiling),
        **{f"dice_{name}": float(at_pooled.loc[name, "dice"]) for name in CLASSES},
        "weights": predictions.record(next(iter(cases)))["model"],
        "content_hash": model_input.manifest["content_hash"],
        "test_patients": int(test["patient"].nunique()),
        "test_series": len(cases),
        "test_slices": len(test),
    }
    tracking.log_metrics(summary)
    for name in CLASSES[1:]:
        row = at_pooled.loc[name]
        logger.info("%s: Dice %.3f, IoU %.3f, precision %.3f, recall %.3f", name, row.dice, row.iou, row.precision,
                    row.recall)  # fmt: skip
    logger.info(
        "mean foreground Dice %.4f over %d slices of %d test patients (pooled, native grid); "
        "the reference itself, resampled to the input size and back, has %.4f",
        mean, len(test), summary["test_patients"], summary["ceiling_mean_foreground_dice"],
    )  # fmt: skip
    return by_case, by_case, by_class, by_class, {"classes": list(CLASSES), "counts": pooled.tolist()}, summary


def draw_figures(
    predictions: SeriesStore, series: SeriesStore, by_case: pd.DataFrame, split: pd.DataFrame, confusion: dict[str, Any]
) -> tuple[Any, Any]:
    """Overlays of the best, the median and the worst case, and the confusion matrix."""
    foreground = by_case[by_case["class"] != CLASSES[0]]
    ranked = foreground.groupby("series")["dice"].mean().dropna().sort_values(ascending=False)
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    test = split[split["side"] == "test"]
    overlays = []
    for title, place in places.items():
        name = ranked.index[place]
        reference, predicted = _sagittal_pair(predictions, series, name)
        # The slice with the most foreground of those tested shows the case better than its middle one.
        tested = np.sort(test.loc[test["series"] == name, "slice"].to_numpy())
        shown = tested[np.argmax((reference[tested] > 0).sum(axis=(1, 2)))]
        image = series.volume(name, "image.mha")
        column, row, _ = image.spacing_mm
        overlays.append(
            Overlay(
                f"{title}: {name}, slice {shown}, mean Dice {ranked.iloc[place]:.3f}",
                image.array[shown],
                reference[shown],
                predicted[shown],
                (row, column),
            )  # fmt: skip
        )
    return overlay_figure(overlays), confusion_figure(np.array(confusion["counts"]))


def _sagittal_pair(predictions: SeriesStore, series: SeriesStore, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction of one series, uint8 (slice, row, column) at native resolution."""
    reference = series.label_map(name, "labels.mha").array
    orientation = Orientation.from_dict(series.record(name)["orientation"])
    return reference, orientation.apply(predictions.label_map(name, "labels.mha").array)
