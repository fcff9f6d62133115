"""What a training is asked to do, checked and named, without Keras: sections of settings and the key of a training."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.files import code_digest, file_digest, value_digest
from lumbarflow.model_input import INGESTED
from lumbarflow.parameters import check_names

SECTIONS = ("model", "loss", "training", "augmentation")
SCHEDULES = ("constant", "cosine")

# Settings of the section `training` that say how a training is run, not what it makes of its data.
WITHOUT_EFFECT = ("devices", "workers", "resume")
WHOLE_NUMBERS = ("seed", "epochs", "batch_size", "neighbours", "patience", "workers")
# Of a net's builder, those that the data and the machine decide.
_DECIDED = ("size", "channels", "classes", "precision")
# Of `losses.FocalDiceLoss`, which imports Keras; a test holds them against it.
LOSS = ("gamma", "alpha", "smooth", "dice_over", "missed_weight", "boundary_weight", "boundary_width")

# What a trained net depends on beside its data, its settings and the module that builds it. Named, not imported: some
# of these import Keras.
_CODE = (
    "training",
    "epochs",
    "training_settings",
    "batches",
    "losses",
    "augmentation",
    "backend",
    "devices",
    "model_input",
    "models",
    "models.levels",
)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The section `training` of fit's settings; defaults as in Ahmed et al. 2024 where they name a value.

    Attributes:
        seed: of initial weights, dropout, order and augmentation.
        epochs: at most so many.
        batch_size: slices per step, over all devices.
        learning_rate: Adam's, at its highest.
        learning_rate_schedule: "constant", or "cosine": down to 0 over `epochs`, step by step.
        warmup_epochs: the learning rate rises linearly from 0 over so many of the epochs; with "cosine" only.
        weight_decay: share of the learning rate that each step takes off every kernel (AdamW, arXiv 1711.05101);
            biases and the parameters of normalisations are left out. 0 is plain Adam.
        ema_momentum: above 0, what is validated, chosen and returned is the exponential moving average of the weights,
            of which each step keeps this share. 0 takes the weights as they are. Batch normalisation's averages are
            moving ones already, and taken as they are in both cases.
        balanced_sampling: 0 shows every slice once an epoch. Above 0 slices are drawn with replacement, as many as
            there are, this share of the probability spread so that each foreground class is shown equally often.
        neighbours: so many slices of the same series on either side are further channels of the input (2.5-D). They
            are the next ones that the series has, however far away that is in millimetres.
        patience: stop after so many epochs without a better validation mean IoU.
        max_minutes: stop after the epoch whose successor would end later than this; None sets no limit. Which epoch
            that is depends on the machine's speed: leave it None where runs must be equal.
        precision: "auto", "float32" or "mixed_bfloat16", see `backend.resolve_precision`.
        jit_compile: compile the step with XLA. None: on JAX, which is far slower without, and on TensorFlow where Keras
            would by itself, but not on a CPU: measured ten times slower there.
        devices: so many GPUs (CPUs where there are none) share each batch; "all" takes those that there are. The
            result is the same as on one, up to rounding and dropout.
        workers: threads that prepare batches ahead; None: 0 without a GPU. (TensorFlow reads ahead in one thread all
            the same; JAX on a CPU does not, and its steps are long.)
        resume: go on with a checkpoint found in the output folder; False starts anew.
    Raises:
        ValueError: a value out of range.
    """

    seed: int = 0
    epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3
    learning_rate_schedule: str = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    ema_momentum: float = 0.0
    balanced_sampling: float = 0.0
    neighbours: int = 0
    patience: int = 20
    max_minutes: float | None = None
    precision: str = "auto"
    jit_compile: bool | None = None
    devices: int | str = 1
    workers: int | None = None
    resume: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise ValueError(f"training.{field.name} is null; expected a value, such as {field.default!r}.")
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"training.{name} is {value!r}; expected a whole number.")
        for name in ("epochs", "batch_size", "learning_rate", "patience", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"training.{name} is {value}; expected more than 0.")
        for name in ("warmup_epochs", "weight_decay", "neighbours", "workers"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"training.{name} is {value}; expected 0 or more.")
        if not 0 <= self.ema_momentum < 1:
            raise ValueError(f"training.ema_momentum is {self.ema_momentum}; expected a share, at least 0 and below 1.")
        if not 0 <= self.balanced_sampling <= 1:
            raise ValueError(f"training.balanced_sampling is {self.balanced_sampling}; expected a share, 0 to 1.")
        schedule = self.learning_rate_schedule
        if schedule not in SCHEDULES:
            raise ValueError(f"training.learning_rate_schedule is {schedule!r}; expected one of {list(SCHEDULES)}.")
        if self.warmup_epochs and schedule != "cosine":
            raise ValueError(
                f"training.warmup_epochs is {self.warmup_epochs} with a {schedule} learning rate; expected 0. Set "
                "training.learning_rate_schedule to cosine for a warm-up."
            )
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"training.warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs; expected fewer than "
                "training.epochs."
            )
        if self.devices != "all" and not (isinstance(self.devices, int) and self.devices > 0):
            raise ValueError(f"training.devices is {self.devices!r}; expected a whole number above 0, or 'all'.")


