"""Series per minute of ingest and preprocess, one after the other and side by side, and of a plain script.

    python benchmarks/preparation.py [--series 48] [--workers 2] [--backend loky] [--rounds 3] [--raw-dir DIR]

The plain script reads, turns, normalises and resizes too, checks nothing, keeps nothing that native grids, figures or
the next run need, and writes one compressed .npz per slice. Synthetic scans of about 640 x 500 serve as input, a few of
them under many names; `--raw-dir` names real ones in the SPIDER layout. The ways take turns; shown are the fastest and
the median round, the start of the processes included, and the processor's seconds of the fastest: where these are
equal, idle cores share the work evenly. What else the machine does takes more from two processes than from one.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from joblib.externals.loky import get_reusable_executor

from lumbarflow import parallel, phantom
from lumbarflow.cohort import Scan, ingest_scan
from lumbarflow.imaging import LabelMap, read_volume, to_sagittal, write_volume
from lumbarflow.labels import LabelTable
from lumbarflow.parallel import Workers
from lumbarflow.preparation import prepare_series
from lumbarflow.store import SeriesStore, Work

CONF = Path(__file__).parents[1] / "conf/base"
DISTINCT = 3


def parameters() -> dict:
    merged: dict = {}
    for path in sorted(CONF.glob("parameters_*.yml")):
        merged |= yaml.safe_load(path.read_text())
    return merged


def synthesize(folder: Path, settings: dict, count: int) -> None:
    options = settings["synthesize"] | {
        "patients": max(DISTINCT, 3),
        "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0},
        "matrix": {"rows": [640, 640], "anisotropy": 0.1},
    }
    pairs = [phantom.render(plan, options) for plan in phantom.plan_cohort(options)[:DISTINCT]]
    for number in range(count):
        for kind, volume in zip(("images", "masks"), pairs[number % DISTINCT], strict=True):
            write_volume(volume, folder / kind / f"{number}_t2.mha")


def ours(raw: Path, names: list[str], folder: Path, settings: dict, workers: Workers) -> None:
    table = LabelTable(settings["labels"]["table"])
    checks = table, settings["ingest"]["tolerances"], settings["preprocess"]["percentiles"]
    series, prepared = SeriesStore(folder / "series"), SeriesStore(folder / "prepared")
    work = {}
    for name in names:
        scan = Scan(Path(name).stem, Path(name).stem, "t2", name, name, None)
        load = partial(read_volume, raw / "images" / name), partial(read_volume, raw / "masks" / name, LabelMap)
        work[scan.series] = Work("", partial(ingest_scan, scan, *load, *checks))
    series.update(work, "ingest", workers=workers)

    def prepare(name: str) -> dict:
        return prepare_series(
            series.volume(name, "image.mha"), series.label_map(name, "labels.mha"), settings["preprocess"]
        )

    accepted = [name for name, record in series.records().items() if record["outcome"] == "accepted"]
    prepared.update({name: Work("", partial(prepare, name)) for name in accepted}, "preprocess", workers=workers)


def plain(raw: Path, names: list[str], folder: Path, settings: dict) -> None:
    """As people write it: a loop over files and slices, a file for each."""
    from scipy.ndimage import zoom

    folder.mkdir()
    table, size = LabelTable(settings["labels"]["table"]), settings["preprocess"]["size"]
    for name in names:
        image, _ = to_sagittal(read_volume(raw / "images" / name))
        mask, _ = to_sagittal(read_volume(raw / "masks" / name, LabelMap))
        low, high = np.percentile(image.array, settings["preprocess"]["percentiles"])
        factors = [wanted / found for wanted, found in zip(size, image.array.shape[1:], strict=True)]
        classes = table.classes(mask.array)
        for index in range(len(image.array)):
            scaled = (np.clip(image.array[index], low, high) - low) / (high - low)
            np.savez_compressed(
                folder / f"{Path(name).stem}_{index:03d}.npz",
                image=zoom(scaled.astype(np.float32), factors, order=1).astype(np.float16),
                label=zoom(classes[index], factors, order=0),
            )


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def digest(folder: Path) -> str:
    found = hashlib.blake2b()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, default=48, help="how many synthetic series, or of the real ones at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backend", choices=parallel.BACKENDS, default="loky")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw-dir", type=Path, help="real scans: images/ and masks/ with equal file names")
    arguments = parser.parse_args()
    settings = parameters()
    ways = {
        "one after the other": partial(ours, workers=Workers(workers=1)),
        f"{arguments.workers} workers, {arguments.backend}": partial(
            ours, workers=Workers(arguments.backend, arguments.workers)
        ),
        "plain script, one .npz per slice": plain,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor = {way: [] for way in ways}
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        raw = arguments.raw_dir or Path(scratch, "raw")
        if arguments.raw_dir is None:
            synthesize(raw, settings, arguments.series)
        names = sorted(path.name for path in (raw / "images").iterdir())[: arguments.series]
        if not names:
            raise SystemExit(f"{raw}/images: no scans; expected volumes there and masks of the same names in masks/")
        for number in range(arguments.rounds):
            for way, prepare in ways.items():
                folder = Path(scratch, f"{number}-{len(seconds[way])}-{way[:3]}".replace(" ", "-"))
                start, spent = time.perf_counter(), processor_seconds()
                prepare(raw, names, folder, settings)
                seconds[way].append(time.perf_counter() - start)
                get_reusable_executor().shutdown(wait=True)  # those that have ended are counted
                parallel._Processes._used = -math.inf
                processor[way].append(processor_seconds() - spent)
                if prepare is not plain:
                    digests.add(digest(folder))
        print(f"{len(names)} series, {arguments.rounds} rounds; series per minute: fastest, median; processor seconds")
        for way, taken in seconds.items():
            rates = (60 * len(names) / duration for duration in (min(taken), statistics.median(taken)))
            print(f"{way:<34}" + "".join(f"{rate:>9.0f}" for rate in rates) + f"{min(processor[way]):>9.1f}")
        alone, together, _ = (min(taken) for taken in seconds.values())
        print(f"speed-up {alone / together:.2f}; files {'the same to the byte' if len(digests) == 1 else 'DIFFER'}")
    if len(digests) != 1:
        raise SystemExit("the same work has left different files")


if __name__ == "__main__":
    main()
