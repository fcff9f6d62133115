"""Cost of the metrics on one core: a case of 25 slices at 640 x 512, more cases, hopeless predictions, other methods.

    python benchmarks/metrics.py [--raw-dir DIR] [--skip-methods]

The reference is a synthetic lumbar scan, or the first mask of DIR (SPIDER's layout), brought to 25 x 640 x 512 voxels.
The "close" prediction is the reference moved by a smooth random field of two pixels or so; the others are what a bad
net gives. Seconds are the processor's, so that what else the machine does counts little; compare them within one run.

The methods are compared on the surfaces of all three classes in three dimensions: the library `surface-distance` as it
is; a distance transform of SciPy or of `edt` (if that is installed; LGPL, so no dependency) in the box of both masks;
the k-d tree; and `lumbarflow.surfaces`, which takes the k-d tree unless the surfaces fill the box.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import yaml
from scipy import ndimage

from lumbarflow import surfaces
from lumbarflow.imaging import LabelMap, read_volume, to_sagittal
from lumbarflow.labels import CLASS_COUNT, FOREGROUND, LabelTable
from lumbarflow.metrics import Pooled, score_case, soft_overlap, table_by_case, table_by_class, table_by_slice

ROOT = Path(__file__).parents[1]
SHAPE = (25, 640, 512)
LIMIT_S = 3
TOLERANCES_MM = (1.0, 2.0)
CASES = (1, 2, 4, 8)


def parameters() -> dict:
    merged: dict = {}
    for path in sorted((ROOT / "conf/base").glob("parameters_*.yml")):
        merged |= yaml.safe_load(path.read_text())
    return merged


def synthetic_masks() -> Iterator[LabelMap]:
    """Lumbar anatomy on the wanted grid, patient after patient."""
    from lumbarflow import phantom

    settings = parameters()["synthesize"] | {"sequences": {"t2_SPACE": 1.0}}
    for plan in phantom.plan_cohort(settings):
        field_mm = np.multiply(plan.size, plan.spacing_mm)
        spacing_mm = (plan.spacing_mm[0], *(field_mm[1:] / SHAPE[1:]))
        plan = replace(plan, size=SHAPE, spacing_mm=tuple(map(float, spacing_mm)))
        yield to_sagittal(phantom.render(plan, settings)[1])[0]


def real_masks(folder: Path) -> Iterator[LabelMap]:
    for path in sorted((folder / "masks").iterdir()):
        yield to_sagittal(read_volume(path, LabelMap))[0]


def references(masks: Iterator[LabelMap]) -> Iterator[tuple[np.ndarray, tuple[float, float, float]]]:
    """Classes of SHAPE, cut or continued with the last slice, row and column; spacing (slice, row, column)."""
    table = LabelTable(parameters()["labels"]["table"])
    for mask in masks:
        classes = table.classes(mask.array)[tuple(slice(size) for size in SHAPE)]
        classes = np.pad(
            classes, [(0, size - own) for size, own in zip(SHAPE, classes.shape, strict=True)], mode="edge"
        )
        yield classes, tuple(reversed(mask.spacing_mm))


def close(reference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.normal(0, 2, (2, 3, SHAPE[1] // 32, SHAPE[2] // 32))
    shifts = [ndimage.zoom(field, np.divide(SHAPE, field.shape), order=1) for field in coarse]
    rows, columns = np.indices(SHAPE[1:])
    moved = np.empty_like(reference)
    for plane, out, down, right in zip(reference, moved, *shifts, strict=True):
        row = np.clip(np.rint(rows + down), 0, SHAPE[1] - 1).astype(int)
        out[:] = plane[row, np.clip(np.rint(columns + right), 0, SHAPE[2] - 1).astype(int)]
    return moved


def predictions(reference: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    near, specks = close(reference, rng), rng.random(SHAPE)
    noise = rng.integers(0, CLASS_COUNT, SHAPE, np.uint8)
    return {
        "close": near,
        "nothing": np.zeros_like(reference),
        "all vertebra": np.ones_like(reference),
        "far off": np.roll(reference, (SHAPE[1] // 8, SHAPE[2] // 6), axis=(1, 2)),
        "1 % specks": np.where(specks < 0.01, noise, near),
        "10 % specks": np.where(specks < 0.1, noise, near),
        "noise": noise,
    }


def timed(function: Callable, *arguments, **options) -> tuple[float, object]:
    start = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - start, result


def evaluate(cases: Iterator[tuple]) -> None:
    """All that an evaluation makes of its cases, one after the other."""
    scores, pooled = {}, Pooled.of_nothing(TOLERANCES_MM)
    for number, (reference, prediction, spacing_mm, soft) in enumerate(cases):
        scores[f"{number}_t2"] = (str(number), score_case(reference, prediction, spacing_mm, soft=soft))
        pooled += scores[f"{number}_t2"][1].pooled
    table_by_class(table_by_slice(scores), table_by_case(scores), pooled)


@contextmanager
def dense_from(share: float) -> Iterator[None]:
    """`lumbarflow.surfaces` with another limit between the k-d tree and the distance transform."""
    own, surfaces.DENSE = surfaces.DENSE, share
    try:
        yield
    finally:
        surfaces.DENSE = own


def ours(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple, share: float = surfaces.DENSE
) -> list[float]:
    with dense_from(share):
        found = surfaces.surface_distances(reference, prediction, spacing_mm)
    return [found.asd_mm, found.hausdorff_mm(95), *map(found.nsd, TOLERANCES_MM)]


def with_edt(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple) -> list[float]:
    import edt

    own = ndimage.distance_transform_edt
    ndimage.distance_transform_edt = lambda apart, sampling: edt.edt(apart, anisotropy=sampling, parallel=1)
    try:
        return ours(reference, prediction, spacing_mm, share=0)
    finally:
        ndimage.distance_transform_edt = own


def whole_library(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple) -> list[float]:
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls SciPy by old names
        found = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    averages = surface_distance.compute_average_surface_distance(found)
    asd_mm = np.average(averages, weights=[found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()])
    nsd = [surface_distance.compute_surface_dice_at_tolerance(found, tolerance) for tolerance in TOLERANCES_MM]
    return [float(asd_mm), surface_distance.compute_robust_hausdorff(found, 95), *nsd]


def compare_methods(reference: np.ndarray, predicted: dict[str, np.ndarray], spacing_mm: tuple) -> None:
    methods = {"surface-distance": whole_library, "SciPy's EDT": lambda *masks: ours(*masks, share=0)}
    try:
        import edt  # noqa: F401
    except ImportError:
        print("edt is not installed: left out")
    else:
        methods["edt"] = with_edt
    methods["k-d tree"] = lambda *masks: ours(*masks, share=np.inf)
    methods["lumbarflow"] = ours
    print(f"{'prediction':<14}{'method':<18}{'seconds':>8}{'ratio':>7}   largest difference of ASD, HD95 (mm), NSD")
    for name in ("close", "far off", "1 % specks", "10 % specks"):
        rows = {}
        for method, function in methods.items():
            pairs = [(reference == index, predicted[name] == index, spacing_mm) for index in FOREGROUND]
            rows[method] = timed(lambda function=function, pairs=pairs: np.array([function(*pair) for pair in pairs]))
        seconds, oracle = rows["surface-distance"]
        for method, (own, figures) in rows.items():
            asd, hd95, *nsd = np.abs(figures - oracle).max(axis=0)
            print(f"{name:<14}{method:<18}{own:>8.2f}{own / seconds:>7.2f}   {asd:.1e}, {hd95:.1e}, {max(nsd):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw-dir", type=Path, help="folder with masks/ in SPIDER's layout, instead of synthetic ones")
    parser.add_argument("--skip-methods", action="store_true", help="do not compare the methods, which takes longest")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    masks = real_masks(arguments.raw_dir) if arguments.raw_dir else synthetic_masks()
    # Two patients in turn: memory and time to make eight would tell nothing more.
    patients = list(islice(references(masks), 2))
    reference, spacing_mm = patients[0]
    predicted = predictions(reference)
    print(
        f"{reference.shape} voxels of {' x '.join(f'{mm:.2f}' for mm in spacing_mm)} mm, one core, processor's seconds"
    )

    print("\nAll metrics of one case (slices, case and pooled)")
    for name, prediction in predicted.items():
        seconds, _ = timed(score_case, reference, prediction, spacing_mm)
        limit = "" if name != "close" else f"   limit {LIMIT_S}: {'kept' if seconds < LIMIT_S else 'EXCEEDED'}"
        print(f"{name:<14}{seconds:>8.2f}{limit}")
    probabilities = np.eye(CLASS_COUNT, dtype=np.float32)[predicted["close"][:1]]
    seconds, _ = timed(soft_overlap, reference[:1], probabilities)
    print(f"{'soft_overlap':<14}{seconds * len(reference):>8.2f}   beside it, with the prediction at hand")

    print("\nCases, with the tables")
    cases = [(*pair, None) for pair in ((own, close(own, np.random.default_rng(1)), mm) for own, mm in patients)]
    first = None
    for count in CASES:
        seconds, _ = timed(evaluate, islice(cycle(cases), count))
        first = first or seconds
        print(f"{count:>3}{seconds:>19.2f}   {seconds / count / first:.2f} times the first per case")

    if not arguments.skip_methods:
        print("\nSurfaces of three classes, three-dimensional")
        compare_methods(reference, predicted, spacing_mm)


if __name__ == "__main__":
    main()
