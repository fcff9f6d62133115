"""The predict pipeline as its users run it: scans of all kinds in, masks, tables and an exit code out."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from lumbarflow import registry
from lumbarflow.imaging import LabelMap, read_volume, write_volume
from lumbarflow.inference import Segmenter

NET = {
    "size": [16, 12],
    "keep_aspect": True,
    "normalisation": "z_score",
    "percentiles": [0.0, 100.0],
    "batch_size": 4,
    "test_time_augmentation": {"shift": 0.0, "rotation_degrees": 0.0},
}


class Bands:
    """Stands in for the net: the four classes by normalised intensity."""

    input_shape = (None, 16, 12, 1)

    def predict(self, images, batch_size, verbose):
        return np.eye(4, dtype=np.float32)[np.digitize(images[..., 0], [-0.5, 0.0, 0.5])]


@pytest.fixture
def champion(monkeypatch) -> Segmenter:
    """What the registry would give (tests/test_registry.py pulls a real one)."""
    segmenter = Segmenter(Bands(), NET)
    asked = []

    def pull(model_uri):
        asked.append(model_uri)
        return registry.RegisteredModel("lumbar-unet version 4", "digest", segmenter)

    monkeypatch.setattr(registry, "pull", pull)
    segmenter.asked = asked
    return segmenter


@pytest.fixture
def scans(tmp_path_factory, make_volume, make_dicom):
    """Two volumes and two DICOM series, one of them enhanced."""
    folder = tmp_path_factory.mktemp("scans")
    write_volume(make_volume((5, 9, 7)), folder / "1_t2.nii.gz")
    write_volume(make_volume((6, 8, 9)), folder / "clinic/2_t2.mha")
    make_dicom(folder / "exam", make_volume((5, 9, 7)), shuffled=True)
    make_dicom(folder / "other", make_volume((5, 9, 7)), enhanced=True)
    (folder / "notes.txt").write_text("not a scan")
    return folder


def test_every_scan_gets_a_mask_on_its_grid_and_a_row(kedro_run, champion, scans, tmp_path, make_dicom, caplog):
    output = tmp_path / "masks"
    arguments = {"scans": str(scans), "output": str(output), "dicom_segmentation": True}
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("predict", **arguments)
    assert champion.asked == ["models:/lumbar-unet@champion"]
    rows = pd.read_csv(output / "predictions.csv").set_index("scan")
    assert rows.index.tolist() == ["1_t2", "clinic/2_t2", "exam_1", "other_1"]
    assert set(rows["outcome"]) == {"segmented"} and set(rows["model"]) == {"lumbar-unet version 4"}
    for scan, suffix in (("1_t2", ".nii.gz"), ("clinic/2_t2", ".mha")):
        image = read_volume(scans / f"{scan}{suffix}")
        mask = read_volume(output / f"{scan}_seg{suffix}", LabelMap)
        np.testing.assert_array_equal(mask.array, champion.segment(image).array)
        np.testing.assert_array_equal(mask.direction, image.direction)
        assert mask.origin_mm == image.origin_mm and mask.spacing_mm == image.spacing_mm
    # Both are the same volume in other clothes.
    assert (output / "exam_1_seg.dcm").is_file() and (output / "other_1_seg.dcm").is_file()
    masks = [read_volume(output / f"{scan}_seg.nii.gz", LabelMap).array for scan in ("exam_1", "other_1")]
    np.testing.assert_array_equal(*masks)
    assert (output / "clinic/2_t2_preview.png").is_file() and (output / "exam_1_measurements.png").is_file()
    assert set(catalog.load("scan_measurements")["scan"]) == set(rows.index)
    assert "4 scans segmented, 0 not" in caplog.text and "passed over 1" in caplog.text

    # Nothing of a header has got out: not into the log, tables or names.
    said = caplog.text + (output / "predictions.csv").read_text() + (output / "measurements.csv").read_text()
    said += " ".join(path.as_posix() for path in output.rglob("*"))
    said += "".join(path.read_text() for path in (output / ".predictions").rglob("*.json"))
    for identifier in make_dicom.identifiers:
        assert str(identifier) not in said

    # Given again, nothing is done twice.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kedro_run("predict", **arguments)
    assert "predict: 0 made, 4 unchanged" in caplog.text


def test_a_bad_scan_fails_the_command_at_its_end_and_only_there(kedro_run, champion, scans, tmp_path, caplog):
    (scans / "0_broken.nrrd").write_bytes(b"NRRD0004\nnothing")
    output = tmp_path / "masks"
    with pytest.raises(ValueError, match=r"1 of 5 scans were not segmented, such as 0_broken; .* in predictions.csv"):
        kedro_run("predict", scans=str(scans), output=str(output), **{"predict": {"preview": False}})
    rows = pd.read_csv(output / "predictions.csv").set_index("scan")
    assert rows["outcome"].value_counts().to_dict() == {"segmented": 4, "failed": 1}
    assert rows.loc["0_broken", ["found", "expected", "what_to_do"]].notna().all()
    assert (output / "exam_1_seg.nii.gz").is_file()
    assert "0_broken" in caplog.text
    # Mended by removal, the rest is done already.
    (scans / "0_broken.nrrd").unlink()
    kedro_run("predict", scans=str(scans), output=str(output), **{"predict": {"preview": False}})


def test_scans_that_are_numbers_fail_the_command_as_well(kedro_run, champion, make_volume, tmp_path):
    # Read back from the table, 2 and NA are no longer what the plan calls them, unless told so.
    write_volume(make_volume((5, 9, 7)), tmp_path / "scans/1.mha")
    (tmp_path / "scans/2.mha").write_bytes(b"nothing")
    arguments = {"scans": str(tmp_path / "scans"), "output": str(tmp_path / "masks")}
    with pytest.raises(ValueError, match=r"1 of 2 scans were not segmented, such as 2;"):
        kedro_run("predict", **arguments, **{"predict": {"preview": False, "measurements": False}})


def test_short_names_of_parameters_and_other_versions(kedro_run, champion, scans, tmp_path):
    output = scans / "masks"  # below the scans: left out of them
    arguments = {"scans": str(scans), "output": str(output), "model_uri": "models:/lumbar-unet/3"}
    kedro_run("predict", labels="instances", **arguments)
    assert champion.asked == ["models:/lumbar-unet/3"]
    before = read_volume(output / "1_t2_seg.nii.gz", LabelMap).array
    assert before.max() > 3
    with pytest.raises(ValueError, match="4 of 4 scans were not segmented"):
        kedro_run("predict", **arguments)
    np.testing.assert_array_equal(read_volume(output / "1_t2_seg.nii.gz", LabelMap).array, before)
    kedro_run("predict", overwrite=True, **arguments)
    assert read_volume(output / "1_t2_seg.nii.gz", LabelMap).array.max() == 3


def test_folders_that_make_no_sense_are_named(kedro_run, champion, scans, tmp_path):
    from kedro.io import DatasetError

    with pytest.raises(DatasetError, match=r"the scans lie in the output folder .*; expected a folder of its own"):
        kedro_run("predict", scans=str(scans), output=str(scans))
    with pytest.raises(DatasetError, match="no such folder"):
        kedro_run("predict", scans=str(tmp_path / "nowhere"), output=str(tmp_path / "masks"))


def test_without_a_registered_model_it_says_how_to_get_one(kedro_run, scans, tmp_path):
    from kedro.io import DatasetError

    with pytest.raises(
        DatasetError, match=r"has no models:/lumbar-unet@champion; expected a registered model\. .*train"
    ):
        kedro_run("predict", scans=str(scans), output=str(tmp_path / "masks"))
    with pytest.raises(DatasetError, match=r"model_uri is 'champion'; expected models:/<name>@<alias>"):
        kedro_run("predict", scans=str(scans), output=str(tmp_path / "masks"), model_uri="champion")
