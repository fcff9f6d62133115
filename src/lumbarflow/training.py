"""Training from a `model_input` folder, with Keras and NumPy alone; importing this imports Keras.

    result = fit(ModelInput.open("data/05_model_input"), settings)
    save_model(result.model, "model.keras")

and, on a machine that has nothing but those two,

    python -m lumbarflow.training --model-input DIR --output DIR --settings FILE

Slices are read from mapped files batch by batch (`lumbarflow.batches`). Given an output folder, a training that was
interrupted goes on from its last whole epoch (`lumbarflow.checkpoint`) and ends as if nothing had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumbarflow import models
from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.backend import describe_hardware, load_keras, set_seed
from lumbarflow.batches import SliceBatches
from lumbarflow.devices import Devices
from lumbarflow.epochs import BEST_MODEL, CHECKPOINT, Epochs, find_checkpoint
from lumbarflow.files import held_alone, read_json, write_atomically, write_json
from lumbarflow.losses import FocalDiceLoss, MeanIoU
from lumbarflow.model_input import ModelInput
from lumbarflow.networks import save_model, uncompiled
from lumbarflow.parameters import check_names
from lumbarflow.training_record import describe_training
from lumbarflow.training_settings import (
    SECTIONS,
    TrainingSettings,
    check_sections,
    section,
    setting_names,
    training_code,
    training_key,
)

keras = load_keras()
logger = logging.getLogger("lumbarflow.training")

DEFAULT_MODEL = "modified_unet"
RECORD, HISTORY = "training_record.json", "training_history.csv"
# Without a GPU, reading and augmenting are hardly any of the step (docs/reference/speed.md); a GPU's is short.
GPU_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What `fit` returns.

    Attributes:
        model: the net with the weights of the best epoch, uncompiled.
        history: one dict per epoch: epoch (from 1), loss, val_loss, val_mean_iou, learning_rate (at its end), seconds
            (validation included), slices_per_second (of training, without the first step, which may build the graph).
        best_epoch: the epoch, from 1, with the highest val_mean_iou.
        stopped_by: "epochs", "patience" or "max_minutes"; "adapted" for a model that is not trained by gradient. Its
            history has one entry, with learning rate 0 and the losses of the model as it came to be.
        hardware: `backend.describe_hardware()` of the run that ended it.
        startup_seconds: from the call to the end of the first step, with all building of graphs; of the last of the
            runs that it took.
    """

    model: keras.Model
    history: list[dict[str, float]]
    best_epoch: int
    stopped_by: str
    hardware: dict[str, Any]
    startup_seconds: float


