"""The model as it is served: what `predict` takes, gives and refuses. (That it survives MLflow: test_registry.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature

from lumbarflow.inference import Segmenter
from lumbarflow.serving import SIGNATURE, LumbarSegmenter

SETTINGS = {"size": [16, 12], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100], "batch_size": 2}
TURNED = {"test_time_augmentation": {"shift": 0.1, "rotation_degrees": 5.0}}
SPACING = [1.0, 0.5]


class Bands:
    """Stands in for the net: the four classes by normalised intensity, parted at -0.5, 0 and 0.5."""

    input_shape = (None, 16, 12, 1)

    def predict(self, images, batch_size, verbose):
        return np.eye(4, dtype=np.float32)[np.digitize(images[..., 0], [-0.5, 0.0, 0.5])]


@pytest.fixture
def slices():
    return np.random.default_rng(0).integers(0, 900, (3, 20, 30)).astype(np.int16)


@pytest.fixture
def model():
    model = LumbarSegmenter()
    model.segmenter = Segmenter(Bands(), SETTINGS)
    return model


def test_labels_and_probabilities_are_the_segmenters(model, slices):
    segmenter = Segmenter(Bands(), SETTINGS)

    labels = model.predict(None, slices, {"pixel_spacing_mm": SPACING})
    assert labels.dtype == np.uint8 and labels.shape == (3, 20, 30)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(labels, segmenter.labels(slices, (1.0, 0.5)))

    probabilities = model.predict(None, slices, {"pixel_spacing_mm": SPACING, "output": "probabilities"})
    assert probabilities.dtype == np.float32 and probabilities.shape == (3, 20, 30, 4)
    np.testing.assert_array_equal(probabilities, segmenter.probabilities(slices, (1.0, 0.5)))


@pytest.mark.parametrize("more", [{}, TURNED])
def test_the_record_says_how_to_serve_and_an_earlier_one_lacks_test_time_augmentation(
    slices, tmp_path, monkeypatch, more
):
    (tmp_path / "segmenter.json").write_text(json.dumps({"settings": SETTINGS | more}))
    monkeypatch.setattr("lumbarflow.networks.load_model", lambda path: Bands())
    served = LumbarSegmenter()
    artifacts = {"network": "unread.keras", "segmenter": str(tmp_path / "segmenter.json")}
    served.load_context(SimpleNamespace(artifacts=artifacts))
    probabilities = served.predict(None, slices, {"pixel_spacing_mm": SPACING, "output": "probabilities"})
    expected = Segmenter(Bands(), SETTINGS | more).probabilities(slices, (1.0, 0.5))
    np.testing.assert_array_equal(probabilities, expected)
    plain = Segmenter(Bands(), SETTINGS).probabilities(slices, (1.0, 0.5))
    assert np.array_equal(probabilities, plain) == (not more)


def test_the_first_spacing_is_that_of_the_rows(model, slices):
    # 20 rows of 1 mm and 30 columns of 0.5 mm, fitted into 16 x 12: swapped, the picture lies otherwise in it.
    given = model.predict(None, slices, {"pixel_spacing_mm": [1.0, 0.5]})
    swapped = model.predict(None, slices, {"pixel_spacing_mm": [0.5, 1.0]})
    assert (given != swapped).any()


def test_nested_lists_are_an_array_too(model, slices):
    # What a JSON request becomes.
    params = {"pixel_spacing_mm": SPACING, "output": "labels"}
    np.testing.assert_array_equal(model.predict(None, slices.tolist(), params), model.predict(None, slices, params))


@pytest.mark.parametrize(
    ("change", "params", "message"),
    [
        (lambda slices: "scan.mha", {}, r"the input is a str; expected an array \(n, rows, columns\).*Read a file"),
        (lambda slices: ["a.mha", "b.mha"], {}, r"values of type <U5; expected.*real numbers"),
        (lambda slices: [[[1, 2], [3]]], {}, r"a list of unequal rows; expected.*Make all slices equally large"),
        (lambda slices: slices[0], {}, r"the shape \(20, 30\); expected.*slices\[None\]"),
        (lambda slices: slices[:0], {}, r"shape \(0, 20, 30\); expected \(n, rows, columns\), none of them 0"),
        (lambda slices: slices > 400, {}, r"values of type bool"),
        (lambda slices: slices * 1j, {}, r"values of type complex128"),
        (lambda slices: np.where(slices > 800, np.nan, slices), {}, r"aren't finite"),
        (lambda slices: np.full_like(slices, 7), {}, r"intensities are constant \(7\)"),
        (lambda slices: slices, {"pixel_spacing_mm": []}, r"pixel_spacing_mm is missing; expected.*params="),
        (lambda slices: slices, {"pixel_spacing_mm": None}, r"pixel_spacing_mm is missing"),
        (lambda slices: slices, {"pixel_spacing_mm": [1.0]}, r"pixel_spacing_mm is \[1.0\]; expected .* \[row, col"),
        (lambda slices: slices, {"pixel_spacing_mm": [1.0, 0.0]}, r"pixel spacing \(1.0, 0.0\); expected two positive"),
        (lambda slices: slices, {"output": "masks"}, r"output is 'masks'; expected one of labels, probabilities"),
    ],
)
def test_input_that_cannot_be_segmented_is_named(model, slices, change, params, message):
    with pytest.raises(MlflowException, match=message) as raised:
        model.predict(None, change(slices), {"pixel_spacing_mm": SPACING} | params)
    # With this code MLflow's server answers 400 and shows the message.
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_parameters_may_be_left_out_altogether(model, slices):
    with pytest.raises(MlflowException, match="pixel_spacing_mm is missing"):
        model.predict(None, slices)


def test_signature_describes_parameters_only():
    assert SIGNATURE.inputs is None and SIGNATURE.outputs is None
    described = json.loads(SIGNATURE.to_dict()["params"])
    assert [(entry["name"], entry["type"], entry["default"], entry["shape"]) for entry in described] == [
        ("pixel_spacing_mm", "double", [], [-1]),
        ("output", "string", "labels", None),
    ]
    assert ModelSignature.from_dict(SIGNATURE.to_dict()) == SIGNATURE


def test_importing_it_loads_no_heavy_library():
    # MLflow brings pandas; of ours, nothing that only training or pipelines need.
    code = (
        "import sys, lumbarflow.serving; "
        "print(sorted(sys.modules.keys() & {'tensorflow', 'keras', 'kedro', 'SimpleITK', 'matplotlib.pyplot'}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout.strip() == "[]"
    assert printed.stderr == ""
