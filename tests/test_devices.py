"""One batch over several devices: here two logical CPUs, in a process of their own, since they are set at its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lumbarflow.devices import Devices
from lumbarflow.model_input import FORMAT_VERSION

# Slices of different content in either half of a batch: each device alone would learn something else. Batches of 4 of
# 6 slices: the last one is filled up.
CODE = """
import json, sys
{setup}
import keras
import numpy as np
from lumbarflow import models, training
from lumbarflow.model_input import ModelInput
from lumbarflow.models.levels import batch_normalisation

# What several devices might do differently, and no more: it is compiled four times.
def small(size, channels, classes, *, precision):
    x = inputs = keras.Input((*size, channels))
    x = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    x = batch_normalisation("norm", momentum=0.5, dtype=precision)(x)
    return keras.Model(inputs, keras.layers.Conv2D(classes, 1, activation="softmax")(x))

models.MODELS["small"] = models.Entry("small", "Small", small)
settings = {{
    "model": {{"name": "small"}},
    "loss": {{"dice_over": "classes", "boundary_weight": 0.5}},
    "training": {{
        "epochs": 2, "batch_size": 4, "learning_rate": 0.01, "precision": "float32", "ema_momentum": 0.5,
        "weight_decay": 0.001,
    }},
    "augmentation": {{"rotation_degrees": 5}},
}}
model_input, results = ModelInput.open(sys.argv[1]), []
for devices in (1, 2):
    settings["training"]["devices"] = devices
    results.append(training.fit(model_input, settings))
one, two = results
np.savez(sys.argv[2], *[w for result in results for w in result.model.get_weights()])
synchronised = [layer.get_config().get("synchronized") for layer in two.model.layers if "norm" in layer.name]
print(json.dumps({{"history": [result.history for result in results], "synchronised": synchronised}}))
settings["training"] |= {{"devices": "all", "batch_size": 3}}
try:
    training.fit(model_input, settings)
except ValueError as error:
    print(error)
settings["training"] |= {{"devices": 3, "batch_size": 3}}
try:
    training.fit(model_input, settings)
except ValueError as error:
    print(error)
"""
TENSORFLOW = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_the_net_that_one_does(tmp_path, backend):
    pytest.importorskip(backend)
    rng = np.random.default_rng(0)
    sides: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    for name, side, count, classes in (
        ("1", "train", 3, (0, 1)),
        ("2", "train", 3, (2, 3)),
        ("3", "validation", 3, (0, 4)),
    ):
        folder = tmp_path / "in" / "series" / name
        folder.mkdir(parents=True)
        labels = np.repeat(rng.integers(classes[0], classes[1] + (side == "train"), (count, 8, 3)), 4, 2).astype(
            np.uint8
        )
        np.save(folder / "labels.npy", labels)
        np.save(folder / "images.npy", (labels + rng.normal(scale=0.2, size=labels.shape)).astype(np.float16))
        sides[side][name] = list(range(count))
    manifest = {"format_version": FORMAT_VERSION, "size": [8, 12], "sides": sides, "content_hash": "abc"}
    manifest |= {"classes": {str(k): str(k) for k in range(4)}, "series": {k: {"n_slices": 3} for k in "123"}}
    (tmp_path / "in" / "manifest.json").write_text(json.dumps(manifest))

    setup = TENSORFLOW if backend == "tensorflow" else ""
    environment = os.environ | {"KERAS_BACKEND": backend, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time here
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(setup=setup), str(tmp_path / "in"), str(tmp_path / "weights.npz")],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, *errors = done.stdout.splitlines()
    told = json.loads(told)
    with np.load(tmp_path / "weights.npz") as archive:
        weights = [archive[name] for name in archive.files]
    for name in ("loss", "val_loss", "val_mean_iou"):
        first, second = ([entry[name] for entry in history] for history in told["history"])
        assert second == pytest.approx(first, rel=2e-3)
    # Adam divides by the gradient's own size: where that is all rounding, so is the step, of 0.01 at most.
    half = len(weights) // 2
    differences = [np.abs(two - one).ravel() for one, two in zip(weights[:half], weights[half:], strict=True)]
    assert np.concatenate(differences).mean() < 1e-3
    assert not any(told["synchronised"]), "what is saved runs on one device"
    assert errors[0].startswith("training.batch_size is 3 on 2 devices; expected a multiple of 2")
    assert errors[1].startswith("training.devices is 3; expected at most 2, the CPUs that")


def test_one_device_needs_no_strategy():
    devices = Devices(1, 7)
    assert len(devices.names) == 1
    with devices.building(), devices.running(), devices.apart():
        pass