def check_sections(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a section that `training.fit` does not know."""
    unknown = sorted(set(settings) - set(SECTIONS))
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r} of the training settings; expected {list(SECTIONS)}.")


def setting_names(build: Callable) -> dict[str, list[str]]:
    """The settings that each section may have, for the model that `build` builds; "model" has its `name` besides."""
    return {
        "model": [name for name in inspect.signature(build).parameters if name not in _DECIDED],
        "loss": list(LOSS),
        "training": [field.name for field in dataclasses.fields(TrainingSettings)],
        "augmentation": [field.name for field in dataclasses.fields(AugmentationSettings)],
    }


def section(function: Callable, settings: Mapping, name: str, reserved: tuple[str, ...] = ()) -> Any:
    """`function` called with one section of the settings.

    Args:
        function: its parameters are the section's settings, but for those `reserved`.
        settings: sections by name; one that is missing has its defaults.
        name: of the section.
    Raises:
        ValueError: a setting that `function` does not take, or refuses.
    """
    values = dict(settings.get(name) or {})
    check_names(values, [p for p in inspect.signature(function).parameters if p not in reserved], name)
    return function(**values)


def effective(settings: Mapping[str, Any], without: Sequence[str] = WITHOUT_EFFECT) -> dict[str, Any]:
    """The settings that a trained net depends on: with the defaults of `training` and `augmentation`, `without` some.

    Raises ValueError for settings of these two sections that make no sense.
    """
    training = dataclasses.asdict(section(TrainingSettings, settings, "training"))
    return {
        "model": dict(settings.get("model") or {}),
        "loss": dict(settings.get("loss") or {}),
        "training": {name: value for name, value in training.items() if name not in without},
        "augmentation": dataclasses.asdict(section(AugmentationSettings, settings, "augmentation")),
    }


def training_key(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hex digest of what a training is to make of its data: one that was interrupted goes on under the same key.

    Neither the code nor the versions of libraries are part of it (see `training_code`): a training may begin on one
    machine and go on, or be evaluated, on another. Nor is max_minutes: what it cut short goes on with the next run,
    for so long again.

    Args:
        manifest: of the model input.
        settings: SECTIONS, complete or not.
    """
    prepared = {name: value for name, value in manifest.items() if name != INGESTED}  # what came of that is in there
    return value_digest([prepared, effective(settings, (*WITHOUT_EFFECT, "max_minutes"))])


def training_code(build: Callable) -> dict[str, str]:
    """Digests of the code that trains a net, by its syntax and by its bytes.

    The first does not change with comments, but differs between minor versions of Python; the second is the same on
    every machine. Code is the same if either of them is.

    Args:
        build: the function that builds the net, of `models.Entry`.
    """
    paths = [find_spec(f"lumbarflow.{module}").origin for module in _CODE]
    own = inspect.getsourcefile(build)
    # A net that somebody registers from a notebook has no file.
    if own is not None and Path(own).is_file():
        paths.append(own)
    return {"syntax": code_digest(paths), "bytes": file_digest(paths)}
