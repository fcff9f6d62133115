"""The registry, and what holds for every model in it."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lumbarflow import models
from lumbarflow.labels import CLASS_COUNT
from lumbarflow.training import load_model, save_model

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


def test_models_are_named_as_in_the_registry():
    for name, settings in TINY.items():
        assert models.build(name, SIZE, 1, CLASS_COUNT, **settings).name == name
