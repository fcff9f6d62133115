"""Instance labels from class labels: how many vertebrae and discs are found, against what is known, and how fast.

    python benchmarks/instances.py [--raw-dir DIR]

Without DIR, a synthetic cohort of conf/base/parameters_synthesize.yml, every patient with every sequence, whose
instances are known: counts and Dice per instance. With DIR (SPIDER's layout), the masks
found there, reduced to their classes: counts against `num_vertebrae` and `num_discs` of DIR/overview.csv, and Dice
against the masks' own numbers. Those of a rebuilt data set may be approximate: then only the counts mean something.
Seconds are the processor's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from lumbarflow import phantom
from lumbarflow.imaging import LabelMap, read_volume, split_volume_name, to_sagittal
from lumbarflow.instances import count_instances, label_instances
from lumbarflow.labels import CANAL_ID, DISC_OFFSET, PARTIAL_OFFSET, LabelTable

CONF = Path(__file__).parents[1] / "conf/base"


@dataclass(frozen=True)
class Case:
    name: str
    mask: LabelMap
    known: tuple[int, int]  # vertebrae, discs


def synthetic_cases() -> Iterator[Case]:
    settings = yaml.safe_load((CONF / "parameters_synthesize.yml").read_text())["synthesize"]
    settings |= {"sequences": dict.fromkeys(phantom.SEQUENCES, 1.0)}
    for kind in settings["acquisition"].values():
        kind["samples"] = 1  # of the image only
    for plan in phantom.plan_cohort(settings):
        mask = phantom.render(plan, settings)[1]
        yield Case(plan.name, mask, count_instances(whole_ids(mask.array)))


def real_cases(folder: Path) -> Iterator[Case]:
    import pandas as pd

    overview = pd.read_csv(folder / "overview.csv", index_col="new_file_name")
    for path in sorted((folder / "masks").iterdir()):
        name, suffix = split_volume_name(path.name)
        if suffix and name in overview.index:
            row = overview.loc[name]
            yield Case(name, read_volume(path, LabelMap), (int(row["num_vertebrae"]), int(row["num_discs"])))


def whole_ids(ids: np.ndarray) -> np.ndarray:
    """Partly visible vertebrae under their own number."""
    return np.where((ids > PARTIAL_OFFSET) & (ids < DISC_OFFSET), ids - PARTIAL_OFFSET, ids).astype(np.uint8)


def instance_dice(reference: np.ndarray, found: np.ndarray) -> dict[int, float]:
    """Dice of every id but the canal's that either array holds."""
    both = np.bincount(reference.ravel().astype(np.int64) * 256 + found.ravel(), minlength=65536).reshape(256, 256)
    sizes = both.sum(axis=0) + both.sum(axis=1)
    return {i: 2 * both[i, i] / sizes[i] for i in np.flatnonzero(sizes).tolist() if i not in (0, CANAL_ID)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw-dir", type=Path, help="folder in SPIDER's layout; without it, a synthetic cohort")
    folder = parser.parse_args().raw_dir
    table = LabelTable(yaml.safe_load((CONF / "parameters_ingest.yml").read_text())["labels"]["table"])
    right, seconds, scores = [], [], {"vertebrae": [], "discs": []}
    for case in synthetic_cases() if folder is None else real_cases(folder):
        mask, _ = to_sagittal(case.mask)
        classes, spacing = table.classes(mask.array), mask.spacing_mm[::-1]
        start = time.process_time()
        found = label_instances(classes, spacing)
        seconds.append(time.process_time() - start)
        if not np.array_equal(table.classes(found), classes):
            raise SystemExit(f"{case.name}: a voxel changed its class")
        counts = count_instances(found)
        right.append(np.equal(counts, case.known))
        dice = instance_dice(whole_ids(mask.array), found)
        for kind, values in scores.items():
            values += [score for i, score in dice.items() if (i > DISC_OFFSET) == (kind == "discs")]
        worst = min(dice, key=dice.get)
        miss = "" if right[-1].all() else f", known {case.known[0]} and {case.known[1]}"
        print(
            f"{case.name:14} {'x'.join(map(str, classes.shape)):>11} {seconds[-1]:5.2f} s, {counts[0]} vertebrae, "
            f"{counts[1]} discs{miss}; lowest Dice {dice[worst]:.3f} ({worst})"
        )
    for kind, agree in zip(scores, np.transpose(right), strict=True):
        values = scores[kind]
        print(
            f"{kind:10} counted as known in {agree.sum()} of {len(agree)}; Dice of {len(values)}: "
            f"mean {np.mean(values):.4f}, median {np.median(values):.4f}, lowest {min(values):.3f}"
        )
    print(f"{np.mean(seconds):.2f} s a scan, {max(seconds):.2f} s at most")


if __name__ == "__main__":
    main()
