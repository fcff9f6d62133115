"""Time and peak anonymous memory of the pipelines with 10, 100 and 1000 series, and how both grow.

    python benchmarks/scale.py [--series 10 100 1000] [--workers 1] [--nodes] [--until evaluate]
    python benchmarks/scale.py --raw-dir DIR [--size 256]

The pipelines themselves, with the whole catalog, each in a process of its own: synthesize (one series a patient, about
7 slices of 64 x 48), ingest, preprocess, fit (one epoch of a small net at 64 x 64), evaluate. `start` is the time
before and after a pipeline's nodes: imports, configuration, MLflow. Memory is RssAnon, sampled every 20 ms: of the
pipeline's process, and of it together with its workers. With one worker there are no others.

Growth is told without what every run costs, such as building a graph: the exponent p is that of a + b * n ** p through
three counts, 1 for a time that grows linearly; where the first hundred series cost less than a run's start differs from
another's, as in fit, it says little, and slices a second say more. Memory is flat if a hundred times the series take
the same.

With `--raw-dir` real scans in the SPIDER layout are ingested and preprocessed as configured in conf/base, but for the
size: seconds and bytes per series of each layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from memory import Watch, is_told

ROOT = Path(__file__).parents[1]
STEPS = ("synthesize", "ingest", "preprocess", "fit", "evaluate")
SMALL = {
    "synthesize": {
        "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0},
        "matrix": {"rows": [64, 72]},
        "acquisition": {"thick": {"slices": [6, 8], "samples": 1}},
    },
    "preprocess": {"size": [64, 64]},
    "model": {
        "encoder_widths": [8, 8, 16, 16, 32, 32],
        "decoder_widths": [16, 16, 8, 8],
        "encoder_dropouts": [0] * 6,
        "decoder_dropouts": [0] * 4,
    },
    "training": {"precision": "float32", "epochs": 1},
}
# What lies where, in the order of the layers.
LAYERS = {
    "raw": "data/01_raw",
    "ingested series": "data/02_intermediate/series",
    "tables of ingest": "data/02_intermediate/*.parquet",
    "split and index of slices": "data/03_primary",
    "prepared series": "data/05_model_input/series",
    "manifest": "data/05_model_input/manifest.json",
    "predictions (of the test's series)": "data/07_model_output",
    "figures and tables": "data/08_reporting",
    "MLflow": "ml*",
}


def make_project(folder: Path, settings: dict, workers: int | str) -> None:
    """A copy of the configuration, the environment local holding what is other than in conf/base."""
    shutil.copytree(ROOT / "conf", folder / "conf")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "src").mkdir()
    local = folder / "conf/local"
    local.mkdir(exist_ok=True)
    (local / "parameters_scale.yml").write_text(yaml.safe_dump(settings))
    (local / "globals.yml").write_text(yaml.safe_dump({"parallel": {"backend": "loky", "workers": workers}}))


def run_pipeline(name: str, clock: Path, raw_dir: str | None, profile: Path | None) -> None:
    """In this process, as `kedro run` does; when each node began and ended goes to a file."""
    from kedro.framework.hooks import hook_impl
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    from lumbarflow import settings

    times: dict[str, list[float]] = {}

    class Clock:
        """A node's inputs are loaded before it, and stores do their work when they are saved, after it."""

        @hook_impl
        def before_dataset_loaded(self, node):
            times.setdefault(node.func.__name__, [time.monotonic()] * 2)

        @hook_impl
        def after_dataset_saved(self, node):
            times[node.func.__name__][1] = time.monotonic()

    settings.HOOKS = (*settings.HOOKS, Clock())
    bootstrap_project(Path.cwd())
    parameters = {"raw_dir": raw_dir} if raw_dir else {}
    with KedroSession.create(project_path=Path.cwd(), runtime_params=parameters) as session:
        if profile is None:
            session.run(pipeline_names=[name])
        else:
            import cProfile

            with cProfile.Profile() as profiler:
                session.run(pipeline_names=[name])
            profiler.dump_stats(profile)
    clock.write_text(json.dumps(times))


