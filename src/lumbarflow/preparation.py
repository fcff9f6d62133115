"""From an ingested series to the arrays that the net is fed, and from the cohort's tables to the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow.files import array_digest, value_digest
from lumbarflow.imaging import LabelMap, Volume
from lumbarflow.intensity import normalisation_of
from lumbarflow.labels import CLASSES, LabelTable, class_counts
from lumbarflow.metrics import confusion_matrix
from lumbarflow.model_input import FORMAT_VERSION, IMAGES, INGESTED, LABELS, SIDES
from lumbarflow.resampling import InPlaneGrid

# The section `preprocess` of the parameters.
SETTINGS = ("size", "keep_aspect", "normalisation", "percentiles")


def prepare_series(image: Volume, labels: LabelMap, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Normalise one series and resample its slices to the net's size.

    Args:
        image, labels: sagittal (slice, row, column), the labels uint8 classes.
        settings: SETTINGS; `size` is [rows, columns].
    Returns:
        Files for a SeriesStore: `images.npy` float16 and `labels.npy` uint8, both (n, H, W), and `record.json` with
        n_slices, digest (of both arrays), pixel_spacing_mm, class_counts (of labels.npy) and `ceiling`, for each slice
        the confusion matrix of the reference against itself sent to the net's size and back: what a net that knew every
        pixel's class shares would score.
    """
    column, row, _ = image.spacing_mm
    grid = InPlaneGrid(image.array.shape[1:], (row, column), tuple(settings["size"]), settings["keep_aspect"])
    normalisation = normalisation_of(image.array, settings["normalisation"], tuple(settings["percentiles"]))
    # Slice by slice: the float copies of a whole series would be the largest arrays of this step.
    images = np.concatenate(
        [
            normalisation.finish(grid.to_model(normalisation.apply(plane[None]), normalisation.outside)).astype(
                np.float16
            )
            for plane in image.array
        ]
    )
    resampled = grid.labels_to_model(labels.array)
    record = {
        "n_slices": len(images),
        "digest": array_digest(images, resampled),
        "pixel_spacing_mm": list(grid.model_spacing_mm),
        "normalisation": normalisation.to_dict(),
        "class_counts": class_counts(resampled).tolist(),
        "ceiling": [
            confusion_matrix(plane, back).tolist()
            for plane, back in zip(labels.array, grid.labels_there_and_back(labels.array), strict=True)
        ],
    }
    return {IMAGES: images, LABELS: resampled, "record.json": record}


def label_settings(labels: Mapping[str, Any]) -> dict[str, Any]:
    """The section `labels` of the parameters, its table written out."""
    return {"method": labels["method"], "table": LabelTable(labels["table"]).to_dict()}


def labels_digest(labels: Mapping[str, Any]) -> str:
    """Digest of what the labels mean: of the section `labels` of the parameters, or of `label_settings` of it."""
    return value_digest(label_settings(labels))


def data_hash(series_index: pd.DataFrame, labels: Mapping[str, Any]) -> str:
    """Digest of the accepted scans and the meaning of their labels, not of the preprocessing: two models that look at
    the same patients through different input sizes can be compared.

    Args:
        series_index: `series`, `image_digest`, `mask_digest`.
        labels: see `label_settings`.
    """
    digests = {row.series: [row.image_digest, row.mask_digest] for row in series_index.itertuples()}
    return value_digest({"labels": labels, "series": digests})


def split_hash(slice_index: pd.DataFrame) -> str:
    """Digest of who stands where: figures of two models are of the same test slices only if this is equal.

    Filtered training slices stay in, as they don't change who is tested; test slices that are not scored don't.

    Args:
        slice_index: see `selection.index_slices`.
    """
    rows = slice_index[(slice_index["side"] != "test") | slice_index["kept"]]
    return value_digest(sorted([row.series, int(row.slice), row.side] for row in rows.itertuples()))


def build_manifest(
    series_index: pd.DataFrame,
    slice_index: pd.DataFrame,
    records: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a model input folder (see `lumbarflow.model_input`).

    Args:
        series_index: accepted series with `series`, `patient`, `sequence`, `synthetic`, `image_digest`, `mask_digest`,
            `key` (of the ingested series).
        slice_index: see `selection.index_slices`.
        records: series -> record of `prepare_series`.
        settings: `preprocess`, `split`, `filter`, `labels` as they were used.
    """
    kept = slice_index[slice_index["kept"]]
    sides = {
        side: {
            series: sorted(int(i) for i in group["slice"])
            for series, group in kept[kept["side"] == side].groupby("series")
        }
        for side in SIDES
    }
    synthetic = series_index["synthetic"].astype(bool)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "size": list(settings["preprocess"]["size"]),
        "classes": {str(i): name for i, name in enumerate(CLASSES)},
        "data_kind": "synthetic" if synthetic.all() else "mixed" if synthetic.any() else "real",
        "leaky": settings["split"]["method"] == "slice",
        "split_method": settings["split"]["method"],
        "data_hash": data_hash(series_index, settings["labels"]),
        "split_hash": split_hash(slice_index),
        "settings": dict(settings),
        "series": {
            row.series: {"patient": row.patient, "sequence": row.sequence, **_facts(records[row.series])}
            for row in series_index.itertuples()
        },
        "sides": sides,
    }
    # Not of the content: other code may ingest the same voxels under another key.
    ingested = {row.series: row.key for row in series_index.itertuples()}
    return manifest | {"content_hash": value_digest(manifest), INGESTED: ingested}


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("n_slices", "pixel_spacing_mm", "class_counts", "digest")}
