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
import inspect
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lumbarflow
from lumbarflow import models
from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.backend import describe_hardware, load_keras, set_seed
from lumbarflow.batches import SliceBatches
from lumbarflow.checkpoint import Checkpoint
from lumbarflow.devices import Devices
from lumbarflow.files import write_atomically, write_json
from lumbarflow.losses import FocalDiceLoss, MeanIoU
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.progress import track
from lumbarflow.training_record import describe_training
from lumbarflow.training_settings import SECTIONS, TrainingSettings, check_sections, section, training_key

keras = load_keras()
models.register_layers()
logger = logging.getLogger("lumbarflow.training")

DEFAULT_MODEL = "modified_unet"
BEST_MODEL, CHECKPOINT = "best.keras", "checkpoint.npz"
RECORD, HISTORY = "training_record.json", "training_history.csv"
# Without a GPU, one thread that reads ahead keeps up with the net; a GPU needs more of them.
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
        ValueError: an unknown or impossible setting, a side without slices, a size that the net cannot take, an output
            folder that holds another training.
        FloatingPointError: the loss is not finite; names the epoch and the batch's slices.
        MemoryError: the device has too little memory; names the settings to lower.
        OSError: a checkpoint cannot be written; names the last one that could.
    """
    started = time.monotonic()
    check_sections(settings)
    training = section(TrainingSettings, settings, "training")
    augmentation = section(AugmentationSettings, settings, "augmentation")
    loss = section(FocalDiceLoss, settings, "loss", reserved=("name", "kwargs"))
    entry, values = _model_settings(settings)
    output = Path(output) if output is not None else None

    set_seed(training.seed)
    hardware = describe_hardware(training.precision)
    devices = Devices(training.devices, training.batch_size)
    workers = training.workers if training.workers is not None else GPU_WORKERS if hardware["gpus"] else 0
    neighbours = training.neighbours
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
        "training %s (%s parameters) on %d slices, validation on %d, size %s; %s, %s, %d cores, GPUs %s, %s%s",
        model.name,
        f"{model.count_params():,}",
        len(train.slices),
        len(validation.slices),
        list(model_input.size),
        hardware["backend"],
        hardware["processor"],
        hardware["cores"],
        hardware["gpus"] or "none",
        hardware["precision"],
        f", over {len(devices.names)} devices" if len(devices.names) > 1 else "",
    )
    # Validated, saved and returned: a net of its own on one device, so that it carries no optimiser and no further
    # outputs, and can hold averaged weights while the other trains on.
    served = _uncompiled(models.serving_model(model))
    jit_compile = _jit_compile(training.jit_compile, hardware)
    served.compile(loss=loss, metrics=[MeanIoU(classes)], jit_compile=jit_compile)
    if entry.adapt is not None:
        unaugmented = SliceBatches(model_input, "train", training.batch_size)
        record = _adapt(served, entry.adapt, unaugmented, validation, output)
        if on_epoch is not None:
            on_epoch(record)
        return TrainingResult(_uncompiled(served), [record], 1, "adapted", hardware, time.monotonic() - started)

    epochs = _Epochs(
        training, train, validation, served, devices, output, on_epoch, training_key(model_input.manifest, settings)
    )
    if not epochs.restore_finished():
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
        with devices.running(), _named_memory_errors(training.batch_size, model_input.size):
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
    served.set_weights(epochs.best_weights)
    startup = (epochs.first_step_ended or time.monotonic()) - started
    return TrainingResult(_uncompiled(served), epochs.history, epochs.best_epoch, epochs.stopped_by, hardware, startup)


def save_model(model: keras.Model, path: str | Path) -> None:
    """Write a net as a `.keras` file, without optimiser or loss, under a temporary name first.

    Raises ValueError if the path does not end in `.keras`.
    """
    if Path(path).suffix != ".keras":
        raise ValueError(f"{path}: expected a name ending in .keras, the format that loads without running code.")
    write_atomically(path, _uncompiled(model).save if model.compiled else model.save)


def load_model(path: str | Path, precision: str | None = None) -> keras.Model:
    """Read a `.keras` file in Keras's safe mode, which runs no code from the file; uncompiled.

    Args:
        precision: None keeps the precision that the net was trained in; "float32" computes in that throughout, for
            processors that only emulate bfloat16; probabilities then differ by bfloat16's rounding.
    Raises:
        ValueError: there is no such file, it is no `.keras` file, or the precision is another one.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a .keras file that save_model wrote.")
    if precision not in (None, "float32"):
        raise ValueError(f"precision is {precision!r}; expected None (as trained) or 'float32'.")
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    return _uncompiled(model, dtype=precision) if precision else model


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


