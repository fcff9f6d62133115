"""How well a prediction agrees with its reference: per class, for each slice, each case and all cases pooled.

A case is a series: the volume of its classes on its native grid. Where a slice or a case lacks a structure, one
convention holds, at `CONVENTION` for every figure in this project:

| the structure is missing in | reference | prediction | both |
|---|---|---|---|
| dice, iou, precision, recall, f1, nsd | 0 | 0 | NaN |
| soft_dice | 0 | its formula | NaN |
| asd_mm, hd95_mm: no distance exists | NaN | NaN | NaN |
| volume_error_ml, predicted - reference | its formula | its formula | NaN |
| relative_volume_error, the same / reference | NaN | -1 | NaN |
| detection_rate, detected / reference components | NaN | 0 | NaN |

NaN also stands where something cannot be measured:

- background: everything but the overlap figures and soft Dice;
- soft_dice without probabilities (masks from elsewhere);
- surfaces, volumes and components of a case of which only some slices were tested (its column `whole` is False): the
  volume has gaps. Its overlap figures are over the tested slices;
- detection of the canal, which is one piece.

A mean is over the slices or cases with a figure, and their number stands beside it; `missing` and the counts
n_missing_* tell where the others went.

"pooled" sums over all cases before it divides: voxels, probabilities, surface areas, volumes, components. Where one
side of a case is empty, the pooled NSD counts the surface of the other as too far away, and the pooled ASD and HD95
leave the case out, as it has no distance. HD95 is read from a histogram (`HISTOGRAM_MM`), the others are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from lumbarflow.labels import CLASS_COUNT, CLASSES, FOREGROUND
from lumbarflow.parameters import check_names
from lumbarflow.surfaces import SurfaceDistances, bounding_box, surface_distances, weighted_percentile

SCORES = ("dice", "iou", "precision", "recall", "f1")
MEAN_FOREGROUND = "mean foreground"
COMPONENT_CLASSES = ("vertebrae", "IVD")

# In 30 T2 SPACE series of SPIDER the 228 discs make 228 components of 1100 mm3 and more and 9 below 20 mm3; the
# vertebrae make 357 of 780 mm3 and more (bodies, and arches that are apart from them in these slices), 2 of 100 to 210
# mm3 and 1005 below 100 mm3. Those are specks of the annotation, which nobody has to detect.
SETTINGS = {"nsd_tolerances_mm": [1.0, 2.0], "detection_iou": 0.1, "minimum_component_mm3": 100.0}

# Width of the bins that pooled distances are counted in: pooled HD95 is off by half of it at most.
HISTOGRAM_MM = 0.01

# A figure where the structure is missing in the reference, in the prediction, in both. None: its formula's value.
CONVENTION: dict[str, tuple[float | None, float | None, float | None]] = {
    **dict.fromkeys((*SCORES, "nsd"), (0.0, 0.0, np.nan)),
    "soft_dice": (0.0, None, np.nan),
    **dict.fromkeys(("asd_mm", "hd95_mm"), (np.nan, np.nan, np.nan)),
    "volume_error_ml": (None, None, np.nan),
    "relative_volume_error": (np.nan, None, np.nan),
    "detection_rate": (np.nan, 0.0, np.nan),
}
_SIDES = ("reference", "prediction", "both")

# Figures that are defined together share a count.
COUNTS = {
    "n_overlap": "dice",
    "n_soft_dice": "soft_dice",
    "n_surface": "asd_mm",
    "n_nsd": "nsd",
    "n_volume": "volume_error_ml",
    "n_relative_volume": "relative_volume_error",
    "n_detection": "detection_rate",
}
COMPONENTS = (
    "reference_components",
    "predicted_components",
    "detected_components",
    "reference_specks",
    "predicted_specks",
)


def figure_columns(tolerances_mm: Sequence[float]) -> list[str]:
    """The figures of slices and cases, in the order of the tables; cases have a detection_rate besides."""
    surfaces = ["asd_mm", "hd95_mm", *nsd_columns(tolerances_mm)]
    return [*SCORES, "soft_dice", *surfaces, "volume_error_ml", "relative_volume_error"]


def nsd_columns(tolerances_mm: Sequence[float]) -> list[str]:
    """Columns of the normalised surface distance: 1.0 -> nsd_1mm, 0.5 -> nsd_0.5mm."""
    return [f"nsd_{tolerance:g}mm" for tolerance in tolerances_mm]


def confusion_matrix(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Voxel counts, int64 (classes, classes): row the reference class, column the predicted one.

    Args:
        reference, prediction: uint8 classes of any equal shape.
    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"prediction of shape {prediction.shape}; expected the reference's {reference.shape}")
    pairs = reference.ravel().astype(np.intp) * CLASS_COUNT + prediction.ravel()
    return np.bincount(pairs, minlength=CLASS_COUNT**2).reshape(CLASS_COUNT, CLASS_COUNT).astype(np.int64)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU, precision, recall and F1 of each class, float64 (classes,) each; CONVENTION where a side is missing.

    Dice and F1 of hard labels are the same number; both stand here because the paper's "Dice" is another one.
    """
    both = np.diag(confusion)
    reference, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    over = {
        "dice": (reference + predicted) / 2,
        "iou": reference + predicted - both,
        "precision": predicted,
        "recall": reference,
        "f1": (reference + predicted) / 2,
    }
    missing = _missing(reference, predicted)
    return {score: _by_convention(score, _ratio(both, over[score]), missing) for score in SCORES}


