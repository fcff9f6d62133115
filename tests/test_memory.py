"""Anonymous memory of preparation, evaluation and the paper's protocol does not grow with the number of series."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
import numpy as np
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume
from lumbarflow.preparation import prepare_series
from lumbarflow.store import SeriesStore, Work

root, count = Path(sys.argv[1]), int(sys.argv[2])
settings = {"size": [64, 64], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0.5, 99.5]}
peak = 0

def anonymous_kib():
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])

def make(seed):
    global peak
    rng = np.random.default_rng(seed)
    grid = ((0.7, 0.7, 4.0), (0, 0, 0), SAGITTAL_AXES[::-1].T)
    # 3 MiB of image a series: twenty of them kept would be seen at once.
    image = Volume(rng.integers(0, 1000, (12, 384, 352)).astype(np.int16), *grid)
    labels = LabelMap(rng.integers(0, 4, image.array.shape).astype(np.uint8), *grid)
    files = prepare_series(image, labels, settings)
    peak = max(peak, anonymous_kib())
    return files

store = SeriesStore(root)
store.update({f"{i}_t2": Work(str(i), lambda i=i: make(i)) for i in range(count)})
for series in store.series():
    for name in ("images.npy", "labels.npy"):
        assert store.array(series, name).sum() != 0
        peak = max(peak, anonymous_kib())
print(peak)
"""


EVALUATION = """
import sys
from functools import partial
from pathlib import Path
import numpy as np
from lumbarflow.evaluation import Case, evaluate_cases

settings = {
    "batch_size": 8,
    "metrics": {"nsd_tolerances_mm": [1.0], "detection_iou": 0.1, "minimum_component_mm3": 100.0},
    "intervals": {"samples": 100, "seed": 0},
}
peak = 0

def read(i):
    global peak
    text = Path("/proc/self/status").read_text()
    peak = max(peak, int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]))
    # 2.7 MiB of classes and a histogram of distances of 1 MiB a case.
    reference = np.zeros((20, 288, 256), np.uint8)
    reference[:, 20 + i : 60 + i, 40:90], reference[:, 150:250, 120:140], reference[:, 70:90, 40:90] = 1, 2, 3
    return Case(str(i), str(i), reference, np.roll(reference, 100, axis=2), (4.0, 1.0, 1.0), np.arange(20))

evaluated = evaluate_cases({str(i): partial(read, i) for i in range(int(sys.argv[2]))}, settings)
assert evaluated.by_case["series"].nunique() == int(sys.argv[2])
print(peak)
"""


PAPER = """
import sys
from pathlib import Path
import numpy as np
from lumbarflow import paper_protocol

settings = {"dice": "soft", "nsd_tolerance_pixels": 1.0, "stacked": True, "stack_seed": 0}
# A window is 128 of these slices here, 512 with what lies around it.
reference = np.zeros((8, 64, 64), np.uint8)
reference[:, 10:50, 20:30], reference[:, 10:50, 35:40], reference[:, 28:34, 20:30] = 1, 2, 3
probabilities = np.eye(4, dtype=np.float32)[np.roll(reference, 1, axis=2)]
peak = 0

nearest = paper_protocol._nearest
def watched(*points):
    global peak
    found = nearest(*points)
    text = Path("/proc/self/status").read_text()
    peak = max(peak, int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]))
    return found
paper_protocol._nearest = watched

table = paper_protocol.paper_scores(((reference, probabilities) for _ in range(int(sys.argv[2]) // 8)), settings)
assert table["n_slices"].eq(int(sys.argv[2])).all()
print(peak)
"""


LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory"
)


@LINUX
def test_evaluating_six_times_the_cases_takes_the_same_memory(tmp_path):
    def peak(count: int) -> int:
        arguments = [sys.executable, "-c", EVALUATION, str(tmp_path), str(count)]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=240).stdout)

    few, many = peak(3), peak(18)
    assert many < 1.1 * few


@LINUX
def test_preparing_ten_times_the_series_takes_the_same_memory(tmp_path):
    def peak(count: int) -> int:
        arguments = [sys.executable, "-c", CODE, str(tmp_path / str(count)), str(count)]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120).stdout)

    few, many = peak(3), peak(30)
    assert many < 1.1 * few


@LINUX
def test_the_papers_measures_of_three_times_the_slices_take_the_same_memory(tmp_path):
    def peak(count: int) -> int:
        arguments = [sys.executable, "-c", PAPER, str(tmp_path), str(count)]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=240).stdout)

    few, many = peak(800), peak(2400)
    assert many < 1.1 * few


def test_tables_give_their_memory_back():
    code = "import lumbarflow, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "system"