class _Epochs(keras.callbacks.Callback):
    """What happens between epochs: validation, history, the best weights, checkpoints and the reasons to stop.

    Args:
        settings, train, validation, devices, output, on_epoch: as in `fit`.
        served: the compiled net that is validated and saved.
        key: of this training, see `training_key`.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        train: SliceBatches,
        validation: SliceBatches,
        served: keras.Model,
        devices: Devices,
        output: Path | None,
        on_epoch: Callable | None,
        key: str,
    ):
        super().__init__()
        self.settings, self.train, self.validation, self.served = settings, train, validation, served
        self.devices, self.output, self.on_epoch, self.key = devices, output, on_epoch, key
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_weights: Sequence[np.ndarray] = []
        self.stopped_by = "epochs"
        self.first_step_ended: float | None = None
        self._checkpoint = self._read_checkpoint() if output is not None and settings.resume else None

    def restore_finished(self) -> bool:
        """Whether the output folder holds this training, finished; what it remembers is then here again."""
        found = self._checkpoint
        if found is None:
            return False
        self.history, self.best_epoch = list(found.progress["history"]), int(found.progress["best_epoch"])
        self.best_weights = found.best
        finished = found.progress["finished"]
        logger.info(
            "%s: %s epoch %d of %d; set training.resume to false to train anew",
            self.output / CHECKPOINT,
            "this training is finished since" if finished else "going on after",
            len(self.history),
            self.settings.epochs,
        )
        if found.progress["code"] != lumbarflow.__version__:
            logger.warning(
                "version %s of lumbarflow began this training, and %s goes on with it",
                found.progress["code"],
                lumbarflow.__version__,
            )
        # Whoever follows the epochs, such as a new MLflow run, gets the whole curve.
        if self.on_epoch is not None:
            for record in self.history:
                self.on_epoch(record)
        if finished:
            self.stopped_by = finished
        return bool(finished)

    def start(self, model: keras.Model) -> None:
        """Bring the net and its optimiser to where the checkpoint left them, if there is one."""
        self._variables = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
        if self._checkpoint is None:
            return
        state = self._checkpoint.state
        if [value.shape for value in state] != [tuple(variable.shape) for variable in self._variables]:
            raise ValueError(
                f"{self.output / CHECKPOINT}: its variables are not those of this net; expected the same. Another "
                "version of lumbarflow or Keras wrote it. Remove it, or set training.resume to false, to train anew."
            )
        for variable, value in zip(self._variables, state, strict=True):
            variable.assign(value)
        self._checkpoint = None

    def on_train_begin(self, logs=None):
        self.started = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        # Keras starts reading the epoch's batches after this.
        self.train.epoch = epoch
        self.epoch_started = time.monotonic()
        self.progress = iter(track(range(len(self.train)), f"epoch {epoch + 1} of {self.settings.epochs}", "batches"))
        self._unchecked: tuple[int, Any] | None = None

    def on_train_batch_begin(self, batch, logs=None):
        next(self.progress)

    def on_train_batch_end(self, batch, logs=None):
        self.train_ended = time.monotonic()
        if batch == 0:
            self.first_batch_ended = self.train_ended
            self.first_step_ended = self.first_step_ended or self.train_ended
        # One step late: reading a loss waits for its step, and a GPU would stand idle until the next one is sent to it.
        self._check_last_batch()
        self._unchecked = batch, logs["loss"]

    def on_epoch_end(self, epoch, logs=None):
        self._check_last_batch()
        self.train_ended = time.monotonic()
        next(self.progress, None)
        weights = self._served_weights()
        with self.devices.apart():
            self.served.set_weights(weights)
            scores = self.served.evaluate(self.validation, return_dict=True, verbose=0)
        self._check_finite("validation loss", scores["loss"])
        now = time.monotonic()
        rest = (len(self.train) - 1) * self.train.batch_size
        steady = rest > 0
        record = {
            "epoch": epoch + 1,
            "loss": float(logs["loss"]),
            "val_loss": float(scores["loss"]),
            "val_mean_iou": float(scores["mean_iou"]),
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "seconds": now - self.epoch_started,
            "slices_per_second": (rest if steady else self.train.batch_size)
            / max(self.train_ended - (self.first_batch_ended if steady else self.epoch_started), 1e-9),
        }
        better = not self.history or record["val_mean_iou"] > self.history[self.best_epoch - 1]["val_mean_iou"]
        self.history.append(record)
        if better:
            self.best_epoch, self.best_weights = epoch + 1, weights
        due, reason = self._due(now)
        if self.output is not None:
            # The net first: one that is newer than the checkpoint is written again when the epoch is repeated.
            self._write(better, finished=due if due in ("epochs", "patience") else None)
        logger.info(
            "epoch %d of %d: loss %.4f, validation loss %.4f, validation mean IoU %.4f%s; %.1f slices/s, %.1f s",
            *(record["epoch"], self.settings.epochs, record["loss"], record["val_loss"], record["val_mean_iou"]),
            " (best)" if better else "",
            *(record["slices_per_second"], record["seconds"]),
        )
        if self.on_epoch is not None:
            self.on_epoch(record)
        if due is not None:
            self.stopped_by = due
            self.model.stop_training = True
            if reason:
                logger.info("stopped after epoch %d: %s (training.%s)", epoch + 1, reason, due)

    def _served_weights(self) -> list[np.ndarray]:
        """The weights to validate, in the order of the served net's."""
        values = {variable.path: variable for variable in self.model.weights}
        if self.settings.ema_momentum:
            # Keras has a callback that swaps them in place, but not while JAX's state is away from the net.
            averages = self.model.optimizer._model_variables_moving_average
            pairs = zip(self.model.trainable_variables, averages, strict=True)
            values |= {variable.path: average for variable, average in pairs}
        # Copied: TensorFlow's arrays may be views of what the next step changes.
        return [np.array(keras.ops.convert_to_numpy(values[weight.path])) for weight in self.served.weights]

    def _due(self, now: float) -> tuple[str | None, str]:
        """What ends the training after the last epoch of the history, if anything does, and why."""
        last = self.history[-1]
        minutes = (now - self.started + last["seconds"]) / 60
        if last["epoch"] == self.settings.epochs:
            return "epochs", ""
        if last["epoch"] - self.best_epoch >= self.settings.patience:
            return "patience", f"no better validation mean IoU for {self.settings.patience} epochs"
        if self.settings.max_minutes is not None and minutes > self.settings.max_minutes:
            reason = f"one more would end {minutes:.1f} minutes after the start, of {self.settings.max_minutes} allowed"
            return "max_minutes", reason
        return None, ""

    def _read_checkpoint(self) -> Checkpoint | None:
        path = self.output / CHECKPOINT
        found = Checkpoint.read(path)
        if found is not None and found.progress["key"] != self.key:
            raise ValueError(
                f"{path}: the checkpoint of another training ({found.progress['key'][:8]}: other slices or settings); "
                f"expected this one's ({self.key[:8]}). Choose another folder, remove the file, or set "
                "training.resume to false to overwrite it."
            )
        return found

    def _write(self, better: bool, finished: str | None) -> None:
        path = self.output / CHECKPOINT
        progress = {
            "key": self.key,
            "code": lumbarflow.__version__,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "finished": finished,
        }
        # A finished training needs no more than what it returns.
        state = [] if finished else [keras.ops.convert_to_numpy(variable) for variable in self._variables]
        try:
            if better:
                save_model(self.served, self.output / BEST_MODEL)
            Checkpoint(progress, state, self.best_weights).write(path)
        except OSError as error:
            last = len(self.history) - 1
            kept = f"the checkpoint of epoch {last} is whole" if path.is_file() else "there is no earlier one"
            mebibytes = (sum(value.nbytes for value in (*state, *self.best_weights)) >> 20) + 1
            raise OSError(
                error.errno,
                f"the checkpoint of epoch {last + 1} cannot be written ({error.strerror or error}); expected room for "
                f"{mebibytes} MiB. {kept[0].upper()}{kept[1:]}: make room and give the same command again, which "
                f"{'goes on from there' if path.is_file() else 'starts anew'}",
                str(path),
            ) from error

    def _check_last_batch(self) -> None:
        if self._unchecked is not None:
            batch, loss = self._unchecked
            self._unchecked = None
            self._check_finite("loss", loss, batch)

    def _check_finite(self, what: str, value: float, batch: int | None = None) -> None:
        if math.isfinite(value):
            return
        where = f"epoch {len(self.history) + 1}"
        if batch is not None:
            slices = ", ".join(f"{s} slice {i}" for s, i in (self.train.slices[p] for p in self.train.positions(batch)))
            where += f", batch {batch + 1} of {len(self.train)} ({slices})"
        raise FloatingPointError(
            f"{where}: the {what} is {float(value)}; expected a finite number. Lower training.learning_rate, set "
            "training.precision to float32, or look for damaged intensities in the slices seen last."
        )


