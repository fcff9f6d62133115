from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.training_settings import (
    SECTIONS,
    TrainingSettings,
    check_sections,
    section,
    setting_names,
    training_key,
)

MANIFEST = {"content_hash": "abc", "sides": {"train": {"1_t1": [0, 1]}}}
SETTINGS = {"model": {"name": "modified_unet"}, "loss": {"gamma": 4.0}, "training": {"epochs": 3}, "augmentation": {}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "training.epochs is 0; expected more than 0"),
        ({"max_minutes": -1}, "training.max_minutes is -1; expected more than 0"),
        ({"warmup_epochs": -1}, "training.warmup_epochs is -1; expected 0 or more"),
        ({"weight_decay": -0.1}, "training.weight_decay is -0.1; expected 0 or more"),
        ({"neighbours": -1}, "training.neighbours is -1; expected 0 or more"),
        ({"workers": -1}, "training.workers is -1; expected 0 or more"),
        ({"ema_momentum": 1.0}, "training.ema_momentum is 1.0; expected a share, at least 0 and below 1"),
        ({"balanced_sampling": 1.5}, "training.balanced_sampling is 1.5; expected a share, 0 to 1"),
        ({"learning_rate_schedule": "step"}, "learning_rate_schedule is 'step'; expected one of"),
        ({"warmup_epochs": 2}, "warmup_epochs is 2 with a constant learning rate; expected 0"),
        (
            {"warmup_epochs": 9, "epochs": 9, "learning_rate_schedule": "cosine"},
            "warmup_epochs is 9 of 9 epochs; expected fewer",
        ),
        ({"patience": None}, "training.patience is null; expected a value, such as 20"),
        ({"learning_rate": None}, "training.learning_rate is null; expected a value, such as 0.001"),
        ({"devices": 0}, "training.devices is 0; expected a whole number above 0, or 'all'"),
        ({"devices": "many"}, "training.devices is 'many'; expected"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**values)


def test_what_may_be_null_is():
    assert TrainingSettings(max_minutes=None, workers=None, jit_compile=None) == TrainingSettings()


def test_the_names_of_the_sections_are_those_of_what_takes_them():
    from lumbarflow import models
    from lumbarflow.losses import FocalDiceLoss

    known = setting_names(models.find("plain_unet").build)
    assert list(known) == list(SECTIONS)
    assert known["model"] == ["widths", "dropouts", "kernel_initializer"]
    assert [*known["loss"], "name", "kwargs"] == list(inspect.signature(FocalDiceLoss).parameters)
    assert "learning_rate" in known["training"] and "elastic_cells" in known["augmentation"]


def test_a_section_is_taken_by_its_names():
    assert section(TrainingSettings, {"training": {"epochs": 4}}, "training") == TrainingSettings(epochs=4)
    assert section(AugmentationSettings, {}, "augmentation") == AugmentationSettings()
    with pytest.raises(ValueError, match="unknown setting training.epoch; expected some of"):
        section(TrainingSettings, {"training": {"epoch": 4}}, "training")
    with pytest.raises(ValueError, match=r"unknown section 'optimiser' of the training settings; expected \['model'"):
        check_sections({"optimiser": {}})


def test_the_key_is_what_a_training_makes_of_its_data():
    key = training_key(MANIFEST, SETTINGS)
    same = [
        {**SETTINGS, "training": {"epochs": 3, "seed": TrainingSettings.seed}},  # a default, spelt out
        {**SETTINGS, "training": {"epochs": 3, "max_minutes": 5, "devices": 2, "workers": 4, "resume": False}},
        {name: SETTINGS[name] for name in ("training", "loss", "model")},
    ]
    assert {training_key(MANIFEST, settings) for settings in same} == {key}
    others = [
        training_key({**MANIFEST, "sides": {"train": {"1_t1": [0]}}}, SETTINGS),
        *(
            training_key(MANIFEST, {**SETTINGS, **changed})
            for changed in (
                {"training": {"epochs": 4}},
                {"training": {"epochs": 3, "ema_momentum": 0.9}},
                {"model": {"name": "plain_unet"}},
                {"loss": {"gamma": 2.0}},
                {"augmentation": {"noise": 0.2}},
            )
        ),
    ]
    assert len({key, *others}) == 7


def test_looking_at_settings_does_not_import_keras():
    code = "import sys, lumbarflow.training_settings; assert not {'keras', 'tensorflow', 'pandas'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
