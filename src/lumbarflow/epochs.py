"""What happens between the epochs of a training, and how one goes on after an interruption; this imports Keras."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow.backend import load_keras
from lumbarflow.batches import SliceBatches
from lumbarflow.checkpoint import Checkpoint
from lumbarflow.devices import Devices
from lumbarflow.files import PARTIAL
from lumbarflow.networks import save_model, uncompiled
from lumbarflow.progress import duration, track
from lumbarflow.training_settings import TrainingSettings

keras = load_keras()
logger = logging.getLogger(__name__)

BEST_MODEL, CHECKPOINT = "best.keras", "checkpoint.npz"


def find_checkpoint(output: Path, key: str, code: Mapping[str, str]) -> Checkpoint | None:
    """Where an earlier run of a training has left it; None if there is nothing to go on from.

    Args:
        output: the training's folder; what killed writers left half-written there is removed.
        key: of the training, see `training_settings.training_key`.
        code: digests of the code, see `training_settings.training_code`: what other code has trained is not gone on
            with, nor taken for this training's result.
    Raises:
        ValueError: the folder holds another training's checkpoint, or a damaged one.
        OSError: it cannot be read.
    """
    for left in output.glob(f"{PARTIAL}*"):
        left.unlink(missing_ok=True)
    path = output / CHECKPOINT
    found = Checkpoint.read(path)
    if found is None:
        return None
    progress = found.progress
    if progress["key"] != key:
        raise ValueError(
            f"{path}: the checkpoint of another training ({progress['key'][:8]}: other slices or settings); expected "
            f"this one's ({key[:8]}). Choose another folder, remove the file, or set training.resume to false to "
            "overwrite it."
        )
    if not any(progress["code"].get(kind) == digest for kind, digest in code.items()):
        logger.warning("%s: made by other code than today's; training anew", path)
        return None
    return found


class _Evaluated(keras.callbacks.Callback):
    """Shows how far an evaluation is, which may take as long as the training before it, and looks at its losses."""

    def __init__(self, batches: int, description: str, check: Callable[[float, int], None]):
        super().__init__()
        self.steps, self.check = track(range(batches), description, "batches"), check

    def on_test_batch_begin(self, batch, logs=None):
        next(self.steps, None)

    def on_test_batch_end(self, batch, logs=None):
        self.check(logs["loss"], batch)

    def on_test_end(self, logs=None):
        self.steps.close()


class Epochs(keras.callbacks.Callback):
    """What happens between epochs: validation, history, the best weights, checkpoints and the reasons to stop.

    Args:
        settings, train, validation, devices, output, on_epoch: as in `training.fit`.
        served: the compiled net that is validated.
        facts: what is written into every checkpoint: key, code and hardware of the training.
        found: the checkpoint to go on from.
        started: time.monotonic() of the call.
    Attributes:
        history, best_epoch, stopped_by, startup_seconds: as in `training.TrainingResult`.
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
        facts: Mapping[str, Any],
        found: Checkpoint | None,
        started: float,
    ):
        super().__init__()
        self.settings, self.train, self.validation, self.served = settings, train, validation, served
        self.devices, self.output, self.on_epoch, self.facts = devices, output, on_epoch, facts
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self._best_weights: Sequence[np.ndarray] = []
        # Saved and returned. To make it takes as long as some steps of a small net do: once, and not at every save.
        self._best_net = uncompiled(served)
        self.stopped_by = "epochs"
        self.startup_seconds: float | None = None
        self.steps = track((), "no epoch yet")
        self._called = started
        self._found = found
        if found is None:
            return
        self.history, self.best_epoch = list(found.progress["history"]), int(found.progress["best_epoch"])
        self._best_weights = found.best
        if self.finished:
            self.stopped_by, self.startup_seconds = found.progress["finished"], found.progress["startup_seconds"]
        logger.info(
            "%s: %s epoch %d of %d; set training.resume to false to train anew",
            output / CHECKPOINT,
            "this training is finished since" if self.finished else "going on after",
            len(self.history),
            settings.epochs,
        )
        # Whoever follows the epochs, such as a new MLflow run, gets the whole curve.
        if on_epoch is not None:
            for record in self.history:
                on_epoch(record)

    def close(self) -> None:
        """End the progress of the epoch in hand."""
        self.steps.close()

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is of a training that has ended."""
        return self._found is not None and self._found.progress["finished"] is not None

    def best_net(self) -> keras.Model:
        """The net with the weights of the best epoch so far, uncompiled; the same one each time."""
        self._best_net.set_weights(self._best_weights)
        return self._best_net

    def start(self, model: keras.Model) -> None:
        """Bring the net and its optimiser to where the checkpoint left them, if there is one."""
        self._variables = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
        if self._found is None:
            return
        state = self._found.state
        if [value.shape for value in state] != [tuple(variable.shape) for variable in self._variables]:
            raise ValueError(
                f"{self.output / CHECKPOINT}: its variables are not those of this net; expected the same. Another "
                "version of lumbarflow or Keras wrote it. Remove it, or set training.resume to false, to train anew."
            )
        for variable, value in zip(self._variables, state, strict=True):
            variable.assign(value)

    def on_train_begin(self, logs=None):
        self.started = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        # Keras starts reading the epoch's batches after this.
        self.train.epoch = epoch
        self.epoch_started = time.monotonic()
        self.title = f"epoch {epoch + 1} of {self.settings.epochs}"
        self.steps = track(range(len(self.train)), self.title, "batches")

    def on_train_batch_begin(self, batch, logs=None):
        next(self.steps)

    def on_train_batch_end(self, batch, logs=None):
        self.train_ended = time.monotonic()
        if batch == 0:
            self.first_batch_ended = self.train_ended
            if self.startup_seconds is None:
                self.startup_seconds = self.train_ended - self._called
        self._check_finite(self.train, "loss", logs["loss"], batch)

    def on_epoch_end(self, epoch, logs=None):
        self.steps.close()
        weights = self._served_weights()
        with self.devices.apart():
            self.served.set_weights(weights)
            check = partial(self._check_finite, self.validation, "validation loss")
            shown = _Evaluated(len(self.validation), f"{self.title}, validation", check)
            with contextlib.closing(shown.steps):
                scores = self.served.evaluate(self.validation, return_dict=True, verbose=0, callbacks=[shown])
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
            self.best_epoch, self._best_weights = epoch + 1, weights
        due, reason = self._due(now)
        left = self.settings.epochs - record["epoch"]
        if self.output is not None:
            # The net first: one that is newer than the checkpoint is written again when the epoch is repeated.
            self._write(better, finished=due if due in ("epochs", "patience") else None)
        logger.info(
            "%s: loss %.4f, validation loss %.4f, validation mean IoU %.4f%s; %.1f slices/s, %.1f s%s",
            *(self.title, record["loss"], record["val_loss"], record["val_mean_iou"]),
            " (best)" if better else "",
            *(record["slices_per_second"], record["seconds"]),
            # Patience or max_minutes may end it earlier.
            f", at most about {duration(record['seconds'] * left)} left" if left and due is None else "",
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

    def _write(self, better: bool, finished: str | None) -> None:
        path = self.output / CHECKPOINT
        progress = {
            **self.facts,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "finished": finished,
            "startup_seconds": self.startup_seconds,
        }
        # A finished training needs no more than what it returns.
        state = [] if finished else [keras.ops.convert_to_numpy(variable) for variable in self._variables]
        try:
            if better:
                with self.devices.apart():
                    net = self.best_net()
                save_model(net, self.output / BEST_MODEL)
            Checkpoint(progress, state, self._best_weights).write(path)
        except OSError as error:
            last = len(self.history) - 1
            mebibytes = (sum(value.nbytes for value in (*state, *self._best_weights)) >> 20) + 1
            again = "make room and give the same command again"
            if last and self.settings.resume:
                kept = f"The checkpoint of epoch {last} is whole: {again}, which goes on from there"
            elif last:
                kept = f"The checkpoint of epoch {last} is whole: {again} with training.resume true to go on from there"
            else:
                kept = f"There is no earlier one: {again}"
            raise OSError(
                error.errno,
                f"the checkpoint of epoch {last + 1} cannot be written ({error.strerror or error}); expected room for "
                f"{mebibytes} MiB. {kept}",
                str(path),
            ) from error

    def _check_finite(self, batches: SliceBatches, what: str, value: float, batch: int) -> None:
        if math.isfinite(value):
            return
        slices = ", ".join(f"{series} slice {index}" for series, index in batches.slices_of(batch))
        where = f"epoch {len(self.history) + 1}, batch {batch + 1} of {len(batches)} ({slices})"
        raise FloatingPointError(
            f"{where}: the {what} is {float(value)}; expected a finite number. Lower training.learning_rate, set "
            "training.precision to float32, or look for damaged intensities in the slices seen last."
        )
