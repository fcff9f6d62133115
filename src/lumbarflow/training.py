"""Training from a `model_input` folder, with Keras and NumPy alone; importing this imports Keras.

    result = fit(ModelInput.open("data/05_model_input"), settings)
    save_model(result.model, "model.keras")

Slices are read from mapped files batch by batch. Every random number of a slice follows from the seed, the epoch and
the slice's place in the list, so neither threads nor the order of reading change what the net sees.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow import models
from lumbarflow.augmentation import AugmentationSettings, apply_augmentation, draw_augmentation
from lumbarflow.backend import describe_hardware, load_keras, set_seed
from lumbarflow.files import write_atomically
from lumbarflow.losses import FocalDiceLoss, MeanIoU
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.progress import track

keras = load_keras()
models.register_layers()
logger = logging.getLogger(__name__)

SECTIONS = ("model", "loss", "training", "augmentation")
SCHEDULES = ("constant", "cosine")
CHANNELS = 1
DEFAULT_MODEL = "modified_unet"
BEST_MODEL = "best.keras"


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The section `training` of fit's settings; defaults as in Ahmed et al. 2024 where they name a value.

    Attributes:
        seed: of initial weights, dropout, order and augmentation.
        epochs: at most so many.
        batch_size: slices per step.
        learning_rate: Adam's, at the start.
        learning_rate_schedule: "constant", or "cosine": down to 0 over `epochs`, step by step.
        patience: stop after so many epochs without a better validation mean IoU.
        max_minutes: stop after the epoch whose successor would end later than this; None sets no limit. Which epoch
            that is depends on the machine's speed: leave it None where runs must be equal.
        precision: "auto", "float32" or "mixed_bfloat16", see `backend.resolve_precision`.
        jit_compile: compile the step with XLA. Measured ten times slower on a CPU.
    Raises:
        ValueError: a value out of range.
    """

    seed: int = 0
    epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3
    learning_rate_schedule: str = "constant"
    patience: int = 20
    max_minutes: float | None = None
    precision: str = "auto"
    jit_compile: bool = False

    def __post_init__(self):
        for name in ("epochs", "batch_size", "learning_rate", "patience", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"training.{name} is {value}; expected more than 0.")
        schedule = self.learning_rate_schedule
        if schedule not in SCHEDULES:
            raise ValueError(f"training.learning_rate_schedule is {schedule!r}; expected one of {list(SCHEDULES)}.")


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
        hardware: `backend.describe_hardware()` of this run.
    """

    model: keras.Model
    history: list[dict[str, float]]
    best_epoch: int
    stopped_by: str
    hardware: dict[str, Any]


def fit(
    model_input: ModelInput,
    settings: Mapping[str, Mapping[str, Any]],
    output: str | Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train a net on the side "train", choosing the best epoch by mean IoU on the side "validation".

    A model that is not trained by gradient (its registry entry has `adapt`) is shown the side "train" instead, without
    augmentation; of the section "training" it heeds batch_size and jit_compile only.

    Args:
        model_input: the prepared slices.
        settings: sections "model" (`name` and the keyword arguments of that net), "loss" (those of FocalDiceLoss),
            "training" (TrainingSettings) and "augmentation" (AugmentationSettings); what is left out has its default.
        output: folder for `best.keras`, rewritten at every better epoch, so that a killed run leaves its best net.
        on_epoch: called after each epoch with its history entry.
    Raises:
        ValueError: an unknown or impossible setting, a side without slices, a size that the net cannot take.
        FloatingPointError: the loss is not finite; names the epoch and the batch's slices.
    """
    unknown = sorted(set(settings) - set(SECTIONS))
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r} of the training settings; expected {list(SECTIONS)}.")
    training = _from_section(TrainingSettings, settings, "training")
    augmentation = _from_section(AugmentationSettings, settings, "augmentation")
    loss = _from_section(FocalDiceLoss, settings, "loss", reserved=("name", "kwargs"))

    set_seed(training.seed)
    train = SliceBatches(
        model_input,
        "train",
        training.batch_size,
        seed=training.seed,
        shuffle=True,
        augmentation=augmentation if augmentation.enabled else None,
    )
    validation = SliceBatches(model_input, "validation", training.batch_size)
    hardware = describe_hardware(training.precision)
    classes = len(model_input.manifest["classes"])
    entry, values = _model_settings(settings)
    model = entry.build(model_input.size, CHANNELS, classes, precision=hardware["precision"], **values)
    model.compile(
        optimizer=keras.optimizers.Adam(_learning_rate(training, len(train))),
        loss=loss,
        # Counted in the training step too, at no measurable cost; only validation's is kept.
        metrics=[MeanIoU(classes)],
        jit_compile=training.jit_compile,
    )
    logger.info(
        "training %s (%s parameters) on %d slices, validation on %d, size %s; %s, %s, %d cores, GPUs %s, %s",
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
    )
    output = Path(output) if output is not None else None
    if entry.adapt is not None:
        unaugmented = SliceBatches(model_input, "train", training.batch_size)
        model, record = _adapted(model, entry.adapt, unaugmented, validation, output)
        if on_epoch is not None:
            on_epoch(record)
        return TrainingResult(model, [record], 1, "adapted", hardware)
    epochs = _Epochs(training, train, output, on_epoch)
    model.fit(
        train,
        validation_data=validation,
        epochs=training.epochs,
        callbacks=[epochs],
        verbose=0,
        # SliceBatches has its own order; Keras would shuffle the batches once more, by Python's random numbers.
        shuffle=False,
    )
    return TrainingResult(epochs.best_model, epochs.history, epochs.best_epoch, epochs.stopped_by, hardware)


