"""Speed of APTA at the authors' 512 x 640: against the tests' pixel-by-pixel walk and the 11 s of the authors' loops.

    python benchmarks/apta.py [--raw-dir DIR] [--slices 8]

The slices are those of a synthetic series, or of the first mask below DIR/masks (SPIDER's layout), taken from its
middle. Noise is the worst case: every pixel lies at a border. Times are CPU seconds a slice, the best of several
rounds. The walk runs once, and its result is compared pixel for pixel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from lumbarflow import phantom
from lumbarflow.apta import apta
from lumbarflow.imaging import LabelMap, read_volume, split_volume_name, to_sagittal

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 640, 512
PUBLISHED_SECONDS = 11.0  # of CPU a slice, the authors' own loops
ROUNDS = 10


def label_ids(raw_dir: Path | None, slices: int) -> np.ndarray:
    """Integers (slices, ROWS, COLUMNS): the middle slices of one series, enlarged by nearest neighbour."""
    if raw_dir is None:
        settings = yaml.safe_load((ROOT / "conf/base/parameters_synthesize.yml").read_text())["synthesize"]
        plan = next(plan for plan in phantom.plan_cohort(settings) if plan.size[0] >= slices)
        _, mask = phantom.render(plan, settings)
    else:
        path = next(path for path in sorted((raw_dir / "masks").iterdir()) if split_volume_name(path.name)[1])
        mask = read_volume(path, LabelMap)
    ids = to_sagittal(mask)[0].array
    first = max(0, (len(ids) - slices) // 2)
    rows, columns = (np.arange(size) * old // size for size, old in zip((ROWS, COLUMNS), ids.shape[1:], strict=True))
    return np.ascontiguousarray(ids[first : first + slices, rows[:, None], columns])


def seconds_a_slice(ids: np.ndarray, rounds: int = ROUNDS) -> float:
    best = np.inf
    for _ in range(rounds):
        start = time.process_time()
        apta(ids)
        best = min(best, time.process_time() - start)
    return best / len(ids)


def main() -> None:
    sys.path.append(str(ROOT / "tests"))
    from test_apta import apta_pixel_by_pixel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw-dir", type=Path, help="folder in SPIDER's layout; without it, a synthetic series")
    parser.add_argument("--slices", type=int, default=8)
    arguments = parser.parse_args()
    ids = label_ids(arguments.raw_dir, arguments.slices)
    seconds = seconds_a_slice(ids)
    noise = seconds_a_slice(np.random.default_rng(0).choice(np.unique(ids), (2, ROWS, COLUMNS)), rounds=2)

    middle = ids[len(ids) // 2]
    start = time.process_time()
    walked = apta_pixel_by_pixel(middle)
    walk = time.process_time() - start
    different = int(np.count_nonzero(apta(middle[None])[0] != walked))

    print(f"{len(ids)} slices of {COLUMNS} x {ROWS} from {arguments.raw_dir or 'a synthetic series'}")
    for name, value in (("APTA", seconds), ("APTA, noise", noise), ("pixel by pixel", walk)):
        print(f"{name:15} {value * 1000:9.2f} ms a slice, 1 / {PUBLISHED_SECONDS / value:.0f} of the published 11 s")
    print(f"{walk / seconds:.0f} times faster than pixel by pixel, {different} pixels differ from it")


if __name__ == "__main__":
    main()
