"""How fast the training is, against a plain script in the authors' manner, and what its input, start and memory cost.

    python benchmarks/training.py [--size 256] [--batch 8] [--steps 6] [--rounds 3] [--options]

Every figure is of a process of its own, and ratios are of neighbours in time: the stages take turns, and the median
over the rounds is shown. Content does not matter to speed, so slices are made up. On a GPU or another backend, run it
with KERAS_BACKEND set as in training.

- plain: one-hot float32 targets, arrays in memory, float32, no augmentation, `model.fit`, the same net.
- stream: `lumbarflow.training.fit` as configured in conf/base/parameters_fit.yml, augmentation on.
- cached: the same on one batch that is prepared once; what the stream takes longer is its input and augmentation.
- input: the processor's time for reading and augmenting a batch, without any net; steadier than that difference, where
  the machine does other work too.
- memory: peak anonymous memory (RssAnon) of the stream, with a few series and with ten times as many, at 64 x 64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from memory import Watch, is_told

ROOT = Path(__file__).parents[1]
SLICES_PER_SERIES = 20


def options(batch: int) -> dict[str, tuple[dict[str, str], dict]]:
    """What may be set otherwise, each tried alone: environment variables, and settings of the section training."""
    return {
        "XLA": ({}, {"jit_compile": True}),
        "batches twice as large": ({}, {"batch_size": 2 * batch}),
        "TensorFlow's own convolutions (oneDNN off)": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, {}),
        "one inter-op thread": ({"TF_NUM_INTEROP_THREADS": "1"}, {}),
        "float32": ({}, {"precision": "float32"}),
        "mixed_bfloat16": ({}, {"precision": "mixed_bfloat16"}),
    }


def write_model_input(folder: Path, series: int, size: int) -> None:
    """Series of made-up slices to train, and one slice to validate; most of each file is never in memory."""
    from lumbarflow.files import write_json
    from lumbarflow.model_input import FORMAT_VERSION

    rng = np.random.default_rng(0)
    sides = {"train": {}, "validation": {}, "test": {}}
    facts = {}
    for number in range(series + 1):
        name, count = f"{number}_t2", SLICES_PER_SERIES if number < series else 1
        path = folder / "series" / name
        path.mkdir(parents=True)
        np.save(path / "images.npy", rng.standard_normal((count, size, size), np.float32).astype(np.float16))
        np.save(path / "labels.npy", np.repeat(rng.integers(0, 4, (count, size, size // 8), np.uint8), 8, axis=2))
        sides["train" if number < series else "validation"][name] = list(range(count))
        facts[name] = {"n_slices": count}
    manifest = {"format_version": FORMAT_VERSION, "size": [size, size], "series": facts, "sides": sides}
    write_json(folder / "manifest.json", manifest | {"classes": {str(k): str(k) for k in range(4)}})


def settings(arguments) -> dict:
    read = yaml.safe_load((ROOT / "conf/base/parameters_fit.yml").read_text())
    read["training"] |= {"epochs": 2, "batch_size": arguments.batch} | json.loads(arguments.training)
    return read


def plain(folder: Path, arguments) -> dict:
    started = time.monotonic()
    from lumbarflow import models, training
    from lumbarflow.backend import describe_hardware, load_keras
    from lumbarflow.model_input import ModelInput

    keras = load_keras()
    ops = keras.ops
    model_input, chosen = ModelInput.open(folder), settings(arguments)
    where = model_input.slices("train")[: arguments.steps * arguments.batch]
    images = np.stack([model_input.image(*one) for one in where]).astype(np.float32)[..., None]
    targets = np.eye(4, dtype=np.float32)[np.stack([model_input.label(*one) for one in where])]

    def loss(y_true, y_pred):
        y_pred = ops.clip(y_pred, 1e-7, 1 - 1e-7)
        focal = ops.mean(ops.sum(-y_true * ops.power(1 - y_pred, 4.0) * ops.log(y_pred), axis=-1))
        dice = (2 * ops.sum(y_true * y_pred) + 1) / (ops.sum(y_true) + ops.sum(y_pred) + 1)
        return 0.6 * focal + 0.4 * (1 - dice)

    net = dict(chosen["model"])
    model = models.build(net.pop("name"), model_input.size, 1, 4, precision="float32", **net)
    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=training._jit_compile(None, describe_hardware()))
    steps = Steps(started)
    model.fit(images, targets, batch_size=arguments.batch, epochs=2, verbose=0, callbacks=[steps.callback(keras)])
    return steps.figures(arguments.batch)


class Steps:
    """Times of the steps' ends; the first step, which builds the graph, is the start-up."""

    def __init__(self, started: float):
        self.started, self.ends = started, []

    def callback(self, keras):
        ends = self.ends

        class Clock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                float(logs["loss"])  # waits for the step
                ends.append(time.monotonic())

        return Clock()

    def figures(self, batch: int) -> dict:
        steady = np.diff(self.ends[1:])
        return {"startup": self.ends[0] - self.started, "slices_per_second": batch / float(np.median(steady))}