def _adapted(
    model: keras.Model, adapt: Callable, train: SliceBatches, validation: SliceBatches, output: Path | None
) -> tuple[keras.Model, dict[str, float]]:
    """The adapted model, uncompiled and saved, and its entry of the history."""
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
    model = _uncompiled(model)
    if output is not None:
        save_model(model, output / BEST_MODEL)
    logger.info(
        "adapted: loss %.4f, validation loss %.4f, validation mean IoU %.4f; %.1f slices/s, %.1f s",
        *(record[name] for name in ("loss", "val_loss", "val_mean_iou", "slices_per_second", "seconds")),
    )
    return model, record


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


class SliceBatches(keras.utils.PyDataset):
    """Batches of one side: images float32 (n, H, W, 1) and labels uint8 (n, H, W).

    Args:
        model_input, side: which slices.
        batch_size: slices per batch; the last one may be smaller.
        seed: of order and augmentation.
        shuffle: a new order for each `epoch`, else the fixed one.
        augmentation: drawn anew for each slice and `epoch`; None for none.
    Attributes:
        epoch: set it before the first batch of an epoch is read.
    Raises:
        ValueError: the side has no slices.
    """

    def __init__(
        self,
        model_input: ModelInput,
        side: str,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augmentation: AugmentationSettings | None = None,
    ):
        # No workers: on TensorFlow, Keras reads ahead in a thread anyway, and more threads only compete for cores.
        super().__init__(workers=0)
        self.model_input, self.batch_size, self.seed = model_input, batch_size, seed
        self.shuffle, self.augmentation = shuffle, augmentation
        self.slices = model_input.slices(side)
        self.epoch = 0
        if not self.slices:
            raise ValueError(
                f"{model_input.root}: the side {side!r} has no slices; expected at least one. "
                "See split and slice_index for why, change the split or the filters, and preprocess again."
            )

    def __len__(self) -> int:
        return math.ceil(len(self.slices) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        positions = self.positions(index)
        images = np.empty((len(positions), *self.model_input.size, CHANNELS), np.float32)
        labels = np.empty((len(positions), *self.model_input.size), np.uint8)
        for k, position in enumerate(positions):
            images[k, ..., 0], labels[k] = self._slice(position)
        return images, labels

    def positions(self, index: int) -> np.ndarray:
        """Where the slices of batch `index` of this epoch stand in `slices`."""
        order = np.arange(len(self.slices))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        return order[index * self.batch_size : (index + 1) * self.batch_size]

    def _slice(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        where = self.slices[position]
        image, label = self.model_input.image(*where), self.model_input.label(*where)
        if self.augmentation is None:
            return image, label
        # 1 tells these numbers from those of the order, which has the shorter key.
        rng = np.random.default_rng((self.seed, self.epoch, int(position), 1))
        return apply_augmentation(image, label, draw_augmentation(rng, self.augmentation, image.shape))


class _Epochs(keras.callbacks.Callback):
    """What happens between epochs: history, log lines, progress, the best weights and the reasons to stop."""

    def __init__(self, settings: TrainingSettings, train: SliceBatches, output: Path | None, on_epoch):
        super().__init__()
        self.settings, self.train, self.output, self.on_epoch = settings, train, output, on_epoch
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.stopped_by = "epochs"

    def on_train_begin(self, logs=None):
        self.started = time.monotonic()
        # A net of its own, so that what is saved and returned carries no optimiser.
        self.best_model = _uncompiled(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        # Keras starts reading the epoch's batches after this.
        self.train.epoch = epoch
        self.epoch_started = time.monotonic()
        self.progress = iter(track(range(len(self.train)), f"epoch {epoch + 1} of {self.settings.epochs}", "batches"))

    def on_train_batch_begin(self, batch, logs=None):
        next(self.progress)

    def on_train_batch_end(self, batch, logs=None):
        self.train_ended = time.monotonic()
        if batch == 0:
            self.first_batch_ended = self.train_ended
        self._check_finite("loss", logs["loss"], batch)

    def on_test_begin(self, logs=None):
        next(self.progress, None)

    def on_epoch_end(self, epoch, logs=None):
        self._check_finite("validation loss", logs["val_loss"])
        now = time.monotonic()
        rest = len(self.train.slices) - len(self.train.positions(0))
        steady = rest > 0
        record = {
            "epoch": epoch + 1,
            "loss": float(logs["loss"]),
            "val_loss": float(logs["val_loss"]),
            "val_mean_iou": float(logs["val_mean_iou"]),
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "seconds": now - self.epoch_started,
            "slices_per_second": (rest if steady else len(self.train.slices))
            / max(self.train_ended - (self.first_batch_ended if steady else self.epoch_started), 1e-9),
        }
        better = not self.history or record["val_mean_iou"] > self.history[self.best_epoch - 1]["val_mean_iou"]
        self.history.append(record)
        if better:
            self.best_epoch = epoch + 1
            self.best_model.set_weights(self.model.get_weights())
            if self.output is not None:
                save_model(self.best_model, self.output / BEST_MODEL)
        logger.info(
            "epoch %d of %d: loss %.4f, validation loss %.4f, validation mean IoU %.4f%s; %.1f slices/s, %.1f s",
            *(record["epoch"], self.settings.epochs, record["loss"], record["val_loss"], record["val_mean_iou"]),
            " (best)" if better else "",
            *(record["slices_per_second"], record["seconds"]),
        )
        if self.on_epoch is not None:
            self.on_epoch(record)
        self._stop_if_due(now)

    def _stop_if_due(self, now: float) -> None:
        last = self.history[-1]
        minutes = (now - self.started + last["seconds"]) / 60
        if last["epoch"] == self.settings.epochs:
            return
        if last["epoch"] - self.best_epoch >= self.settings.patience:
            self.stopped_by = "patience"
            reason = f"no better validation mean IoU for {self.settings.patience} epochs"
        elif self.settings.max_minutes is not None and minutes > self.settings.max_minutes:
            self.stopped_by = "max_minutes"
            reason = f"one more would end {minutes:.1f} minutes after the start, of {self.settings.max_minutes} allowed"
        else:
            return
        self.model.stop_training = True
        logger.info("stopped after epoch %d: %s (training.%s)", last["epoch"], reason, self.stopped_by)

    def _check_finite(self, what: str, value: float, batch: int | None = None) -> None:
        if math.isfinite(value):
            return
        where = f"epoch {len(self.history) + 1}"
        if batch is not None:
            slices = ", ".join(f"{s} slice {i}" for s, i in (self.train.slices[p] for p in self.train.positions(batch)))
            where += f", batch {batch + 1} of {len(self.train)} ({slices})"
        raise FloatingPointError(
            f"{where}: the {what} is {value}; expected a finite number. Lower training.learning_rate, set "
            "training.precision to float32, or look for damaged intensities in the slices seen last."
        )


def _from_section(function: Callable, settings: Mapping, section: str, reserved: tuple[str, ...] = ()):
    """`function` called with one section of the settings."""
    values = dict(settings.get(section) or {})
    _check_names(values, function, section, reserved)
    return function(**values)


def _model_settings(settings: Mapping) -> tuple[models.Entry, dict[str, Any]]:
    """The model that the settings name, and its keyword arguments."""
    values = dict(settings.get("model") or {})
    entry = models.find(values.pop("name", DEFAULT_MODEL))
    reserved = ("size", "channels", "classes", "precision")
    _check_names(values, entry.build, "model", reserved, extra=("name",))
    return entry, values


def _check_names(values: Mapping, function: Callable, section: str, reserved=(), extra=()) -> None:
    taken = (name for name in inspect.signature(function).parameters if name not in reserved)
    check_names(values, [*extra, *taken], section)


def _learning_rate(settings: TrainingSettings, steps_per_epoch: int):
    if settings.learning_rate_schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.epochs * steps_per_epoch)
    return settings.learning_rate


def _uncompiled(model: keras.Model, dtype: str | None = None) -> keras.Model:
    """A copy with the same weights, without optimiser or loss; with `dtype`, all layers compute in that."""
    config = model.get_config()
    if dtype:
        for layer in config["layers"]:
            layer["config"]["dtype"] = dtype
    twin = type(model).from_config(config)
    twin.set_weights(model.get_weights())
    return twin
