"""Figures for people: overlays and the confusion matrix, in the project's one palette."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lumbarflow.labels import CLASSES, FOREGROUND, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Overlay:
    """One slice to show: grey image and two label slices, (rows, columns) each, with the (row, column) pixel size."""

    title: str
    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    pixel_spacing_mm: tuple[float, float]


def colour_labels(labels: np.ndarray, opacity: float = 0.45) -> np.ndarray:
    """uint8 classes (rows, columns) -> float RGBA (rows, columns, 4); background is clear."""
    from matplotlib.colors import to_rgba

    table = np.array([to_rgba(PALETTE[name], opacity) for name in CLASSES])
    table[0] = 0
    return table[labels]


def overlay_figure(overlays: Sequence[Overlay]) -> Figure:
    """One row per overlay: the image, the reference on it, the prediction on it, and where the two differ."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 3.4 * len(overlays)), layout="constrained")
    axes = figure.subplots(len(overlays), 4, squeeze=False)
    for row, overlay in zip(axes, overlays, strict=True):
        low, high = np.percentile(overlay.image, (1, 99))
        aspect = overlay.pixel_spacing_mm[0] / overlay.pixel_spacing_mm[1]
        errors = np.where(overlay.prediction != overlay.reference, overlay.prediction, 0)
        missed = (overlay.prediction == 0) & (overlay.reference != 0)
        layers = {
            "image": None,
            "reference": colour_labels(overlay.reference),
            "prediction": colour_labels(overlay.prediction),
            "differs (white: missed)": colour_labels(errors, 0.9) + missed[..., None] * np.array([1, 1, 1, 0.9]),
        }
        for axis, (name, layer) in zip(row, layers.items(), strict=True):
            axis.imshow(overlay.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
            if layer is not None:
                axis.imshow(layer, aspect=aspect, interpolation="nearest")
            # The case's own title stands above the first picture, on a line of its own.
            axis.set_title(f"{overlay.title}\n{name}" if axis is row[0] else name, fontsize=9, loc="left")
            axis.set_axis_off()
    handles = [Patch(color=PALETTE[CLASSES[index]], label=CLASSES[index]) for index in FOREGROUND]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def confusion_figure(confusion: np.ndarray) -> Figure:
    """The confusion matrix in shares of the reference class, with voxel counts."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    axis.set_xticks(range(len(CLASSES)), CLASSES)
    axis.set_yticks(range(len(CLASSES)), CLASSES)
    axis.set_xlabel("prediction")
    axis.set_ylabel("reference")
    for (row, column), share in np.ndenumerate(shares):
        axis.text(
            column, row, f"{share:.3f}\n{confusion[row, column]:,}",
            ha="center", va="center", fontsize=8, color="black" if share > 0.5 else "white",
        )  # fmt: skip
    figure.colorbar(picture, label="share of the reference class")
    return figure
