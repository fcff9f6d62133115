"""How good the model is on patients it has not seen, on the native grid; and beside it, by the paper's own measures."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import evaluation, metrics, tracking, uncertainty
from lumbarflow.figures import Overlay, confusion_figure, overlay_figure, reliability_figure
from lumbarflow.files import value_digest
from lumbarflow.inference import Segmenter
from lumbarflow.labels import CLASSES
from lumbarflow.model_input import ModelInput
from lumbarflow.paper_protocol import paper_scores
from lumbarflow.parallel import Workers
from lumbarflow.parameters import check_names
from lumbarflow.progress import track
from lumbarflow.provenance import check_training
from lumbarflow.store import SeriesStore, Work
from lumbarflow.training_record import weights_digest

logger = logging.getLogger(__name__)


def predict_test(
    model: Any,
    training_record: dict[str, Any],
    model_input: ModelInput,
    series: SeriesStore,
    settings: dict[str, Any],
) -> dict[str, Work]:
    """Plan the segmentation of every series with test slices, in the storage order of its raw file."""
    from lumbarflow.networks import for_inference

    check_names(settings, evaluation.SETTINGS, "evaluation")
    weights = weights_digest(model)
    check_training(training_record, weights, model_input.manifest)
    model_input.check_complete("test")
    tracking.tag_manifest(model_input.manifest)
    network = value_digest(model.to_json())
    return evaluation.prediction_work(lambda: for_inference(model), weights, network, model_input, series, settings)


def score_cases(
    predictions: SeriesStore,
    series: SeriesStore,
    prepared: SeriesStore,
    model_input: ModelInput,
    settings: dict[str, Any],
    protocol: dict[str, Any],
    parallel: dict[str, Any],
) -> tuple[Any, ...]:
    """Compare predictions with references, over the test slices.

    Returns the figures by slice; by case, by class, their intervals and the reliability of the probabilities, each
    twice (for machines and for people); the confusion matrix; and a summary.
    """
    manifest = model_input.manifest
    test = manifest["sides"]["test"]
    ceiling = sum(np.array(prepared.record(name)["ceiling"])[slices].sum(axis=0) for name, slices in test.items())
    cases = evaluation.predicted_cases(manifest, series, predictions)
    evaluated = evaluation.evaluate_cases(cases, settings, ceiling, Workers.of(parallel))
    by_class = evaluated.by_class
    mean = metrics.mean_foreground_dice(evaluated.confusion)
    reliability = uncertainty.reliability_table(evaluated.reliability)
    errors = uncertainty.calibration_error(reliability)
    told = uncertainty.entropy_dice_correlation(evaluated.by_case)
    at_pooled = by_class[by_class["scope"] == "pooled"].set_index("class")
    summary = {
        "mean_foreground_dice": mean,
        "ceiling_mean_foreground_dice": metrics.mean_foreground_dice(ceiling),
        **{f"dice_{name}": float(at_pooled.loc[name, "dice"]) for name in CLASSES},
        **{f"calibration_error_{name}": error for name, error in errors.items()},
        **{f"entropy_dice_correlation_{name}": correlation for name, correlation in told.items()},
        "weights": predictions.record(next(iter(test)))["model"],
        "content_hash": manifest["content_hash"],
        "test_patients": len({manifest["series"][name]["patient"] for name in test}),
        "test_series": len(test),
        "test_slices": sum(map(len, test.values())),
    }
    tracking.log_metrics(summary)
    # What the report says of the figures, whenever it is written.
    summary |= {"settings": {"evaluation": settings, "paper_protocol": protocol}} | tracking.git_commit(".")
    for name in CLASSES[1:]:
        row = at_pooled.loc[name]
        logger.info(
            "%s: Dice %.3f, IoU %.3f, ASD %.2f mm, HD95 %.2f mm (pooled)",
            *(name, row.dice, row.iou, row.asd_mm, row.hd95_mm),
        )
        logger.info(
            "%s: expected calibration error %.3f; rank correlation of entropy with Dice over cases %.2f",
            *(name, errors[name], told[name]),
        )
    # (The mean of the classes is what the run's summary begins with.)
    logger.info(
        "test slices: the references themselves, resampled to the net's size and back, have a mean"
        " foreground Dice of %.4f",
        summary["ceiling_mean_foreground_dice"],
    )
    confusion = {"classes": list(CLASSES), "counts": evaluated.confusion.tolist()}
    tables = (evaluated.by_case, by_class, evaluated.intervals, reliability)
    return (evaluated.by_slice, *(table for table in tables for _ in range(2)), confusion, summary)


def score_paper_protocol(
    model: Any, model_input: ModelInput, evaluation_settings: dict[str, Any], settings: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same net, with the same test-time augmentation, by the paper's measures (twice: for machines and people)."""
    from lumbarflow.networks import for_inference

    slices = model_input.slices("test")
    segmenter = Segmenter(for_inference(model), model_input.segmenter_settings(evaluation_settings))

    def batches():
        starts = range(0, len(slices), segmenter.batch_size)
        for start in track(starts, "score by the paper's protocol", "batches"):
            batch = slices[start : start + segmenter.batch_size]
            images = np.stack([model_input.image(*where, segmenter.neighbours) for where in batch])
            net_input = images.astype(np.float32).reshape(len(batch), *model_input.size, -1)
            yield np.stack([model_input.label(*where) for where in batch]), segmenter.predict(net_input)

    table = paper_scores(batches(), settings)
    for row in table.itertuples():
        logger.info(
            "paper's protocol, %s: IoU %.4f, Dice %.4f, ASD %.4f pixels, NSD %.4f",
            *(row[1], row.iou, row.dice, row.asd_pixels, row.nsd),
        )
    return table, table


def draw_figures(
    predictions: SeriesStore,
    series: SeriesStore,
    by_case: pd.DataFrame,
    model_input: ModelInput,
    confusion: dict[str, Any],
    reliability: pd.DataFrame,
) -> tuple[Any, Any, Any]:
    """Overlays of the best, the median and the worst case, the confusion matrix, and how reliable probabilities are."""
    overlays, _ = choose_overlays(predictions, series, by_case, model_input)
    return overlay_figure(overlays), confusion_figure(np.array(confusion["counts"])), reliability_figure(reliability)


def choose_overlays(
    predictions: SeriesStore, series: SeriesStore, by_case: pd.DataFrame, model_input: ModelInput
) -> tuple[list[Overlay], pd.DataFrame]:
    """The slices to show of the best, the median and the worst case, and a table of them: case, series, slice, dice."""
    foreground = by_case[by_case["class"] != CLASSES[0]]
    means = foreground.groupby("series")["dice"].mean()
    # A case without any figure is neither best nor worst, unless there are no others.
    ranked = (means.dropna() if means.notna().any() else means).sort_values(ascending=False)
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    overlays, chosen = [], []
    for title, place in places.items():
        name = ranked.index[place]
        case = evaluation.read_case(series, predictions, name, tested=model_input.manifest["sides"]["test"][name])
        # The slice with the most foreground of those tested shows the case better than its middle one.
        shown = int(case.tested[np.argmax((case.reference[case.tested] > 0).sum(axis=(1, 2)))])
        dice = float(ranked.iloc[place])
        overlays.append(
            Overlay(
                f"{title}: {name}, slice {shown}, mean Dice {dice:.3f}",
                series.volume(name, "image.mha").array[shown],
                case.reference[shown],
                case.prediction[shown],
                case.spacing_mm[1:],
            )
        )
        chosen.append({"case": title, "series": name, "slice": shown, "dice": dice})
    return overlays, pd.DataFrame(chosen)
