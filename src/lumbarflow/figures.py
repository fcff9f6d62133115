"""Figures for people: overlays, curves and distributions, in the project's one palette.

Every curve and class has a marker or a place of its own as well, so that nothing is told by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lumbarflow.labels import CLASSES, FOREGROUND, MISSED, PALETTE
from lumbarflow.uncertainty import calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lumbarflow.imaging import LabelMap, Volume
    from lumbarflow.measurements import Measurement

MARKERS = {"vertebrae": "o", "canal": "^", "IVD": "s"}
# Greys, since the palette's colours are the classes'.
SIDE_GREYS = {"train": "0.85", "validation": "0.5", "test": "0.0"}
FIGURE_LABELS = {
    "dice": "Dice",
    "asd_mm": "average surface distance (mm)",
    "hd95_mm": "95th percentile Hausdorff distance (mm)",
}


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
    from matplotlib.colors import to_rgba
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
            "differs (green: missed)": colour_labels(errors, 0.9) + missed[..., None] * np.array(to_rgba(MISSED, 0.9)),
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


def training_curves(history: pd.DataFrame) -> Figure:
    """Losses, validation mean IoU with its best epoch, and learning rate over the epochs.

    Args:
        history: one row per epoch with epoch, loss, val_loss, val_mean_iou, learning_rate (see `training.fit`).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, score, rate = figure.subplots(1, 3, sharex=True)
    epochs = history["epoch"]
    training = {"color": PALETTE["background"], "marker": ".", "linestyle": "-"}
    validation = {"color": SIDE_GREYS["validation"], "marker": "x", "linestyle": "--"}
    losses.plot(epochs, history["loss"], label="training", **training)
    losses.plot(epochs, history["val_loss"], label="validation", **validation)
    losses.set_ylabel("loss")
    score.plot(epochs, history["val_mean_iou"], label="validation", **validation)
    score.set_ylabel("mean IoU")
    # As training chooses it: the first epoch of the highest value.
    best = history.loc[history["val_mean_iou"].idxmax()]
    score.plot(
        [best["epoch"]], [best["val_mean_iou"]], color="white", marker="*", markersize=14, linestyle="",
        markeredgecolor=PALETTE["background"], label=f"best: epoch {int(best['epoch'])}, {best['val_mean_iou']:.3f}",
    )  # fmt: skip
    rate.plot(epochs, history["learning_rate"], **training)
    rate.set_ylabel("learning rate")
    for axis in (losses, score, rate):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    losses.legend(frameon=False)
    score.legend(frameon=False)
    return figure


