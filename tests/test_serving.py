"""The model as it is served: what `predict` takes, gives and refuses. (That it survives MLflow: test_registry.)"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature

from lumbarflow.imaging import read_volume, write_volume
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
        (lambda slices: None, {}, r"the input is a NoneType; expected an array \(n, rows, columns\).*the file's path"),
        (lambda slices: ["a.mha", 3], {}, r"values of type <U\d+; expected.*must be real"),
        (lambda slices: slices, {"output_path": "out.mha"}, r"output_path is for volumes; expected none with an array"),
        (lambda slices: slices, {"labels": "instances"}, r"labels is 'instances'; expected 'classes' with an array"),
        (lambda slices: slices, {"test_time_augmentation": "yes"}, r"test_time_augmentation is 'yes'; expected one of"),
        (lambda slices: "scan.mha", {}, r"scan.mha: no such file"),
        (lambda slices: "scan.mha", {"labels": "both"}, r"labels is 'both'; expected one of classes, instances"),
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
        ("labels", "string", "classes", None),
        ("test_time_augmentation", "string", "as_evaluated", None),
        ("output_path", "string", "", None),
        ("overwrite", "boolean", False, None),
    ]
    assert ModelSignature.from_dict(SIGNATURE.to_dict()) == SIGNATURE


@pytest.fixture
def volume(make_volume):
    """Stored neither sagittally nor along the axes."""
    return make_volume((6, 9, 7))


def test_a_path_gives_labels_on_the_files_own_grid(model, volume, tmp_path):
    write_volume(volume, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    expected = Segmenter(Bands(), SETTINGS).segment(volume)
    for path in (str(tmp_path / "scan.nii.gz"), tmp_path / "scan.nii.gz", np.array(str(tmp_path / "scan.nii.gz"))):
        result = model.predict(None, path)
        assert result["labels"].dtype == np.uint8
        np.testing.assert_array_equal(result["labels"], expected.array)
        assert tuple(result["spacing_mm"]) == volume.spacing_mm and tuple(result["origin_mm"]) == volume.origin_mm
        np.testing.assert_array_equal(result["direction"], volume.direction)
        assert result["path"] == str(path)
    # What a server answers with is JSON.
    json.dumps(result | {"labels": result["labels"].tolist()})

    probabilities = model.predict(None, path, {"output": "probabilities"})["probabilities"]
    assert probabilities.shape == (6, 9, 7, 4) and probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), expected.array)
    changed = model.predict(None, path, {"output": "probabilities", "test_time_augmentation": "on"})["probabilities"]
    assert (changed != probabilities).any()


def test_of_several_paths_a_bad_one_keeps_no_other_from_being_segmented(model, volume, tmp_path):
    write_volume(volume, tmp_path / "a.mha")
    (tmp_path / "b.mha").write_bytes((tmp_path / "a.mha").read_bytes()[:-20])
    write_volume(volume, tmp_path / "c.nrrd")
    paths = [str(tmp_path / name) for name in ("a.mha", "b.mha", "c.nrrd")]
    for given in (paths, tuple(map(Path, paths)), np.array(paths)):
        first, second, third = model.predict(None, given)
        np.testing.assert_array_equal(first["labels"], third["labels"])
        assert second.keys() == {"path", "error"}
        assert second["path"] == paths[1] and "b.mha" in second["error"]
    written = model.predict(None, paths, {"output_path": str(tmp_path / "masks")})
    assert [row.get("written") for row in written] == [
        str(tmp_path / "masks/a_seg.mha"), None, str(tmp_path / "masks/c_seg.nrrd")
    ]  # fmt: skip
    np.testing.assert_array_equal(read_volume(tmp_path / "masks/c_seg.nrrd").array, first["labels"])
    with pytest.raises(MlflowException, match=r"2 of the scans are called a.mha; expected names that differ"):
        model.predict(None, [paths[0], paths[0]], {"output_path": str(tmp_path / "twice")})
    (answer,) = model.predict(None, paths[:1], {"output_path": paths[2]})
    assert re.search(r"c.nrrd is a file; expected a folder for the masks", answer["error"])


def test_masks_are_written_where_asked_and_nothing_is_overwritten(model, volume, tmp_path):
    write_volume(volume, tmp_path / "scan.mha")
    scan, mask = str(tmp_path / "scan.mha"), tmp_path / "masks/mine.nii.gz"
    result = model.predict(None, scan, {"output_path": str(mask)})
    assert result["written"] == str(mask) and "labels" not in result
    stored = read_volume(mask)
    np.testing.assert_array_equal(stored.array, model.predict(None, scan)["labels"])
    np.testing.assert_allclose(stored.direction, volume.direction, atol=1e-6)  # NIfTI's are float32
    with pytest.raises(MlflowException, match=r"mine.nii.gz is there already; expected a new file.*overwrite=True"):
        model.predict(None, scan, {"output_path": str(mask)})
    model.predict(None, scan, {"output_path": str(mask), "overwrite": True, "labels": "instances"})
    assert read_volume(mask).array.max() > 3
    assert model.predict(None, scan, {"output_path": str(tmp_path)})["written"] == str(tmp_path / "scan_seg.mha")

    target = tmp_path / "probabilities.nrrd"
    model.predict(None, scan, {"output_path": str(target), "output": "probabilities"})
    import SimpleITK as sitk

    image = sitk.ReadImage(str(target))
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(image), model.predict(None, scan, {"output": "probabilities"})["probabilities"]
    )
    np.testing.assert_allclose(image.GetSpacing(), volume.spacing_mm)


def test_a_folder_with_one_dicom_series_is_a_volume(model, make_dicom, make_volume, tmp_path):
    volume = make_volume((5, 9, 7))
    make_dicom(tmp_path / "exam", volume)
    result = model.predict(None, str(tmp_path / "exam"), {"output_path": str(tmp_path / "masks")})
    assert Path(result["written"]).name == "exam_1_seg.nii.gz"
    expected = Segmenter(Bands(), SETTINGS).segment(volume)
    np.testing.assert_array_equal(read_volume(result["written"]).array, expected.array)


def test_a_server_touches_no_file_outside_its_folder(model, volume, tmp_path, monkeypatch):
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    write_volume(volume, outside / "scan.mha")
    write_volume(volume, allowed / "scan.mha")
    (allowed / "link.mha").symlink_to(outside / "scan.mha")
    monkeypatch.setenv("__pyfunc_model_path__", "as MLflow's server has it")
    with pytest.raises(
        MlflowException, match=r"this server reads and writes no files; .*set LUMBARFLOW_ALLOWED_FOLDER"
    ):
        model.predict(None, str(allowed / "scan.mha"))
    monkeypatch.setenv("LUMBARFLOW_ALLOWED_FOLDER", str(allowed))
    assert model.predict(None, str(allowed / "scan.mha"))["labels"].shape == (6, 9, 7)
    for path in (
        outside / "scan.mha",
        allowed / "../outside/scan.mha",
        allowed / "link.mha",
        outside / "none.mha",
        "/",
    ):
        with pytest.raises(MlflowException, match="is not in the allowed folder; expected a path in"):
            model.predict(None, str(path))
        (answer,) = model.predict(None, [str(path)])
        assert "is not in the allowed folder" in answer["error"]
    for target in (outside / "mask.mha", outside, allowed / "../mask.mha"):
        with pytest.raises(MlflowException, match="is not in the allowed folder"):
            model.predict(None, str(allowed / "scan.mha"), {"output_path": str(target)})
    # A link below the allowed folder must not lead a mask out of it either.
    (allowed / "out").symlink_to(outside)
    with pytest.raises(MlflowException, match="is not in the allowed folder"):
        model.predict(None, str(allowed / "scan.mha"), {"output_path": str(allowed / "out")})
    assert sorted(path.name for path in outside.iterdir()) == ["scan.mha"]
    inside = model.predict(None, str(allowed / "scan.mha"), {"output_path": str(allowed)})
    assert Path(inside["written"]).is_file()


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


def test_whatever_goes_wrong_with_one_path_is_told(model, volume, tmp_path, monkeypatch):
    write_volume(volume, tmp_path / "scan.mha")
    (tmp_path / "a.mha").symlink_to(tmp_path / "b.mha")
    (tmp_path / "b.mha").symlink_to(tmp_path / "a.mha")
    monkeypatch.setenv("LUMBARFLOW_ALLOWED_FOLDER", str(tmp_path))
    scan, circle = str(tmp_path / "scan.mha"), str(tmp_path / "a.mha")
    first, second = model.predict(None, [circle, scan])
    assert "no such file; expected an existing file" in first["error"] and second["labels"].shape == (6, 9, 7)
    under_a_file = {"output_path": str(tmp_path / "scan.mha/below/mask.mha")}
    with pytest.raises(
        MlflowException, match=r"it cannot be segmented \(NotADirectoryError: Not a directory\); expected"
    ):
        model.predict(None, scan, under_a_file)


def test_the_second_file_of_a_mask_is_not_overwritten_either(model, volume, tmp_path):
    write_volume(volume, tmp_path / "scan.mha")
    (tmp_path / "mask.zraw").write_text("by hand")
    with pytest.raises(MlflowException, match=r"mask.zraw is there already; expected a new file"):
        model.predict(None, str(tmp_path / "scan.mha"), {"output_path": str(tmp_path / "mask.mhd")})
    assert (tmp_path / "mask.zraw").read_text() == "by hand"


@pytest.mark.parametrize("other", ["below/a.mha", "b/a.MHA"])
def test_two_masks_of_one_name_are_refused(model, tmp_path, other):
    with pytest.raises(MlflowException, match="2 of the scans are called a.mha; expected names that differ"):
        model.predict(None, ["a.mha", other], {"output_path": str(tmp_path), "overwrite": True})


def test_a_series_and_a_file_may_ask_for_one_name_too(model, tmp_path):
    with pytest.raises(MlflowException, match="2 of the scans are called exam_1.nii.gz; expected names that differ"):
        model.predict(None, ["exam", "exam_1.nii.gz"], {"output_path": str(tmp_path), "overwrite": True})