def mean_foreground_dice(confusion: np.ndarray) -> float:
    """Mean over classes 1 to 3 of the Dice of one (pooled) confusion matrix; NaN if a class is on neither side."""
    return float(np.mean(class_scores(confusion)["dice"][list(FOREGROUND)]))


def soft_overlap(reference: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Sums that soft Dice is made of, float64 (n, classes, 3): of p * y, of p and of y over the pixels of each slice.

    p is the probability of the class; y is 1 where the reference has it and 0 elsewhere.

    Args:
        reference: uint8 classes (n, rows, columns).
        probabilities: float (n, rows, columns, classes).
    Raises:
        ValueError: shapes do not fit each other.
    """
    if probabilities.shape != (*reference.shape, CLASS_COUNT):
        raise ValueError(
            f"probabilities of shape {probabilities.shape}; expected {(*reference.shape, CLASS_COUNT)}, "
            "one for each class at every pixel of the reference"
        )
    sums = np.empty((len(reference), CLASS_COUNT, 3))
    for row, plane, p in zip(sums, reference, probabilities, strict=True):
        true_class = plane.ravel()
        p = p.reshape(-1, CLASS_COUNT)
        of_true_class = p[np.arange(len(p)), true_class]
        row[:, 0] = np.bincount(true_class, weights=of_true_class, minlength=CLASS_COUNT)
        row[:, 1] = p.sum(axis=0, dtype=np.float64)
        row[:, 2] = np.bincount(true_class, minlength=CLASS_COUNT)
    return sums


def count_components(
    reference: np.ndarray, prediction: np.ndarray, minimum_iou: float, minimum_voxels: float = 0
) -> tuple[int, int, int, int, int]:
    """Components on both sides, and how many of the reference's are found: the figures of COMPONENTS, in that order.

    As many as possible are matched, each with one at most of those it overlaps by an IoU of `minimum_iou` or more.
    A component hangs together by faces: by edges and corners too, neighbouring vertebrae would sooner count as one.

    Args:
        reference, prediction: bool (slice, row, column).
        minimum_iou: above 0.
        minimum_voxels: smaller components, the specks, take no part.
    """
    from scipy.optimize import linear_sum_assignment  # here: takes long to import, and is needed by evaluations alone

    box = bounding_box(reference | prediction)
    sides = [_components(mask[box], minimum_voxels) for mask in (reference, prediction)]
    (reference_labels, reference_sizes, reference_specks), (labels, sizes, specks) = sides
    shape = len(reference_sizes) + 1, len(sizes) + 1
    pairs = np.bincount((reference_labels * shape[1] + labels).ravel(), minlength=shape[0] * shape[1])
    shared = pairs.reshape(shape)[1:, 1:]
    iou = shared / (reference_sizes[:, None] + sizes - shared)
    # One pair more is worth more than all that the IoU of the others, at most 1 each, can lose by it.
    worth = np.where(iou >= minimum_iou, iou + min(shape), 0)
    detected = np.count_nonzero(worth[linear_sum_assignment(worth, maximize=True)])
    return len(reference_sizes), len(sizes), detected, reference_specks, specks


def _components(mask: np.ndarray, minimum_voxels: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels 1, 2, ... of the components that are large enough, 0 elsewhere; their sizes; the number of the others."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    large = sizes >= minimum_voxels
    renumbered = np.concatenate([[0], np.where(large, np.cumsum(large), 0)])
    return renumbered[labels], sizes[large], int(np.count_nonzero(~large))


@dataclass(frozen=True)
class Pooled:
    """Sums over cases, from which the pooled figures follow; `+` adds more cases. Its size does not grow with them.

    Attributes:
        tolerances_mm: of the normalised surface distance.
        confusion: int64 (classes, classes), of the tested slices.
        soft: float64 (classes, 3), see `soft_overlap`, of the tested slices with probabilities.
        volumes_ml: float64 (classes, 2), of reference and prediction. This and what follows is of whole cases.
        areas, near_areas: float64 (classes,) and (classes, tolerances), mm2: surface of both sides, and what of it lies
            within the tolerances of the other side.
        apart, apart_areas: float64 (classes,): sum of distance * area, mm3, and area, mm2, of cases with both surfaces.
        histogram: float64 (classes, 2, bins), mm2: the same area by distance, in bins around 0, 1, 2, ... HISTOGRAM_MM,
            from reference to prediction and from prediction to reference.
        components: int64 (classes, 5), see COMPONENTS.
    """

    tolerances_mm: tuple[float, ...]
    confusion: np.ndarray
    soft: np.ndarray
    volumes_ml: np.ndarray
    areas: np.ndarray
    near_areas: np.ndarray
    apart: np.ndarray
    apart_areas: np.ndarray
    histogram: np.ndarray
    components: np.ndarray

    @classmethod
    def of_nothing(cls, tolerances_mm: Sequence[float]) -> Pooled:
        """No case at all: where a sum starts."""
        n = CLASS_COUNT
        return cls(
            tolerances_mm=tuple(tolerances_mm),
            confusion=np.zeros((n, n), np.int64),
            soft=np.zeros((n, 3)),
            volumes_ml=np.zeros((n, 2)),
            areas=np.zeros(n),
            near_areas=np.zeros((n, len(tolerances_mm))),
            apart=np.zeros(n),
            apart_areas=np.zeros(n),
            histogram=np.zeros((n, 2, 0)),
            components=np.zeros((n, len(COMPONENTS)), np.int64),
        )

    def __add__(self, other: Pooled) -> Pooled:
        if self.tolerances_mm != other.tolerances_mm:
            raise ValueError(
                f"pooled figures at {self.tolerances_mm} and at {other.tolerances_mm} mm; expected equal tolerances. "
                "Score all cases with one nsd_tolerances_mm"
            )
        sums = {}
        for name in (field.name for field in fields(self)[1:]):
            ours, theirs = getattr(self, name), getattr(other, name)
            if name == "histogram":
                bins = max(ours.shape[2], theirs.shape[2])
                ours, theirs = _with_bins(ours, bins), _with_bins(theirs, bins)
            sums[name] = ours + theirs
        return Pooled(self.tolerances_mm, **sums)

    def table(self) -> pd.DataFrame:
        """One row per class: class, the figures, reference_voxels, predicted_voxels, missing, the components and
        detection_rate."""
        bins_mm = np.arange(self.histogram.shape[2]) * HISTOGRAM_MM
        hd95_mm = [
            max(weighted_percentile(bins_mm, areas, 95) for areas in both) if both.any() else np.nan
            for both in self.histogram
        ]
        surfaces = [_ratio(self.apart, self.apart_areas), hd95_mm, *_ratio(self.near_areas, self.areas[:, None]).T]
        columns = _figures(self.confusion, self.soft, self.volumes_ml, np.transpose(surfaces), self.tolerances_mm)
        for column, counts in zip(COMPONENTS, self.components.T, strict=True):
            columns[column] = np.where(np.isin(CLASSES, COMPONENT_CLASSES), counts, np.nan)
        reference, predicted, detected = (columns[column] for column in COMPONENTS[:3])
        rate = _by_convention("detection_rate", _ratio(detected, reference), _missing(reference, predicted))
        return pd.DataFrame(columns | {"detection_rate": rate})


@dataclass(frozen=True)
class CaseScores:
    """What `score_case` finds.

    Attributes:
        by_slice: a row per tested slice and class: slice, class, the figures (surfaces are contours here),
            reference_voxels, predicted_voxels, missing.
        by_case: a row per class: class, the figures, reference_voxels, predicted_voxels, missing, the COMPONENTS,
            detection_rate, whole.
        pooled: the case as a summand.
    """

    by_slice: pd.DataFrame
    by_case: pd.DataFrame
    pooled: Pooled


def score_case(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    settings: Mapping[str, Any] = SETTINGS,
    *,
    tested: Sequence[int] | np.ndarray | None = None,
    soft: np.ndarray | None = None,
) -> CaseScores:
    """All figures of one case.

    Args:
        reference, prediction: uint8 classes (slice, row, column), on the native grid.
        spacing_mm: voxel size along the same axes.
        settings: nsd_tolerances_mm, detection_iou and minimum_component_mm3 (smaller components are specks, counted and
            left out); where one is not given, that of SETTINGS holds.
        tested: indices of the slices to score; None for all.
        soft: `soft_overlap` of all slices, float64 (slices, classes, 3); None without probabilities.
    Raises:
        ValueError: shapes that do not fit, slices that are not there, unknown or impossible settings.
    """
    settings = _checked(settings)
    if reference.ndim != 3 or reference.shape != prediction.shape:
        raise ValueError(
            f"reference of shape {reference.shape} and prediction of shape {prediction.shape}; expected two volumes "
            "(slice, row, column) of one shape. Bring the prediction onto the reference's grid"
        )
    sums_shape = (len(reference), CLASS_COUNT, 3)
    if soft is not None and soft.shape != sums_shape:
        raise ValueError(
            f"soft overlap of shape {soft.shape}; expected {sums_shape}. Compute it of all slices with soft_overlap"
        )
    slices = np.arange(len(reference)) if tested is None else np.unique(tested)
    if not len(slices) or slices[0] < 0 or slices[-1] >= len(reference):
        raise ValueError(
            f"tested slices {slices.tolist()} of a series of {len(reference)}; expected some of 0 to "
            f"{len(reference) - 1}. Make the split again: kedro run --pipeline=preprocess"
        )
    soft = np.zeros(sums_shape) if soft is None else soft
    whole = len(slices) == len(reference)
    tolerances = settings["nsd_tolerances_mm"]
    voxel_mm3 = float(np.prod(spacing_mm))

    confusions = np.array([confusion_matrix(reference[i], prediction[i]) for i in slices])
    contours = np.full((len(slices), CLASS_COUNT, 2 + len(tolerances)), np.nan)
    hd95_mm = np.full(CLASS_COUNT, np.nan)
    pooled = replace(Pooled.of_nothing(tolerances), confusion=confusions.sum(axis=0), soft=soft[slices].sum(axis=0))
    if whole:
        pooled.volumes_ml[:] = _volumes_ml(pooled.confusion, voxel_mm3)
    for index in FOREGROUND:
        truth, found = reference == index, prediction == index
        for row, i in enumerate(slices):
            contour = surface_distances(truth[i], found[i], spacing_mm[1:])
            nsd = [contour.nsd(tolerance) for tolerance in tolerances]
            contours[row, index] = contour.asd_mm, contour.hausdorff_mm(95), *nsd
        if whole:
            surfaces = surface_distances(truth, found, spacing_mm)
            hd95_mm[index] = surfaces.hausdorff_mm(95)
            pooled += _surface_sums(surfaces, index, tolerances)
            if CLASSES[index] in COMPONENT_CLASSES:
                least = settings["minimum_component_mm3"] / voxel_mm3
                pooled.components[index] = count_components(truth, found, settings["detection_iou"], least)

    parts = [
        _figures(confusion, sums, _volumes_ml(confusion, voxel_mm3), figures, tolerances)
        for confusion, sums, figures in zip(confusions, soft[slices], contours, strict=True)
    ]
    by_slice = pd.DataFrame(
        {"slice": np.repeat(slices, CLASS_COUNT)}
        | {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
    )
    # A case is a pool of one; only its HD95 need not come from the histogram.
    by_case = pooled.table()
    by_case["hd95_mm"] = _by_convention("hd95_mm", hd95_mm, by_case["missing"].to_numpy())
    if not whole:
        by_case[list(COMPONENTS)] = np.nan
    by_case["whole"] = whole
    return CaseScores(by_slice, by_case, pooled)


def table_by_slice(cases: Mapping[str, tuple[str, CaseScores]]) -> pd.DataFrame:
    """All slices of all cases: series, patient, and the columns of `CaseScores.by_slice`.

    Args:
        cases: series -> (patient, scores).
    """
    return _named({series: (patient, scores.by_slice) for series, (patient, scores) in cases.items()})


def table_by_case(cases: Mapping[str, tuple[str, CaseScores]]) -> pd.DataFrame:
    """One row per series and class: series, patient, and the columns of `CaseScores.by_case`.

    Args:
        cases: series -> (patient, scores).
    """
    return _named({series: (patient, scores.by_case) for series, (patient, scores) in cases.items()})


def table_by_class(
    by_slice: pd.DataFrame, by_case: pd.DataFrame, pooled: Pooled, ceiling: np.ndarray | None = None
) -> pd.DataFrame:
    """One row per class and scope.

    Args:
        by_slice, by_case: see `table_by_slice` and `table_by_case`.
        pooled: the sum over the cases.
        ceiling: confusion matrix of the references with themselves, resampled to the net's size and back.
    Returns:
        class, scope, the figures, detection_rate, then counts: n_cases and n_slices, the tested ones; n_undefined, the
        units of which the class has no figure at all; n_missing_reference, n_missing_prediction, n_missing_both; and
        those of COUNTS, the units with a figure of that family. Units are slices in the scope "slice mean", else cases.
        The scopes "case mean" and "slice mean" average the units with a figure. The last row of each scope is the mean
        over the foreground classes (of the detection rate: over COMPONENT_CLASSES), NaN if one of them has none; its
        counts of units are sums over them.
    """
    figures = [*figure_columns(pooled.tolerances_mm), "detection_rate"]
    scopes = [
        ("pooled", pooled.table().set_index("class"), by_case),
        ("case mean", _means(by_case), by_case),
        ("slice mean", _means(by_slice), by_slice),
    ]
    if ceiling is not None:
        # The reference stands on both sides: what it lacks, both lack.
        lacking = by_case["missing"].isin(["reference", "both"])
        units = pd.DataFrame(
            {"class": by_case["class"], "missing": lacking.map({True: "both", False: ""}), "dice": by_case["dice"]}
        )
        units["dice"] = units["dice"].mask(lacking)
        scopes.append(("ceiling", pd.DataFrame(class_scores(ceiling), index=list(CLASSES)), units))

    tables = []
    for scope, table, units in scopes:
        table = table.reindex(columns=figures)
        table = pd.concat([table, _counts(units, pooled.tolerances_mm)], axis=1).reindex(list(CLASSES))
        foreground = table.iloc[list(FOREGROUND)]
        last = foreground[figures].mean(skipna=False)
        last["detection_rate"] = foreground.loc[list(COMPONENT_CLASSES), "detection_rate"].mean(skipna=False)
        table.loc[MEAN_FOREGROUND] = pd.concat([last, foreground.drop(columns=figures).sum()])
        tables.append(table.rename_axis("class").reset_index().assign(scope=scope))
    result = pd.concat(tables, ignore_index=True)
    result["n_cases"] = by_case["series"].nunique()
    result["n_slices"] = len(by_slice[["series", "slice"]].drop_duplicates())
    units = ["n_undefined", *(f"n_missing_{side}" for side in _SIDES), *COUNTS]
    result[units] = result[units].astype(np.int64)
    return result[["class", "scope", *figures, "n_cases", "n_slices", *units]]


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    check_names(settings, SETTINGS, "metrics")
    settings = {**SETTINGS, **settings}
    tolerances = settings["nsd_tolerances_mm"]
    if not tolerances or min(tolerances) < 0 or len(set(nsd_columns(tolerances))) < len(tolerances):
        raise ValueError(
            f"metrics.nsd_tolerances_mm {tolerances}; expected different lengths in mm, 0 or more, e.g. [1, 2]"
        )
    if not 0 < settings["detection_iou"] <= 1:
        raise ValueError(f"metrics.detection_iou {settings['detection_iou']}; expected above 0 and up to 1, e.g. 0.1")
    if settings["minimum_component_mm3"] < 0:
        raise ValueError(
            f"metrics.minimum_component_mm3 {settings['minimum_component_mm3']}; expected 0 or more, e.g. 100"
        )
    return settings


def _ratio(figure: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Quotient, NaN where `over` is 0."""
    figure, over = np.broadcast_arrays(np.asarray(figure, np.float64), np.asarray(over, np.float64))
    return np.divide(figure, over, out=np.full(figure.shape, np.nan), where=over > 0)


def _missing(reference: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Which side lacks the class: "" for none, "reference", "prediction" or "both"; from totals of any kind."""
    lacks = np.equal(reference, 0), np.equal(predicted, 0)
    return np.select([lacks[0] & lacks[1], *lacks], ["both", "reference", "prediction"], "")


def _by_convention(figure: str, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """`values` (classes,) with what CONVENTION has for the figure where a side is missing."""
    for side, value in zip(_SIDES, CONVENTION["nsd" if figure.startswith("nsd_") else figure], strict=True):
        if value is not None:
            values = np.where(missing == side, value, values)
    return values


def _volumes_ml(confusion: np.ndarray, voxel_mm3: float) -> np.ndarray:
    """Volumes of reference and prediction, float64 (classes, 2). Background, cut by the field of view, has none."""
    volumes = np.stack([confusion.sum(axis=1), confusion.sum(axis=0)], axis=1) * voxel_mm3 / 1000
    volumes[0] = 0
    return volumes


def _figures(
    confusion: np.ndarray,
    soft: np.ndarray,
    volumes_ml: np.ndarray,
    surfaces: np.ndarray,
    tolerances_mm: Sequence[float],
) -> dict[str, np.ndarray]:
    """Columns with a row per class, every convention applied: the one way to a figure of a slice, a case or a pool.

    Args:
        confusion, soft, volumes_ml: see `Pooled`. Sums of 0 say that nothing was measured.
        surfaces: float64 (classes, 2 + tolerances): asd_mm, hd95_mm, then the NSD.
    """
    reference, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    missing = _missing(reference, predicted)
    reference_ml, predicted_ml = volumes_ml.T
    error_ml = predicted_ml - reference_ml
    true_p, p, y = soft.T
    names = figure_columns(tolerances_mm)
    figures = class_scores(confusion)
    figures["soft_dice"] = _by_convention("soft_dice", _ratio(2 * true_p, p + y), np.where(p + y > 0, missing, "both"))
    measured = dict(
        zip(names[names.index("asd_mm") :], [*surfaces.T, error_ml, _ratio(error_ml, reference_ml)], strict=True)
    )
    without = _missing(reference_ml, predicted_ml)
    figures |= {name: _by_convention(name, values, without) for name, values in measured.items()}
    voxels = {"reference_voxels": reference, "predicted_voxels": predicted}
    return {"class": np.array(CLASSES)} | figures | voxels | {"missing": missing}


def _surface_sums(surfaces: SurfaceDistances, index: int, tolerances_mm: Sequence[float]) -> Pooled:
    """The surfaces of one class of one case as a summand."""
    sums = Pooled.of_nothing(tolerances_mm)
    sides = (
        (surfaces.reference_to_prediction_mm, surfaces.reference_areas),
        (surfaces.prediction_to_reference_mm, surfaces.prediction_areas),
    )
    for distances, areas in sides:
        sums.areas[index] += areas.sum()
        sums.near_areas[index] += [areas[distances <= tolerance].sum() for tolerance in tolerances_mm]
    if not all(len(areas) for _, areas in sides):
        return sums
    counted = []
    for distances, areas in sides:
        sums.apart[index] += distances @ areas
        sums.apart_areas[index] += areas.sum()
        counted.append(np.bincount(np.rint(distances / HISTOGRAM_MM).astype(np.intp), weights=areas))
    histogram = np.zeros((CLASS_COUNT, 2, max(map(len, counted))))
    for row, areas in zip(histogram[index], counted, strict=True):
        row[: len(areas)] = areas
    return replace(sums, histogram=histogram)


def _with_bins(histogram: np.ndarray, bins: int) -> np.ndarray:
    return np.pad(histogram, ((0, 0), (0, 0), (0, bins - histogram.shape[2])))


def _named(tables: Mapping[str, tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    named = []
    for series, (patient, table) in sorted(tables.items()):
        table = table.copy()
        table.insert(0, "series", series)
        table.insert(1, "patient", patient)
        named.append(table)
    return pd.concat(named, ignore_index=True)


def _means(units: pd.DataFrame) -> pd.DataFrame:
    return units.groupby("class").mean(numeric_only=True)


def _counts(units: pd.DataFrame, tolerances_mm: Sequence[float]) -> pd.DataFrame:
    """By class: the units without any figure, those that miss a side, and those with a figure of each family."""
    by_class = units["class"]
    counts = {"n_undefined": units["dice"].isna()}
    counts |= {f"n_missing_{side}": units["missing"] == side for side in _SIDES}
    for name, figure in COUNTS.items():
        column = nsd_columns(tolerances_mm)[0] if figure == "nsd" else figure
        counts[name] = units[column].notna() if column in units else pd.Series(False, units.index)
    return pd.DataFrame(counts).groupby(by_class).sum()