def measure(name: str, project: Path, arguments) -> dict:
    """Seconds and peaks of a pipeline in a process of its own, whole and by node."""
    clock, log = project / f"{name}.json", project / f"{name}.log"
    command = [sys.executable, str(Path(__file__).absolute()), "--step", name, "--clock", str(clock)]
    command += ["--raw-dir", str(arguments.raw_dir.absolute())] if arguments.raw_dir else []
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        command += ["--profile", str((arguments.profile / f"{name}.prof").absolute())]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    start = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=project, stdout=output, stderr=subprocess.STDOUT, env=environment)
        with Watch(process.pid, seconds_between=0.02) as watch:
            code = process.wait()
    whole = time.monotonic() - start
    if code:
        raise SystemExit(f"{log.read_text()[-3000:]}\n{name} failed with exit code {code}; its log stands above")
    nodes = {node: tuple(times) for node, times in json.loads(clock.read_text()).items()}
    first, last = min(begin for begin, _ in nodes.values()), max(end for _, end in nodes.values())
    return {
        "start": whole - (last - first),
        # A pipeline's shortest nodes end between two samples.
        "nodes": {
            node: {"seconds": end - begin, "peaks": watch.peak_mib(begin - 0.05, end + 0.05)}
            for node, (begin, end) in nodes.items()
        },
        "seconds": last - first,
        "peaks": watch.peak_mib(),
    }


def exponent(counts: list[int], seconds: list[float]) -> float:
    """p of a + b * n ** p through the last three points; NaN where no more series ever took longer."""
    if len(counts) < 3:
        return float("nan")
    n, t = np.array(counts[-3:], float), seconds[-3:]
    if t[1] <= t[0] or t[2] <= t[1]:
        return float("nan")
    wanted, low, high = (t[2] - t[1]) / (t[1] - t[0]), -4.0, 4.0
    while high - low > 1e-6:
        middle = (low + high) / 2 or 1e-9
        powers = n**middle
        if (powers[2] - powers[1]) / (powers[1] - powers[0]) < wanted:
            low = middle
        else:
            high = middle
    return low


def bytes_in(project: Path, pattern: str) -> tuple[int, int]:
    """Bytes and number of the files below what the pattern matches."""
    found = [file for path in project.glob(pattern) for file in ([path] if path.is_file() else path.rglob("*"))]
    sizes = [file.stat().st_size for file in found if file.is_file() and file.name != ".gitkeep"]
    return sum(sizes), len(sizes)


def show_layers(project: Path, count: int) -> None:
    print(f"\n{'layer':<36}{'MiB':>10}{'bytes per series':>18}{'files':>8}")
    for layer, pattern in LAYERS.items():
        size, files = bytes_in(project, pattern)
        if size:
            print(f"{layer:<36}{size / 2**20:>10.2f}{size / count:>18,.0f}{files:>8}")


def show_growth(counts: list[int], figures: dict[int, dict[str, dict]], named: str) -> None:
    """A line for each step, or node: how its time grows, and its memory."""
    print(f"\n{named:<24}{'exponent of time':>18}{'memory':>10}{'KiB a series more':>20}")
    for name in figures[counts[0]]:
        rows = [figures[count][name] for count in counts]
        peaks = [row["peaks"][0] for row in rows]
        more = 1024 * (peaks[-1] - peaks[0]) / (counts[-1] - counts[0])
        p = exponent(counts, [row["seconds"] for row in rows])
        print(f"{name:<24}{p:>18.2f}{peaks[-1] / peaks[0] if peaks[0] else float('nan'):>9.2f}x{more:>20.1f}")


