"""Errors of the measurements against known anatomy, over a synthetic cohort, and what a large scan costs.

    python benchmarks/measurements.py [--patients N] [--seed N]
    python benchmarks/measurements.py --predictions DIR --raw-dir DIR

Every patient of conf/base/parameters_synthesize.yml is scanned with all three sequences, and `measurements.measure` is
given the reference labels. A pixel is the larger spacing in the plane of that series. What could not be measured is
counted beside, with its reasons below. Seconds are the processor's.

With --predictions (`07_model_output/predictions` of an evaluation: test patients alone), what is measured on
predicted masks is set against the known anatomy of synthetic scans in --raw-dir, or against what is
measured on the reference masks there, as far as a scan reaches. A chord is compared with the one of its kind whose
middle is nearest, at most MATCH_MM away, so that a disc too many at one end does not shift all levels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lumbarflow import phantom
from lumbarflow.files import read_json
from lumbarflow.imaging import LabelMap, read_volume, split_volume_name, to_sagittal
from lumbarflow.instances import label_instances
from lumbarflow.labels import LabelTable
from lumbarflow.measurements import Measurement, measure
from lumbarflow.store import SeriesStore

ROOT = Path(__file__).parents[1]
LARGE = (20, 640, 512)
LIMIT_S = 1.0
MATCH_MM = 10.0  # less than half the distance of two levels


def settings(patients: int | None, seed: int | None) -> dict:
    own = yaml.safe_load((ROOT / "conf/base/parameters_synthesize.yml").read_text())["synthesize"]
    changed = {"patients": patients or own["patients"], "seed": own["seed"] if seed is None else seed}
    return own | changed | {"sequences": dict.fromkeys(phantom.SEQUENCES, 1.0)}


def labels_alone(plan: phantom.SeriesPlan, chosen: dict) -> LabelMap:
    """The sagittal reference labels; their image, which nobody looks at, is drawn with one sample per slice."""
    chosen = chosen | {"acquisition": {name: kind | {"samples": 1} for name, kind in chosen["acquisition"].items()}}
    return to_sagittal(phantom.render(plan, chosen)[1])[0]


def true_value(measured: Measurement, known: dict) -> float:
    """What `phantom.anatomy` knows of a measurement; of the lordosis, between the bodies that its note names."""
    if measured.quantity == "lordosis":
        # "upper endplate of vertebra 5 to lower endplate of vertebra 1: ..."
        highest, lowest = (int(word) for word in measured.note.split(":")[0].split() if word.isdigit())
        return known["vertebrae"][lowest - 1]["lower_tilt_deg"] - known["vertebrae"][highest - 1]["upper_tilt_deg"]
    part = known["vertebrae" if measured.structure == "vertebra" else "discs"][measured.number - 1]
    return part[measured.quantity]["mm"]


def errors(plans: list[phantom.SeriesPlan], chosen: dict) -> Iterator[dict]:
    for plan in plans:
        known, pixel_mm = phantom.anatomy(plan, chosen), max(plan.spacing_mm[1:])
        for found in measure(labels_alone(plan, chosen)):
            error = found.value - true_value(found, known) if math.isfinite(found.value) else math.nan
            yield {
                "series": plan.name,
                "sequence": plan.sequence,
                "structure": found.structure,
                "number": found.number,
                "quantity": found.quantity,
                "error": error,
                "pixels": error / pixel_mm if found.unit == "mm" else math.nan,
                "note": found.note,
            }


def summary(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    groups = table.groupby(by, sort=False)
    return pd.DataFrame(
        {
            "n": groups["error"].count(),
            "not measured": groups["error"].size() - groups["error"].count(),
            "mean error": groups["error"].mean(),
            "mean |error|": groups["error"].agg(lambda values: values.abs().mean()),
            "max |error|": groups["error"].agg(lambda values: values.abs().max()),
            "mean |pixels|": groups["pixels"].agg(lambda values: values.abs().mean()),
            "max |pixels|": groups["pixels"].agg(lambda values: values.abs().max()),
        }
    ).round(3)


def seconds_of_a_large_scan(plan: phantom.SeriesPlan, chosen: dict) -> float:
    spacing_mm = (plan.spacing_mm[0], *np.multiply(plan.size[1:], plan.spacing_mm[1:]) / LARGE[1:])
    labels = labels_alone(replace(plan, size=LARGE, spacing_mm=tuple(map(float, spacing_mm))), chosen)
    start = time.process_time()
    measure(labels)
    return time.process_time() - start


def known_chords(raw: Path, series: str) -> Iterator[tuple[str, str, np.ndarray, float]]:
    """Structure, quantity, both ends (LPS mm) and value (mm) of every chord that is known of a series."""
    path = raw / "anatomy" / f"{series}.json"
    if path.is_file():
        known = read_json(path)["anatomy"]
        for structure, group in (("vertebra", "vertebrae"), ("disc", "discs")):
            for part in known[group]:
                chords = {name: value for name, value in part.items() if isinstance(value, dict)}
                for quantity, chord in chords.items():
                    yield structure, quantity, np.array([chord["from"], chord["to"]]), chord["mm"]
        return
    (mask,) = (file for file in (raw / "masks").iterdir() if split_volume_name(file.name)[0] == series)
    classes = LabelTable(yaml.safe_load((ROOT / "conf/base/parameters_ingest.yml").read_text())["labels"]["table"])
    reference = read_volume(mask, LabelMap)
    for found in measure_classes(reference.with_array(classes.classes(reference.array))):
        if found.unit == "mm" and math.isfinite(found.value):
            yield found.structure, found.quantity, np.array(found.ends_mm), found.value


def measure_classes(classes: LabelMap) -> list[Measurement]:
    sagittal, _ = to_sagittal(classes)
    return measure(sagittal.with_array(label_instances(sagittal.array, sagittal.spacing_mm[::-1])))


def errors_of_predictions(predictions: SeriesStore, raw: Path) -> Iterator[dict]:
    for series in predictions.series():
        predicted = predictions.label_map(series, "labels.mha")
        pixel_mm = sorted(predicted.spacing_mm)[1]  # slices lie farther apart than pixels
        found = [
            (item.structure, item.quantity, np.mean(item.ends_mm, axis=0), item.value)
            for item in measure_classes(predicted)
            if item.unit == "mm" and math.isfinite(item.value)
        ]
        for structure, quantity, ends, value in known_chords(raw, series):
            # What is known of synthetic patients goes beyond the field of view.
            places = [predicted.index_point(end) for end in ends]
            if not all(np.all((place > 0) & (place < np.array(predicted.size) - 1)) for place in places):
                continue
            middle = ends.mean(axis=0)
            near = [
                (float(np.linalg.norm(place - middle)), measured)
                for kind, what, place, measured in found
                if (kind, what) == (structure, quantity)
            ]
            distance, measured = min(near, default=(math.inf, math.nan))
            error = measured - value if distance <= MATCH_MM else math.nan
            yield {
                "series": series,
                "structure": structure,
                "quantity": quantity,
                "error": error,
                "pixels": error / pixel_mm,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, help="as many patients instead of the parameters'")
    parser.add_argument("--seed", type=int, help="other patients than the parameters'")
    parser.add_argument("--worst", type=int, default=5, help="how many of the largest errors to list")
    parser.add_argument("--predictions", type=Path, help="masks of test patients instead of synthetic references")
    parser.add_argument("--raw-dir", type=Path, help="their scans, in SPIDER's layout")
    arguments = parser.parse_args()
    if arguments.predictions:
        table = pd.DataFrame(errors_of_predictions(SeriesStore(arguments.predictions), arguments.raw_dir))
        print(f"{table['series'].nunique()} series of test patients, errors in mm\n")
        print(summary(table, ["structure", "quantity"]).to_string())
        return
    chosen = settings(arguments.patients, arguments.seed)
    plans = phantom.plan_cohort(chosen)
    table = pd.DataFrame(errors(plans, chosen))
    pixels_mm = [max(plan.spacing_mm[1:]) for plan in plans]
    print(f"{len(plans)} series of {chosen['patients']} patients, seed {chosen['seed']}")
    print(f"pixels of {min(pixels_mm):.2f} to {max(pixels_mm):.2f} mm; errors in mm, of the lordosis in degrees\n")
    print(summary(table, ["structure", "quantity"]).to_string(), "\n")
    print(summary(table[table["structure"] != "spine"], ["sequence"]).to_string(), "\n")
    print("largest errors, in pixels")
    worst = table.loc[table["pixels"].abs().nlargest(arguments.worst).index]
    print(worst[["series", "structure", "number", "quantity", "error", "pixels"]].round(3).to_string(index=False), "\n")
    print("not measured")
    print(table[table["error"].isna()].groupby("note").size().to_string(), "\n")
    seconds = seconds_of_a_large_scan(plans[0], chosen)
    kept = "kept" if seconds < LIMIT_S else "EXCEEDED"
    print(f"{' x '.join(map(str, LARGE))}: {seconds:.2f} s   limit {LIMIT_S:g}: {kept}")


if __name__ == "__main__":
    main()