def fit(
    model_input: ModelInput,
    settings: Mapping[str, Mapping[str, Any]],
    output: str | Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train a net on the side "train", choosing the best epoch by mean IoU on the side "validation".

    Called again with the same slices, settings and output folder it goes on after the last whole epoch, or returns what
    it has finished before; on a CPU the weights are those of a training that nothing interrupted.

    A model that is not trained by gradient (its registry entry has `adapt`) is shown the side "train" instead, without
    augmentation; of the section "training" it heeds batch_size and jit_compile only, and is made anew each time.

    Args:
        model_input: the prepared slices.
        settings: sections "model" (`name` and the keyword arguments of that net), "loss" (those of FocalDiceLoss),
            "training" (TrainingSettings) and "augmentation" (AugmentationSettings); what is left out has its default.
        output: folder of this training alone, for `best.keras`, rewritten at every better epoch, and `checkpoint.npz`.
        on_epoch: called after each epoch with its history entry; of epochs before an interruption too, at the start.
    Raises:
        ValueError: an unknown or impossible setting, a side without slices, a file of it that is missing or damaged, a
            size that the net cannot take, an output folder that holds another training.
        FloatingPointError: the loss is not finite; names the epoch and the batch's slices.
        MemoryError: the device has too little memory; names the settings to lower.
        OSError: a checkpoint cannot be written; names the last one that could. Or another process has the output
            folder.
    """
    with held_alone(output) if output is not None else contextlib.nullcontext():
        return _fit(model_input, settings, output, on_epoch)


def _fit(
    model_input: ModelInput,
    settings: Mapping[str, Mapping[str, Any]],
    output: str | Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> TrainingResult:
    started = time.monotonic()
    check_sections(settings)
    training = section(TrainingSettings, settings, "training")
    model_input.check_complete("train", "validation")
    augmentation = section(AugmentationSettings, settings, "augmentation")
    loss = section(FocalDiceLoss, settings, "loss", reserved=("name", "kwargs"))
    entry, values = _model_settings(settings)
    output = Path(output) if output is not None else None
    key, code = training_key(model_input.manifest, settings), training_code(entry.build)
    found = find_checkpoint(output, key, code) if output is not None and training.resume else None

    set_seed(training.seed)
    # What was begun in one precision goes on in it, whatever "auto" would be on this machine.
    precision = found.progress["hardware"]["precision"] if found is not None else training.precision
    hardware = describe_hardware(precision)
    devices = Devices(training.devices, training.batch_size)
    workers = training.workers if training.workers is not None else GPU_WORKERS if hardware["gpus"] else 0
    neighbours = training.neighbours if entry.adapt is None else 0
    validation = SliceBatches(model_input, "validation", training.batch_size, neighbours=neighbours, workers=workers)
    classes = len(model_input.manifest["classes"])
    with devices.building():
        model = entry.build(model_input.size, 2 * neighbours + 1, classes, precision=hardware["precision"], **values)
    outputs = len(model.outputs)
    train = SliceBatches(
        model_input,
        "train",
        training.batch_size,
        seed=training.seed,
        shuffle=True,
        augmentation=augmentation if augmentation.enabled else None,
        balanced=training.balanced_sampling,
        neighbours=neighbours,
        outputs=outputs,
        workers=workers,
    )
    logger.info(
        "training %s (%s parameters) on %d slices, validation on %d, of %d x %d pixels; %s, %s, %d cores, %s, %s%s",
        model.name,
        f"{model.count_params():,}",
        len(train.slices),
        len(validation.slices),
        *model_input.size,
        hardware["backend"],
        hardware["processor"],
        hardware["cores"],
        f"GPUs {hardware['gpus']}" if hardware["gpus"] else "no GPU",
        hardware["precision"],
        f", over {len(devices.names)} devices" if len(devices.names) > 1 else "",
    )
    # Validated: a net of its own on one device, so that it carries no optimiser and no further outputs, and can hold
    # averaged weights while the other trains on.
    served = uncompiled(models.serving_model(model))
    jit_compile = _jit_compile(training.jit_compile, hardware)
    served.compile(loss=loss, metrics=[MeanIoU(classes)], jit_compile=jit_compile)
    if entry.adapt is not None:
        unaugmented = SliceBatches(model_input, "train", training.batch_size)
        record = _adapt(served, entry.adapt, unaugmented, validation, output)
        if on_epoch is not None:
            on_epoch(record)
        return TrainingResult(uncompiled(served), [record], 1, "adapted", hardware, time.monotonic() - started)

    facts = {"key": key, "code": code, "hardware": hardware}
    epochs = Epochs(training, train, validation, served, devices, output, on_epoch, facts, found, started)
    if epochs.finished:
        hardware = found.progress["hardware"]
    else:
        with devices.building():
            # Each coarser output counts half of the next finer one, all together as much as one output alone.
            weights = [0.5**k for k in range(outputs)]
            model.compile(
                optimizer=_optimiser(training, len(train)),
                loss=[loss] * outputs if outputs > 1 else loss,
                loss_weights=[weight / sum(weights) for weight in weights] if outputs > 1 else None,
                jit_compile=jit_compile,
            )
            model.optimizer.build(model.trainable_variables)
        # (Closing ends the progress of an epoch that an error cuts short.)
        with devices.running(), _named_memory_errors(training.batch_size, model_input.size), contextlib.closing(epochs):
            epochs.start(model)
            model.fit(
                train,
                initial_epoch=len(epochs.history),
                epochs=training.epochs,
                callbacks=[epochs],
                verbose=0,
                # SliceBatches has its own order; Keras would shuffle the batches by Python's random numbers.
                shuffle=False,
            )
    return TrainingResult(
        epochs.best_net(), epochs.history, epochs.best_epoch, epochs.stopped_by, hardware, epochs.startup_seconds
    )


def _adapt(
    model: keras.Model, adapt: Callable, train: SliceBatches, validation: SliceBatches, output: Path | None
) -> dict[str, float]:
    """Adapt a compiled model and save it; the entry of the history."""
    started = time.monotonic()
    adapt(model, train)
    adapt_seconds = time.monotonic() - started
    scores = model.evaluate(train, return_dict=True, verbose=0)
    validation_scores = model.evaluate(validation, return_dict=True, verbose=0)
    record = {
        "epoch": 1,
        "loss": float(scores["loss"]),
        "val_loss": float(validation_scores["loss"]),
        "val_mean_iou": float(validation_scores["mean_iou"]),
        "learning_rate": 0.0,
        "seconds": time.monotonic() - started,
        "slices_per_second": len(train.slices) / max(adapt_seconds, 1e-9),
    }
    if output is not None:
        save_model(model, output / BEST_MODEL)
    logger.info(
        "adapted: loss %.4f, validation loss %.4f, validation mean IoU %.4f; %.1f slices/s, %.1f s",
        *(record[name] for name in ("loss", "val_loss", "val_mean_iou", "slices_per_second", "seconds")),
    )
    return record


@contextlib.contextmanager
def _named_memory_errors(batch_size: int, size: Sequence[int]) -> Iterator[None]:
    """Say what to lower when a device has too little memory; every backend has an error of its own for it."""
    try:
        yield
    except Exception as error:
        exhausted = next(filter(_is_of_memory, _chain(error)), None)
        if exhausted is None:
            raise
        first = (str(exhausted).splitlines() or ["no further word"])[0]
        raise MemoryError(
            f"too little memory for batches of {batch_size} slices of {size[0]} x {size[1]} ({first[:200]}). Lower "
            "training.batch_size, or preprocess.size, or the widths of the net."
        ) from error


def _is_of_memory(error: BaseException) -> bool:
    text = str(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
    return named or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those while which it arose: Keras, tidying up after one on JAX, may end with another."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _model_settings(settings: Mapping) -> tuple[models.Entry, dict[str, Any]]:
    """The model that the settings name, and its keyword arguments."""
    values = dict(settings.get("model") or {})
    entry = models.find(values.pop("name", DEFAULT_MODEL))
    check_names(values, ["name", *setting_names(entry.build)["model"]], "model")
    return entry, values


def _optimiser(settings: TrainingSettings, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    average = {"use_ema": True, "ema_momentum": settings.ema_momentum} if settings.ema_momentum else {}
    rate = _learning_rate(settings, steps_per_epoch)
    if not settings.weight_decay:
        return keras.optimizers.Adam(rate, **average)
    optimiser = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay, **average)
    optimiser.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimiser


def _learning_rate(settings: TrainingSettings, steps_per_epoch: int):
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    steps, rising = (round(epochs * steps_per_epoch) for epochs in (settings.epochs, settings.warmup_epochs))
    schedule = keras.optimizers.schedules.CosineDecay
    if not rising:
        return schedule(settings.learning_rate, steps)
    return schedule(0.0, steps - rising, warmup_target=settings.learning_rate, warmup_steps=rising)


def _jit_compile(wanted: bool | None, hardware: Mapping[str, Any]) -> bool | str:
    if wanted is not None:
        return wanted
    if hardware["backend"].startswith("tensorflow") and not hardware["gpus"]:
        return False
    return "auto"


def read_settings(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Sections of settings from YAML or JSON files, such as `conf/base/parameters_fit.yml`; later files win.

    Raises ValueError if a file is missing, or holds something else.
    """
    merged: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected YAML or JSON with some of the sections {list(SECTIONS)}.")
        text = path.read_text(encoding="utf-8")
        try:
            if path.suffix == ".json":
                read = json.loads(text)
            else:
                import yaml

                read = yaml.safe_load(text)
        except ImportError as error:
            raise ValueError(
                f"{path}: reading YAML needs PyYAML, which is not here. Write the settings as .json."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}).") from error
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML ({error}).") from error
        if not isinstance(read, dict) or not all(isinstance(values, dict) for values in read.values()):
            raise ValueError(f"{path}: expected sections with settings, some of {list(SECTIONS)}.")
        for name, values in read.items():
            merged[name] = merged.get(name, {}) | {key: _number(value) for key, value in values.items()}
    return merged