def case_distribution(by_case: pd.DataFrame, metrics: Sequence[str] = ("dice", "asd_mm", "hd95_mm")) -> Figure:
    """One panel per metric: a box per foreground class with a dot for every case, and how many there are.

    Args:
        by_case: one row per series and class with `class` and the metrics (see `metrics.table_by_case`). A case whose
            metric is not finite has no dot and is counted as undefined in the label.
    Raises:
        ValueError: no metric is asked for, or by_case lacks one.
    """
    from matplotlib.figure import Figure

    lacking = [metric for metric in metrics if metric not in by_case]
    if lacking or not metrics:
        raise ValueError(
            f"metrics to draw that the cases do not have: {lacking or 'none named'}; expected some of "
            f"{[name for name in by_case.select_dtypes('number')]}. Name those that the evaluation wrote."
        )
    figure = Figure(figsize=(4.2 * len(metrics), 4.2), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        labels = []
        for place, index in enumerate(FOREGROUND):
            name = CLASSES[index]
            values = by_case.loc[by_case["class"] == name, metric].to_numpy(float)
            defined = values[np.isfinite(values)]
            labels.append(f"{name}\nn = {len(defined)}\nundefined: {len(values) - len(defined)}")
            if len(defined):
                _box_with_dots(axis, place, defined, name)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.set_ylabel(FIGURE_LABELS.get(metric, metric))
        axis.grid(axis="y", alpha=0.3)
    return figure


def _box_with_dots(axis: Axes, place: int, values: np.ndarray, name: str) -> None:
    axis.boxplot(
        values, positions=[place], widths=0.6, manage_ticks=False, showfliers=False,  # every case has its dot anyway
        medianprops={"color": PALETTE["background"], "linewidth": 2},
    )  # fmt: skip
    # Steps of the golden ratio spread neighbours in rank far apart, the same in every drawing.
    ranks = np.argsort(np.argsort(values))
    spread = (ranks * 0.618034 % 1 - 0.5) * 0.4
    axis.plot(
        place + spread, values, color=PALETTE[name], marker=MARKERS[name], linestyle="", markersize=5,
        markeredgecolor=PALETTE["background"], markeredgewidth=0.5, label=name,
    )  # fmt: skip


def comparison_figure(table: pd.DataFrame) -> Figure:
    """Dice of each foreground class: one row per source, with the 95 % interval or one standard deviation either way.

    Args:
        table: see `report.comparison_table`; rows with a `mark` (another protocol) have hollow markers.
    Raises:
        ValueError: the table has no Dice of a foreground class.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [CLASSES[index] for index in FOREGROUND]
    table = table[table["class"].isin(names) & table["dice"].notna()]
    if table.empty:
        raise ValueError(
            f"the comparison table has no Dice of {names}; expected a row for one at least. Run evaluate first."
        )
    rows = [
        f"{row.mark} {row.source}\n{'; '.join(filter(None, (row.data, row.unit)))}".strip()
        for row in table.itertuples()
    ]
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    figure = Figure(figsize=(12, 1.2 + 0.48 * len(places)), layout="constrained")
    axes = figure.subplots(1, len(names), sharex=True, sharey=True)
    table = table.assign(place=[places[row] for row in rows])
    for axis, name in zip(axes, names, strict=True):
        for row in table[table["class"] == name].itertuples():
            if np.isfinite(row.dice_low) and np.isfinite(row.dice_high):
                axis.plot([row.dice_low, row.dice_high], [row.place] * 2, color=PALETTE["background"], linestyle="-")
            elif np.isfinite(row.dice_sd):
                ends = [row.dice - row.dice_sd, row.dice + row.dice_sd]
                axis.plot(ends, [row.place] * 2, color=PALETTE["background"], linestyle=":")
            axis.plot(
                [row.dice], [row.place], color=PALETTE[name], marker=MARKERS[name], markersize=8, linestyle="",
                markerfacecolor="white" if row.mark else PALETTE[name],
                markeredgecolor=PALETTE[name] if row.mark else PALETTE["background"], markeredgewidth=1.5,
            )  # fmt: skip
        axis.set_title(name)
        axis.set_xlabel("Dice")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=7)
    axes[0].set_ylim(len(places) - 0.5, -0.5)
    black = PALETTE["background"]
    handles = [
        Line2D([], [], color=black, linestyle="-", label="95 % interval"),
        Line2D([], [], color=black, linestyle=":", label="one standard deviation"),
        Line2D([], [], color=black, marker="o", markerfacecolor="white", linestyle="", label="another protocol"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


# How the chords of a quantity are drawn: told by the kind of line, not by a colour.
_CHORDS = {"height": "-", "depth": "--", "canal_ap": ":"}


def measurement_figure(image: Volume, instances: LabelMap, measurements: Sequence[Measurement]) -> Figure:
    """The mid-sagittal slice with the outlines of all instances, every chord in it, and their values in mm beside it.

    Chords are projected into the slice shown, which is the one nearest to most of them.

    Args:
        image, instances: sagittal, same grid.
        measurements: see `measurements.measure`.
    Raises:
        ValueError: the two grids differ in size.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    from lumbarflow.measurements import class_name

    if image.size != instances.size:
        raise ValueError(f"an image of {image.size} voxels and labels of {instances.size}; expected one grid for both")
    drawn = [found for found in measurements if np.isfinite(found.value)]
    places = [instances.index_point(end)[2] for found in drawn if found.unit == "mm" for end in found.ends_mm]
    # With nothing measured, where most of the labels are.
    middle = np.median(places) if places else np.argmax(np.count_nonzero(instances.array, axis=(1, 2)))
    shown = int(np.clip(np.rint(middle), 0, instances.array.shape[0] - 1))
    plane, labels = image.array[shown], instances.array[shown]

    figure = Figure(figsize=(9.5, 10))
    axis = figure.subplots(gridspec_kw={"left": 0.26, "right": 0.94, "bottom": 0.05, "top": 0.93})
    low, high = np.percentile(plane, (1, 99))
    aspect = image.spacing_mm[1] / image.spacing_mm[0]
    axis.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
    for label in np.unique(labels[labels > 0]):
        # Padded, so that an outline closes at the picture's edge.
        mask = np.pad(labels == label, 1).astype(float)
        rows, columns = (np.arange(-1, size + 1) for size in labels.shape)
        axis.contour(columns, rows, mask, levels=[0.5], colors=PALETTE[class_name(int(label))], linewidths=1.2)

    edge = [withStroke(linewidth=2.4, foreground="black")]
    beside = axis.get_yaxis_transform()
    values: dict[tuple[str, int], dict[str, Measurement]] = {}
    for found in drawn:
        if found.unit == "mm":
            values.setdefault((found.structure, found.number), {})[found.quantity.removeprefix("body_")] = found
        kind = next((line for name, line in _CHORDS.items() if name in found.quantity), "-.")
        for line in [found.ends_mm] if found.unit == "mm" else found.ends_mm:
            column, row, _ = np.transpose([instances.index_point(end) for end in line])
            axis.plot(column, row, color="white", linewidth=1, linestyle=kind, path_effects=edge)
    for (structure, number), own in values.items():
        heights = [f"{own[name].value:.1f}" for name in own if name.startswith("height")]
        _, row, _ = instances.index_point(np.mean(own["depth"].ends_mm, axis=0))
        text = f"{structure} {number}:  {'  '.join(heights)}  |  {own['depth'].value:.1f}"
        axis.text(-0.02, row, text, transform=beside, ha="right", va="center", fontsize=8)
        if "canal_ap" in own:
            axis.text(1.02, row, f"{own['canal_ap'].value:.1f}", transform=beside, va="center", fontsize=8)
    title = [f"lordosis {found.value:.1f}°: {found.note}" for found in drawn if found.quantity == "lordosis"]
    title.append("left: heights (anterior, middle, posterior) | depth; right: canal; all in mm")
    if lacking := len(measurements) - len(drawn):
        title.append(f"not measured: {lacking}")
    axis.set_title("\n".join(title), fontsize=8, loc="left")
    axis.set_xlim(-0.5, labels.shape[1] - 0.5)
    axis.set_ylim(labels.shape[0] - 0.5, -0.5)
    axis.set_axis_off()
    handles = [Patch(color=PALETTE[CLASSES[index]], label=CLASSES[index]) for index in FOREGROUND]
    kinds = _CHORDS | {"endplates of the lordosis": "-."}
    handles += [Line2D([], [], color="black", linestyle=line, label=name) for name, line in kinds.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    file = io.BytesIO()
    # By default, the file names Matplotlib's version.
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def preview_figure(image: Volume, classes: LabelMap) -> Figure:
    """Three sagittal slices of a scan with its masks on them: at a quarter, half and three quarters of what was found.

    Args:
        image, classes: sagittal, on one grid; where nothing was found the quarters are those of the whole scan.
    """
    found = np.flatnonzero(classes.array.any(axis=(1, 2)))
    first, last = (found[0], found[-1]) if len(found) else (0, len(classes.array) - 1)
    return slices_figure(image, classes, [int(first + share * (last - first)) for share in (0.25, 0.5, 0.75)])


def slices_figure(
    image: Volume, classes: LabelMap, slices: Sequence[int], notes: Sequence[str] | None = None
) -> Figure:
    """Sagittal slices of a scan, side by side and equally bright, with their classes on them.

    Args:
        image, classes: sagittal, on one grid.
        slices: their indices.
        notes: what to say of each, beside its number.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = list(slices)
    notes = [""] * len(shown) if notes is None else notes
    column, row, _ = image.spacing_mm
    low, high = np.percentile(image.array[shown], (1, 99))
    figure = Figure(figsize=(4 * len(shown), 5.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, slice_, note in zip(panels, shown, notes, strict=True):
        axis.imshow(image.array[slice_], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=row / column)
        axis.imshow(colour_labels(classes.array[slice_]), aspect=row / column, interpolation="nearest")
        title = f"sagittal slice {slice_ + 1} of {len(classes.array)}"
        axis.set_title(f"{title}\n{note}" if note else title, fontsize=9, loc="left")
        axis.set_axis_off()
    handles = [Patch(color=PALETTE[CLASSES[index]], label=CLASSES[index]) for index in FOREGROUND]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def split_figure(splits: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel per split: a row per patient, in it a cell per slice, series after series, in the grey of its side.

    Args:
        splits: title -> patient, series, slice, side (see `split.split_slices`). A slice on two sides is shown on the
            later one of `SIDE_GREYS`.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sides = list(SIDE_GREYS)
    figure = Figure(figsize=(5.6 * len(splits), 4), layout="constrained")
    for axis, (title, split) in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits.items(), strict=True):
        side = split["side"].map(sides.index).groupby([split[name] for name in ("patient", "series", "slice")]).max()
        patients = [values.to_numpy() for _, values in side.groupby(level="patient")]
        cells = np.full((len(patients), max(map(len, patients))), np.nan)
        for row, values in zip(cells, patients, strict=True):
            row[: len(values)] = values
        axis.imshow(
            np.ma.masked_invalid(cells), cmap=ListedColormap(list(SIDE_GREYS.values())), vmin=0, vmax=len(sides) - 1,
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("slices, series after series")
        axis.set_ylabel("patients")
        axis.set_yticks([])
        axis.set_yticks(np.arange(len(patients) - 1) + 0.5, minor=True)
        axis.grid(axis="y", which="minor", color="white")
        axis.tick_params(which="minor", length=0)
    handles = [Patch(facecolor=grey, edgecolor="black", label=side) for side, grey in SIDE_GREYS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def reliability_figure(reliability: pd.DataFrame) -> Figure:
    """One panel per structure: how often the net was right, over the probability that it gave; pixels per bin below.

    On the dashed line probabilities can be believed; below it the net is too sure of the structure, above not enough.

    Args:
        reliability: see `uncertainty.reliability_table`; empty bins have no point.
    """
    from matplotlib.figure import Figure

    errors = calibration_error(reliability)
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, len(FOREGROUND), sharex=True, sharey="row", height_ratios=(3, 1))
    for (curve, pixels), (name, error) in zip(panels.T, errors.items(), strict=True):
        bins = reliability[(reliability["class"] == name) & (reliability["count"] > 0)]
        curve.plot([0, 1], [0, 1], color=PALETTE["background"], linestyle="--", linewidth=1)
        curve.set_title(f"{name}: {f'calibration error {error:.3f}' if len(bins) else 'no probabilities'}")
        # Counts span decades; half a pixel is the bottom, so that a single one can be seen.
        pixels.set_yscale("log")
        pixels.set_ylim(0.5, max(10, 2 * reliability["count"].max()))
        if len(bins):
            curve.plot(
                bins["confidence"], bins["frequency"], color=PALETTE[name], marker=MARKERS[name], markersize=7,
                markeredgecolor=PALETTE["background"], markeredgewidth=0.5, label=name, clip_on=False,
            )  # fmt: skip
            pixels.bar(
                bins["low"], bins["count"], bins["high"] - bins["low"], align="edge", color=PALETTE[name],
                edgecolor=PALETTE["background"], linewidth=0.5,
            )  # fmt: skip
        pixels.set_xlabel("probability of the structure")
        for axis in (curve, pixels):
            axis.grid(alpha=0.3)
    panels[0, 0].set(ylabel="share of pixels that have it", xlim=(0, 1), ylim=(0, 1))
    panels[1, 0].set_ylabel("pixels")
    return figure