def stream(folder: Path, arguments, cached: bool = False) -> dict:
    started = time.monotonic()
    from lumbarflow import batches, epochs, training
    from lumbarflow.model_input import ModelInput

    model_input, chosen = ModelInput.open(folder), settings(arguments)
    batch = chosen["training"]["batch_size"]
    wanted = arguments.steps * batch
    kept: dict[str, list[int]] = {}
    for series, index in model_input.slices("train")[:wanted]:
        kept.setdefault(series, []).append(index)
    model_input.manifest["sides"]["train"] = kept
    if cached:
        read, once = batches.SliceBatches.__getitem__, {}

        def take(self, index):
            if not self.shuffle:
                return read(self, index)
            if not once:
                once[0] = read(self, 0)
            return once[0]

        batches.SliceBatches.__getitem__ = take
    steps = Steps(started)
    go_on = epochs.Epochs.on_train_batch_end

    def clock(self, number, logs=None):
        float(logs["loss"])
        steps.ends.append(time.monotonic())
        go_on(self, number, logs)

    epochs.Epochs.on_train_batch_end = clock
    result = training.fit(model_input, chosen)
    return steps.figures(batch) | {"precision": result.hardware["precision"], "hardware": result.hardware}


def read(folder: Path, arguments) -> dict:
    """Seconds of processor time a batch, all threads together."""
    from lumbarflow.augmentation import AugmentationSettings
    from lumbarflow.batches import SliceBatches
    from lumbarflow.model_input import ModelInput

    chosen = settings(arguments)
    augmentation = AugmentationSettings(**chosen["augmentation"])
    batch = chosen["training"]["batch_size"]
    batches = SliceBatches(ModelInput.open(folder), "train", batch, seed=7, shuffle=True, augmentation=augmentation)
    batches[0]  # with what is read or computed once
    started = time.process_time()
    for number in range(1, arguments.steps + 1):
        batches[number]
    return {"seconds": (time.process_time() - started) / arguments.steps}


def memory(folder: Path, arguments) -> dict:
    """Peak RssAnon in MiB while two epochs are trained."""
    from lumbarflow import training
    from lumbarflow.model_input import ModelInput

    with Watch() as watch:
        chosen = settings(arguments)
        chosen["model"] |= {
            "encoder_widths": [8, 8, 16, 16, 32, 32], "decoder_widths": [16, 16, 8, 8]
        }  # fmt: skip
        training.fit(ModelInput.open(folder), chosen)
    return {"peak_mib": watch.peak_mib()[0]}


STAGES = {
    "plain": plain,
    "stream": stream,
    "cached": lambda folder, arguments: stream(folder, arguments, cached=True),
    "input": read,
    "memory": memory,
}


def run(stage: str, folder: Path, arguments, environment=None, training=None) -> dict:
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("size", "batch", "steps")]
    command += ["--training", json.dumps(training or {})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{stage} failed with exit code {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="rows and columns of the net's input")
    parser.add_argument("--batch", type=int, default=8, help="slices per step")
    parser.add_argument("--steps", type=int, default=6, help="steps an epoch, of two")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the stages take")
    parser.add_argument("--options", action="store_true", help="also try what could be set otherwise, each alone")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--training", default="{}", help="JSON: changes of the section training")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](arguments.folder, arguments)))
        return
    training = json.loads(arguments.training)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model_input"
        write_model_input(folder, -(-2 * arguments.steps * arguments.batch // SLICES_PER_SERIES), arguments.size)
        rounds: dict[str, list[dict]] = {"plain": [], "stream": [], "cached": [], "input": []}
        for _ in range(arguments.rounds):
            for stage, rows in rounds.items():
                rows.append(run(stage, folder, arguments, training=training if stage != "plain" else None))
        hardware = rounds["stream"][0]["hardware"]
        print(
            f"{hardware['backend']}, {hardware['processor']}, {hardware['cores']} cores, "
            f"GPUs {hardware['gpus'] or 'none'}; {arguments.size} x {arguments.size}, batch {arguments.batch}, "
            f"stream in {hardware['precision']}"
        )
        read_in = [row["seconds"] for row in rounds.pop("input")]
        rate = {stage: [row["slices_per_second"] for row in rows] for stage, rows in rounds.items()}
        for stage, rows in rounds.items():
            print(
                f"{stage:<10}{statistics.median(rate[stage]):8.2f} slices/s"
                f"{statistics.median(row['startup'] for row in rows):8.1f} s until the first step has ended"
            )
        faster = [ours / theirs for ours, theirs in zip(rate["stream"], rate["plain"], strict=True)]
        share = [1 - ours / alone for ours, alone in zip(rate["stream"], rate["cached"], strict=True)]
        print(f"stream / plain: {statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})")
        print(f"input's share of the step: {statistics.median(share):.1%} ({min(share):.1%} to {max(share):.1%})")
        batch = settings(arguments)["training"]["batch_size"]
        seconds = batch / statistics.median(rate["stream"])
        print(
            f"input alone: {1000 * statistics.median(read_in):.1f} ms of processor time a batch "
            f"({1000 * min(read_in):.1f} to {1000 * max(read_in):.1f}), a step takes {1000 * seconds:.0f} ms"
        )
        if arguments.options:
            for name, (environment, changes) in options(arguments.batch).items():
                ratios = []
                for _ in range(arguments.rounds):
                    base = run("stream", folder, arguments, training=training)
                    other = run("stream", folder, arguments, environment, training | changes)
                    ratios.append(other["slices_per_second"] / base["slices_per_second"])
                print(f"{name}: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
        if not arguments.skip_memory and is_told():
            small = argparse.Namespace(**vars(arguments) | {"size": 64})
            peaks = []
            for series in (3, 30):
                where = Path(temporary) / f"memory_{series}"
                write_model_input(where, series, 64)
                peaks.append(run("memory", where, small)["peak_mib"])
            print(f"peak anonymous memory: {peaks[0]:.0f} MiB with 3 series, {peaks[1] / peaks[0]:.3f} times with 30")


if __name__ == "__main__":
    main()