def _number(value: Any) -> Any:
    """PyYAML takes 1e-3 for a text, which Kedro does not."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def keep_record(record: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """What is written down beside a net, once: a training that is only taken up again keeps what it said of itself, one
    that went on says what it has become, if only that more epochs brought no better net.

    Args:
        record: of `describe_training`, perhaps with more.
        output: the training's folder.
    """
    path = output / RECORD
    if path.is_file():
        former = read_json(path)
        if all(former.get(name) == record.get(name) for name in ("weights", "epochs", "stopped_by")):
            return former
    write_json(path, record)
    return dict(record)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: train from a prepared folder alone. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lumbarflow.training", description=main.__doc__.splitlines()[0])
    parser.add_argument("--model-input", required=True, metavar="DIR", help="the folder that preprocess has made")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help=f"of this training alone: {BEST_MODEL}, {RECORD}, {HISTORY}, and {CHECKPOINT}, from which it goes on",
    )
    parser.add_argument(
        "--settings",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML or JSON with the sections model, loss, training and augmentation; may be repeated, later files win",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output = Path(given.output)
    try:
        settings = read_settings(given.settings)
        model_input = ModelInput.open(given.model_input)
        result = fit(model_input, settings, output=output)
        keep_record(describe_training(result, model_input.manifest, settings), output)
        write_atomically(output / HISTORY, lambda path: _write_csv(path, result.history))
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    key = training_key(model_input.manifest, settings)
    best = result.history[result.best_epoch - 1]
    logger.info("best epoch %d: validation mean IoU %.4f; first step after %.1f s",
                result.best_epoch, best["val_mean_iou"], result.startup_seconds)  # fmt: skip
    logger.info(
        "see %s. To evaluate it where the scans are: put this folder there as 06_models/training/%s of the results and "
        "give the same settings to kedro run --pipeline=fit",
        output,
        key[:16],
    )
    return 0


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