@contextlib.contextmanager
def _named_memory_errors(batch_size: int, size: Sequence[int]) -> Iterator[None]:
    """Say what to lower when a device has too little memory; every backend has an error of its own for it."""
    try:
        yield
    except Exception as error:
        text = str(error)
        exhausted = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
        if not exhausted and "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise MemoryError(
            f"too little memory for batches of {batch_size} slices of {size[0]} x {size[1]} "
            f"({text.splitlines()[0][:200] if text else 'no further word'}). Lower training.batch_size, or "
            "preprocess.size, or the widths of the net."
        ) from error


def _model_settings(settings: Mapping) -> tuple[models.Entry, dict[str, Any]]:
    """The model that the settings name, and its keyword arguments."""
    values = dict(settings.get("model") or {})
    entry = models.find(values.pop("name", DEFAULT_MODEL))
    reserved = ("size", "channels", "classes", "precision")
    taken = (name for name in inspect.signature(entry.build).parameters if name not in reserved)
    check_names(values, ["name", *taken], "model")
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


def _uncompiled(model: keras.Model, dtype: str | None = None) -> keras.Model:
    """A copy on one device with the same weights, uncompiled; with `dtype`, all layers compute in that."""
    config = model.get_config()
    for layer in config["layers"]:
        if dtype:
            layer["config"]["dtype"] = dtype
        if "synchronized" in layer["config"]:
            # Of several devices' batch normalisation; where it is not TensorFlow's, it cannot even be read.
            layer["config"]["synchronized"] = False
    twin = type(model).from_config(config)
    twin.set_weights(model.get_weights())
    return twin


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
            merged[name] = merged.get(name, {}) | values
    return merged


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
        save_model(result.model, output / BEST_MODEL)
        write_json(output / RECORD, describe_training(result, model_input.manifest, settings))
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