def synthetic(arguments) -> None:
    import pandas as pd  # not in the processes that are measured, where the project decides how tables are kept

    counts = sorted(arguments.series)
    figures: dict[int, dict[str, dict]] = {}
    rates: dict[int, float] = {}
    print(f"{'series':>7}  {'step':<12}{'seconds':>9}{'a series':>10}{'start':>8}{'peak MiB':>10}{'with workers':>14}")
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            project = Path(scratch)
            make_project(project, SMALL | {"synthesize": SMALL["synthesize"] | {"patients": count}}, arguments.workers)
            figures[count] = {}
            for step in STEPS[: STEPS.index(arguments.until) + 1]:
                row = figures[count][step] = measure(step, project, arguments)
                print(
                    f"{count:>7}  {step:<12}{row['seconds']:>9.2f}{row['seconds'] / count:>10.4f}{row['start']:>8.1f}"
                    f"{row['peaks'][0]:>10.0f}{row['peaks'][1]:>14.0f}",
                    flush=True,
                )
                for node, of in row["nodes"].items() if arguments.nodes else ():
                    print(f"{'':<11}{node:<24}{of['seconds']:>8.2f}{'':>17}{of['peaks'][0]:>10.0f}", flush=True)
            if "fit" in figures[count]:
                history = pd.read_csv(project / "data/08_reporting/training_history.csv")
                rates[count] = history["slices_per_second"].iloc[-1]
            if count == counts[-1]:
                show_layers(project, count)
    if len(counts) < 2:
        return
    if arguments.nodes:
        nodes = {count: {node: of for row in rows.values() for node, of in row["nodes"].items()}
                 for count, rows in figures.items()}  # fmt: skip
        show_growth(counts, nodes, "node")
    show_growth(counts, figures, "step")
    if rates:
        shown = ", ".join(f"{rate:.0f}" for rate in rates.values())
        print(f"fit, after its first step: {shown} slices a second; building the graph takes most of its time before")
    ours = [step for step in figures[counts[0]] if step != STEPS[0]]  # Making the series would hide the others.
    whole = [sum(figures[count][step]["seconds"] for step in ours) for count in counts]
    highest = [max(figures[count][step]["peaks"][0] for step in ours) for count in counts]
    seconds, numbers = ", ".join(f"{one:.0f} s" for one in whole), ", ".join(map(str, counts))
    print(
        f"\n{ours[0]} to {ours[-1]}: {seconds} with {numbers} series, exponent {exponent(counts, whole):.2f}; "
        f"highest peak {highest[-1]:.0f} MiB, {highest[-1] / highest[0]:.2f} times that of {counts[0]}"
    )


def real(arguments) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch)
        make_project(project, {"preprocess": {"size": [arguments.size] * 2}}, arguments.workers)
        rows = {step: measure(step, project, arguments) for step in ("ingest", "preprocess")}
        records = list(project.glob("data/02_intermediate/series/*/record.json"))
        count = len(records)
        slices = sum(json.loads(path.read_text()).get("n_slices", 0) for path in records)
        raw = sum(bytes_in(arguments.raw_dir, name)[0] for name in ("images", "masks"))
        print(f"{count} series, {slices} slices; raw {raw / count:,.0f} bytes a series")
        for step, row in rows.items():
            print(
                f"{step:<12}{row['seconds']:>9.2f} s, {row['seconds'] / count:.2f} a series, "
                f"{row['start']:.1f} to start; peak {row['peaks'][0]:.0f} MiB, with workers {row['peaks'][1]:.0f}"
            )
        show_layers(project, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, nargs="+", default=[10, 100, 1000], help="from 10 on")
    parser.add_argument("--workers", type=lambda text: text if text == "all" else int(text), default=1)
    parser.add_argument("--nodes", action="store_true", help="the nodes of each pipeline too")
    parser.add_argument("--until", choices=STEPS[1:], default=STEPS[-1], help="the last pipeline that is run")
    parser.add_argument("--profile", type=Path, help="folder for cProfile's figures of each pipeline; slows them")
    parser.add_argument("--raw-dir", type=Path, help="real scans: images/ and masks/ with equal file names")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of the net's input, with --raw-dir")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--clock", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_pipeline(arguments.step, arguments.clock, arguments.raw_dir and str(arguments.raw_dir), arguments.profile)
        return
    if not is_told():
        raise SystemExit("only Linux tells the anonymous memory of processes")
    if arguments.raw_dir:
        real(arguments)
    else:
        synthetic(arguments)


if __name__ == "__main__":
    main()
