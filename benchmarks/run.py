"""Speed and memory of the stages that cost: slices per second and peak memory, each stage in a process of its own.

    python benchmarks/run.py [--size 256] [--series 6] [--steps 8]

Synthetic scans serve as input, so the figures can be compared between machines and commits. Absolute figures depend on
the machine and on what else it does: compare them within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
STAGES = ("synthesize", "ingest", "preprocess", "train", "predict")


def parameters() -> dict:
    merged: dict = {}
    for path in sorted((ROOT / "conf/base").glob("parameters_*.yml")):
        merged |= yaml.safe_load(path.read_text())
    return merged


def plans(settings: dict, series: int):
    from lumbarflow import phantom

    planned = phantom.plan_cohort(settings["synthesize"] | {"patients": series, "sequences": {"t2": 1.0}})
    return planned[:series]


def synthesize(folder: Path, settings: dict, arguments) -> tuple[int, float]:
    from lumbarflow import phantom
    from lumbarflow.imaging import write_volume

    start, slices = time.perf_counter(), 0
    for plan in plans(settings, arguments.series):
        image, mask = phantom.render(plan, settings["synthesize"])
        write_volume(image, folder / "images" / f"{plan.name}.mha")
        write_volume(mask, folder / "masks" / f"{plan.name}.mha")
        slices += plan.size[0]
    return slices, time.perf_counter() - start


def ingest(folder: Path, settings: dict, arguments) -> tuple[int, float]:
    from functools import partial

    from lumbarflow.cohort import Scan, ingest_scan
    from lumbarflow.imaging import LabelMap, read_volume
    from lumbarflow.labels import LabelTable
    from lumbarflow.store import SeriesStore, Work

    table, work = LabelTable(settings["labels"]["table"]), {}
    options = settings["ingest"]["tolerances"], settings["preprocess"]["percentiles"]
    for path in sorted((folder / "images").iterdir()):
        scan = Scan(path.stem, path.stem, "t2", path.name, path.name, None)
        load = partial(read_volume, path), partial(read_volume, folder / "masks" / path.name, LabelMap)
        work[path.stem] = Work("", partial(ingest_scan, scan, *load, table, *options))
    store = SeriesStore(folder / "series")
    start = time.perf_counter()
    store.update(work)
    seconds = time.perf_counter() - start
    return sum(record["n_slices"] for record in store.records().values()), seconds


def preprocess(folder: Path, settings: dict, arguments) -> tuple[int, float]:
    import pandas as pd

    from lumbarflow.files import write_json
    from lumbarflow.preparation import build_manifest, prepare_series
    from lumbarflow.store import SeriesStore, Work

    series, prepared = SeriesStore(folder / "series"), SeriesStore(folder / "model_input/series")
    options = settings["preprocess"] | {"size": [arguments.size] * 2}

    def work(name: str) -> Work:
        return Work(
            "", lambda: prepare_series(series.volume(name, "image.mha"), series.label_map(name, "labels.mha"), options)
        )

    start = time.perf_counter()
    prepared.update({name: work(name) for name in series.series()})
    seconds = time.perf_counter() - start
    records = prepared.records()
    index = pd.DataFrame(
        [
            {
                "series": name,
                "patient": name,
                "sequence": "t2",
                "synthetic": True,
                "image_digest": "",
                "mask_digest": "",
                "key": "",
            }
            for name in records
        ]
    )
    slices = pd.DataFrame(
        [
            {"series": name, "slice": i, "side": side, "kept": True}
            for name, record in records.items()
            for i in range(record["n_slices"])
            for side in ("train", "validation", "test")
        ]
    )
    options = {"preprocess": options, "split": {"method": "slice"}, "filter": {}, "labels": {}}
    write_json(folder / "model_input/manifest.json", build_manifest(index, slices, records, options))
    return int(slices["side"].eq("train").sum()), seconds


def train(folder: Path, settings: dict, arguments) -> tuple[int, float]:
    """Steps at steady state: the first epoch, which builds the graph, is not counted."""
    from lumbarflow.model_input import ModelInput
    from lumbarflow.training import fit

    sections = {name: settings[name] for name in ("model", "loss", "augmentation")}
    model_input = ModelInput.open(folder / "model_input")
    wanted = arguments.steps * settings["training"]["batch_size"]
    for side, most in (("train", wanted), ("validation", settings["training"]["batch_size"])):
        kept: dict[str, list[int]] = {}
        for series, index in model_input.slices(side)[:most]:
            kept.setdefault(series, []).append(index)
        model_input.manifest["sides"][side] = kept
    count = len(model_input.slices("train"))
    result = fit(model_input, sections | {"training": settings["training"] | {"epochs": 2}})
    return count, count / result.history[-1]["slices_per_second"]


def predict(folder: Path, settings: dict, arguments) -> tuple[int, float]:
    """From the raw intensities of a series to its labels on the native grid; the net is not trained.

    The peak of memory is that of the conversion to ONNX, which an evaluation needs too, and a pulled model does not.
    """
    from lumbarflow import models
    from lumbarflow.imaging import read_volume
    from lumbarflow.inference import Segmenter
    from lumbarflow.networks import for_inference

    options = settings["preprocess"] | {"size": [arguments.size] * 2} | settings["evaluation"]
    net = dict(settings["model"])
    model = models.build(net.pop("name"), options["size"], 1, 4, **net)
    segmenter = Segmenter(for_inference(model), options)
    volumes = [read_volume(path) for path in sorted((folder / "images").iterdir())]
    segmenter.segment(volumes[0])
    start = time.perf_counter()
    slices = 0
    for volume in volumes:
        segmenter.segment(volume)
        slices += min(volume.array.shape)
    return slices, time.perf_counter() - start


def run_stage(name: str, folder: Path, arguments) -> None:
    slices, seconds = globals()[name](folder, parameters(), arguments)
    # Anonymous memory would be fairer (mapped files count here too), but only Linux tells it, and not its peak.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"stage": name, "slices": slices, "seconds": seconds, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="rows and columns of the net's input")
    parser.add_argument("--series", type=int, default=6, help="synthetic series")
    parser.add_argument("--steps", type=int, default=8, help="training steps that are timed")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder, arguments)
        return
    print(
        f"{os.cpu_count()} cores, net input {arguments.size} x {arguments.size}, {arguments.series} series, "
        f"NumPy {np.__version__}"
    )
    print(f"{'stage':<12}{'slices':>8}{'seconds':>10}{'slices/s':>10}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
            command += [f"--{name}={getattr(arguments, name)}" for name in ("size", "series", "steps")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{stage} failed with exit code {done.returncode}; its message stands above")
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{stage:<12}{row['slices']:>8}{row['seconds']:>10.2f}{row['slices'] / row['seconds']:>10.1f}"
                f"{row['peak_mib']:>10.0f}"
            )


if __name__ == "__main__":
    main()
