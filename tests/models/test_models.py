"""The registry, and what holds for every model in it."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lumbarflow import models
from lumbarflow.labels import CLASS_COUNT
from lumbarflow.networks import load_model, save_model

SIZE = (8, 12)
# The least of each kind that has all its layers.
TINY = {
    "modified_unet": {
        "encoder_widths": [3, 4, 5],
        "encoder_dropouts": [0.1, 0.1, 0.1],
        "decoder_widths": [4],
        "decoder_dropouts": [0.1],
    },
    "plain_unet": {"widths": [3, 4], "dropouts": [0.1, 0.2]},
    "attention_unet": {"widths": [3, 4, 5]},
    "atlas": {},
}


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request):
    return models.build(request.param, SIZE, 1, CLASS_COUNT, precision="mixed_bfloat16", **TINY[request.param])


@pytest.fixture(scope="module")
def slices() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, *SIZE, 1)).astype(np.float32)


def test_every_module_of_the_package_has_been_read():
    assert set(models.MODELS) == set(TINY)
    names = {module.name for module in pkgutil.iter_modules(models.__path__)}
    assert {entry.build.__module__.rpartition(".")[2] for entry in models.MODELS.values()} < names


def test_every_entry_knows_its_name_and_has_a_title_of_its_own():
    assert all(entry.name == name == models.find(name).name for name, entry in models.MODELS.items())
    assert len({entry.title for entry in models.MODELS.values()}) == len(models.MODELS)


def test_a_model_is_entered_by_its_decorator(monkeypatch):
    monkeypatch.setattr(models, "MODELS", {})

    @models.register("sum", title="A sum")
    def build(size, channels, classes, *, more=0):
        return sum(size) + channels + classes + more

    assert list(models.MODELS.values()) == [models.Entry("sum", "A sum", build, None, None)]
    assert models.build("sum", (1, 2), 3, 4, more=5) == 15


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"registers a model 'atlas', which lumbarflow.models.atlas has already"):
        models.register("atlas", title="Another")(lambda size, channels, classes: None)


def test_an_unknown_model_is_refused_with_the_known_ones():
    known = r"\['atlas', 'attention_unet', 'modified_unet', 'plain_unet'\]"
    with pytest.raises(ValueError, match=f"model.name is 'resnet'; expected one of {known}"):
        models.build("resnet", (4, 4), 1, 4)


def test_a_model_added_as_a_file_is_found_and_none_imports_keras(tmp_path):
    # The package, copied, with one more file and nothing else changed.
    source = Path(models.__file__).parents[1]
    copied = tmp_path / "lumbarflow"
    (copied / "models").mkdir(parents=True)
    for file in [*source.glob("*.py"), *(source / "models").glob("*.py")]:
        (copied / file.relative_to(source)).write_bytes(file.read_bytes())
    (copied / "models" / "added.py").write_text(
        "from lumbarflow.models import register\n\n\n"
        '@register("added", title="Added")\n'
        "def added(size, channels, classes): ...\n"
    )
    code = "import sys; from lumbarflow import models; print([sorted(models.MODELS), 'keras' in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert ast.literal_eval(told) == [sorted([*TINY, "added"]), False]


def test_probabilities_are_float32_and_sum_to_1_in_every_precision(tiny, slices):
    probabilities = tiny.predict(slices, verbose=0)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (3, *SIZE, CLASS_COUNT))
    # bfloat16 would leave sums off by up to 1/256.
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-6)


def test_a_model_comes_back_from_its_configuration(tiny):
    again = type(tiny).from_config(tiny.get_config())
    assert again.get_config() == tiny.get_config()
    assert [weight.shape for weight in again.weights] == [weight.shape for weight in tiny.weights]


def test_a_saved_model_predicts_identically_after_reload(tiny, slices, tmp_path):
    rng = np.random.default_rng(1)
    tiny.set_weights([rng.uniform(0.1, 1, weight.shape) for weight in tiny.get_weights()])
    save_model(tiny, tmp_path / "model.keras")
    again = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(slices, verbose=0), tiny.predict(slices, verbose=0))
    plain = load_model(tmp_path / "model.keras", precision="float32")
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}


SUPERVISED = {
    "encoder_widths": [2, 3, 4, 5],
    "encoder_dropouts": [0.1, 0.1, 0.1, 0.1],
    "decoder_widths": [4, 3],
    "decoder_dropouts": [0.1, 0.1],
}


def test_what_is_served_is_the_net_without_the_heads_of_the_loss(slices, tmp_path):
    settings = {"precision": "mixed_bfloat16", **SUPERVISED}
    trained = models.build("modified_unet", SIZE, 1, CLASS_COUNT, deep_supervision=1, **settings)
    plain = models.build("modified_unet", SIZE, 1, CLASS_COUNT, **settings)
    served = models.serving_model(trained)
    assert served.get_config() == plain.get_config()
    trained.set_weights([np.random.default_rng(1).uniform(0.1, 1, weight.shape) for weight in trained.get_weights()])
    expected = trained.predict(slices, verbose=0)[0]
    np.testing.assert_array_equal(served.predict(slices, verbose=0), expected)
    save_model(served, tmp_path / "model.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "model.keras").predict(slices, verbose=0), expected)


def test_a_model_with_one_output_is_served_as_it_is(tiny):
    assert models.serving_model(tiny) is tiny


TWO_DEVICES = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from lumbarflow.backend import load_keras
keras = load_keras()
from lumbarflow import models
import numpy as np
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
# Halves of unequal level and contrast.
slices = np.random.default_rng(0).normal(size=(4, 8, 12, 1)).astype("float32")
slices[2:] = 5 + 3 * slices[2:]


def norms(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def build(name, settings):
    keras.utils.set_random_seed(3)
    return models.build(name, (8, 12), 1, 4, **settings)


def averages(model):
    return [np.concatenate([norm.moving_mean.numpy(), norm.moving_variance.numpy()]).tolist() for norm in norms(model)]


nets = json.loads(sys.argv[1])
with strategy.scope():
    two = {name: build(name, settings) for name, settings in nets.items()}
one = {name: build(name, settings) for name, settings in nets.items()}
synchronized = [[norm.synchronized for model in nets.values() for norm in norms(model)] for nets in (two, one)]
halves = strategy.experimental_distribute_values_from_function(
    lambda replica: slices[2 * replica.replica_id_in_sync_group :][:2]
)
model = two["modified_unet"]
strategy.run(tf.function(lambda half: model(half, training=True)), [halves])
one["modified_unet"](slices, training=True)
print(json.dumps([synchronized, averages(model), averages(one["modified_unet"])]))
"""


def test_batch_normalisation_sees_the_batch_of_all_devices():
    undropped = {**TINY["modified_unet"], "encoder_dropouts": [0, 0, 0], "decoder_dropouts": [0]}
    nets = {"modified_unet": undropped, "attention_unet": {"widths": [3, 4]}}
    finished = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, json.dumps(nets)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    (synchronized_on_two, synchronized_on_one), two, one = json.loads(finished.stdout)
    # 3 + 1 levels and an up-sample block; two in each of 2 + 1 levels.
    assert synchronized_on_two == [True] * (5 + 6)
    assert synchronized_on_one == [False] * (5 + 6)
    for of_two, of_one in zip(two, one, strict=True):
        np.testing.assert_allclose(of_two, of_one, rtol=1e-4, atol=1e-5)


def test_models_are_named_as_in_the_registry():
    for name, settings in TINY.items():
        assert models.build(name, SIZE, 1, CLASS_COUNT, **settings).name == name
