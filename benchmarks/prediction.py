"""How long a scan takes from file to file, and where the time goes: 20 slices of 640 x 512, masks only, model loaded.

    python benchmarks/prediction.py [--size 256] [--rounds 5] [--model FILE.keras] [--whole]

Each stage, ONNX Runtime as in the product, Keras in float32 and in bfloat16, and batch sizes take turns.
Shown are the fastest and the median round: a scheduler may keep both threads on one core for a whole round, so the
fastest is what the hardware can do. An untrained net is unsure of every pixel, so that mapping back takes longest; a
trained one of any size may be named with --model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lumbarflow import models
from lumbarflow.backend import load_keras
from lumbarflow.imaging import LabelMap, Volume, read_volume, to_sagittal, write_volume
from lumbarflow.inference import Segmenter
from lumbarflow.intensity import normalisation_of
from lumbarflow.labels import CLASS_COUNT
from lumbarflow.networks import for_inference, load_model

CONF = Path(__file__).parents[1] / "conf/base"
SHAPE, SPACING = (20, 640, 512), (0.47, 0.47, 4.0)
BATCHES = (1, 2, 4, 20)  # besides 8
ONNX, KERAS = "ONNX Runtime", "Keras float32"
SAGITTAL = np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])


class Times:
    """Seconds of what takes turns, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def print(self) -> None:
        for name, seconds in self.seconds.items():
            print(f"{name:<52} {min(seconds):7.3f} s {statistics.median(seconds):7.3f} s")


def untrained(size: int, precision: str, weights: list[np.ndarray] | None = None) -> Any:
    settings = yaml.safe_load((CONF / "parameters_fit.yml").read_text())["model"]
    name = settings.pop("name")
    model = models.build(name, (size, size), 1, CLASS_COUNT, precision=precision, **settings)
    if weights is not None:
        model.set_weights(weights)
    return model


class Bench:
    """All stages of one scan, once a round."""

    def __init__(self, segmenters: dict[str, Segmenter], scan: Path, mask: Path):
        self.segmenters, self.scan, self.mask = segmenters, scan, mask
        self.times = Times()

    def whole(self, segmenter: Segmenter) -> None:
        write_volume(segmenter.segment(read_volume(self.scan)), self.mask)

    def file_to_file(self) -> None:
        for name, segmenter in self.segmenters.items():
            self.times(f"file to file, {name}", partial(self.whole, segmenter))

    def stages(self) -> None:
        times, ours = self.times, self.segmenters[ONNX]
        volume = times("  read", partial(read_volume, self.scan))
        sagittal, orientation = to_sagittal(volume)
        times(
            "  figures of the normalisation",
            lambda: normalisation_of(sagittal.array, ours.normalisation, ours.percentiles),
        )
        grid, inputs = ours._prepared(sagittal.array, SPACING[1::-1])
        inputs = times("  normalise and resample", partial(list, inputs))
        stacked = np.concatenate(inputs)
        found = {
            name: times(f"  net, {name}, batches of 8", lambda segmenter=segmenter: [*map(segmenter._forward, inputs)])
            for name, segmenter in self.segmenters.items()
        }
        planes = np.concatenate(found[ONNX])
        times("  map back and decide", lambda: [grid.foreground_to_native(p)[2].argmax(axis=-1) for p in planes])
        labels = LabelMap(orientation.restore(sagittal.array % CLASS_COUNT), *_grid(volume))
        times("  write", partial(write_volume, labels, self.mask))
        for size in BATCHES:
            batches = [stacked[start : start + size] for start in range(0, len(stacked), size)]
            times(f"  net, {ONNX}, batches of {size}", lambda batches=batches: [*map(ours._forward, batches)])


def _grid(volume: Volume) -> tuple[Any, ...]:
    return volume.spacing_mm, volume.origin_mm, volume.direction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--whole", action="store_true", help="file to file alone, by ONNX Runtime and Keras in float32")
    arguments = parser.parse_args()
    load_keras()
    weights = load_model(arguments.model).get_weights() if arguments.model else None
    nets = {f"Keras {name}": untrained(arguments.size, name, weights) for name in ("float32", "mixed_bfloat16")}
    nets = {ONNX: for_inference(nets[KERAS])} | ({KERAS: nets[KERAS]} if arguments.whole else nets)
    settings = yaml.safe_load((CONF / "parameters_preprocess.yml").read_text())["preprocess"]
    settings = {name: settings[name] for name in ("keep_aspect", "normalisation", "percentiles")}
    settings |= {"size": [arguments.size] * 2, "batch_size": 8}
    segmenters = {name: Segmenter(net, settings) for name, net in nets.items()}
    spacing = SPACING[1::-1]

    # Smooth noise in the dark, as a scan is: neither constant nor beyond compression.
    rng = np.random.default_rng(0)
    coarse = rng.integers(100, 900, (SHAPE[0], SHAPE[1] // 8, SHAPE[2] // 8)).repeat(8, axis=1).repeat(8, axis=2)
    voxels = (coarse + rng.integers(0, 50, SHAPE)).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        scan, mask = Path(folder, "scan.mha"), Path(folder, "mask.mha")
        write_volume(Volume(voxels, SPACING, (0.0, 0.0, 0.0), SAGITTAL), scan)

        prepared = np.concatenate(list(segmenters[ONNX]._prepared(voxels, spacing)[1]))
        for segmenter in segmenters.values():  # the first calls build the graphs
            segmenter.labels(voxels, spacing)
        one, other = (segmenters[name].predict(prepared) for name in (ONNX, KERAS))
        print(f"ONNX Runtime's probabilities differ by {np.abs(one - other).max():.1g} at most from Keras's")

        bench = Bench(segmenters, scan, mask)
        for _ in range(arguments.rounds):
            bench.file_to_file()
            if not arguments.whole:
                bench.stages()
    print(f"\n{SHAPE[0]} slices of {SHAPE[1]} x {SHAPE[2]} by a net of {arguments.size} x {arguments.size}")
    print(f"{'':<52} {'fastest':>9} {'median':>9}")
    bench.times.print()
    what = "file to file, {}" if arguments.whole else "  net, {}, batches of 8"
    ours, theirs = (bench.times.seconds[what.format(name)] for name in (ONNX, KERAS))
    ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
    print(f"{KERAS} / {ONNX}: fastest {min(theirs) / min(ours):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
