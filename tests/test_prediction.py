"""Scans to masks and rows: what is written, what is left alone, and what one bad scan does to the others (nothing)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from lumbarflow import parallel, prediction
from lumbarflow.imaging import LabelMap, Volume, VolumeError, read_volume, to_sagittal, write_volume
from lumbarflow.inference import Segmenter
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.parallel import Workers
from lumbarflow.phantom import plan_cohort, render
from lumbarflow.prediction import PredictionFolder, plan_predictions, segment_volume, tables
from lumbarflow.scans import find_scans

ROOT = Path(__file__).parents[1]
NET = {"size": [16, 12], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100], "batch_size": 2}
SETTINGS = {
    "labels": "classes",
    "overwrite": False,
    "preview": False,
    "measurements": False,
    "dicom_segmentation": False,
    "test_time_augmentation": "as_evaluated",
    "disagreement": False,
    "low_confidence": 0.9,
    "limits": {"minimum_slices": 2, "slice_spacing_mm": [0.1, 9.0], "pixel_spacing_mm": [0.1, 9.0]},
}


class Bands:
    """Stands in for the net: the classes by normalised intensity, parted at -0.5, 0 and 0.5, rather sure of each."""

    input_shape = (None, 16, 12, 1)
    sure = 0.97

    def predict(self, images, batch_size, verbose):
        chosen = np.eye(4, dtype=np.float32)[np.digitize(images[..., 0], [-0.5, 0.0, 0.5])]
        return np.where(chosen > 0, np.float32(self.sure), np.float32((1 - self.sure) / 3))


@pytest.fixture
def segmenter():
    return Segmenter(Bands(), NET)


@pytest.fixture
def scans_folder(tmp_path, make_volume) -> Path:
    """Three scans in three formats and storage orders, one of them in a folder below."""
    folder = tmp_path / "scans"
    turned = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]
    write_volume(make_volume((5, 9, 7)), folder / "a.nii.gz")
    write_volume(make_volume((4, 8, 6), direction=np.array(turned, float)), folder / "clinic/b.mha")
    write_volume(make_volume((6, 5, 9), direction=np.eye(3)), folder / "c.nrrd")
    return folder


@pytest.fixture(scope="module")
def synthetic_series():
    """Plan, image and mask of one synthetic T2 series."""
    settings = yaml.safe_load((ROOT / "conf/base/parameters_synthesize.yml").read_text())["synthesize"]
    settings |= {"patients": 1, "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0}}
    (plan,) = plan_cohort(settings)
    return plan, *render(plan, settings)


def run(scans_folder, output, segmenter, model="net 1", digest="1", workers=None, **changes):
    """Plan and do the work, as the pipeline's datasets do; returns the folder, the tables and what was planned."""
    settings = SETTINGS | changes
    folder = PredictionFolder(output)
    sources = find_scans(scans_folder, output)
    work, index = plan_predictions(sources, segmenter, model, digest, folder, settings)
    update = folder.update(work, "predict", keep_others=True, workers=workers)
    return folder, *tables(folder, index), update


def row_of(rows, scan):
    return rows.set_index("scan").loc[scan]


def test_masks_lie_on_the_scans_own_grids_in_their_own_formats(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    _, rows, measured, update = run(scans_folder, output, segmenter)
    assert sorted(update.made) == ["a", "c", "clinic/b"]
    assert {path.relative_to(output).as_posix() for path in output.rglob("*.*") if ".predictions" not in str(path)} == {
        "a_seg.nii.gz", "c_seg.nrrd", "clinic/b_seg.mha",
    }  # fmt: skip
    for name, suffix in (("a", ".nii.gz"), ("clinic/b", ".mha"), ("c", ".nrrd")):
        image = read_volume(scans_folder / f"{name}{suffix}")
        mask = read_volume(output / f"{name}_seg{suffix}", LabelMap)
        assert mask.size == image.size
        assert mask.spacing_mm == image.spacing_mm and mask.origin_mm == image.origin_mm
        np.testing.assert_array_equal(mask.direction, image.direction)
        # Voxel by voxel what the segmenter says of the sagittal slices.
        sagittal, orientation = to_sagittal(image)
        expected = segmenter.labels(sagittal.array, (sagittal.spacing_mm[1], sagittal.spacing_mm[0]))
        np.testing.assert_array_equal(mask.array, orientation.restore(expected))
        assert set(np.unique(mask.array)) == {0, 1, 2, 3}
        # 0.75 x 1.3 x 3.9 mm a voxel.
        row = row_of(rows, name)
        for index, label in enumerate(("vertebrae", "canal", "IVD"), start=1):
            expected = np.count_nonzero(mask.array == index) * 0.75 * 1.3 * 3.9 / 1000
            assert row[f"volume_ml_{label}"] == pytest.approx(expected, abs=5e-4)
        assert row["outcome"] == "segmented" and row["model"] == "net 1"
    assert list(rows.columns) == list(prediction.COLUMNS)
    assert measured.empty


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_side_by_side_masks_are_the_same_to_the_byte(scans_folder, tmp_path, make_graph, monkeypatch, backend):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)
    (scans_folder / "broken.mha").write_bytes((scans_folder / "clinic/b.mha").read_bytes()[:-30])
    segmenter, found = Segmenter(OnnxNetwork(make_graph((16, 12))), NET), []
    for workers in (Workers(workers=1), Workers(backend, 2)):
        output = tmp_path / f"masks-{len(found)}"
        folder, rows, measured, update = run(
            scans_folder, output, segmenter, workers=workers, measurements=True, preview=True
        )
        assert (sorted(update.made), update.failed) == (["a", "c", "clinic/b"], ["broken"])
        files = {path.relative_to(output): path for path in output.rglob("*") if path.is_file()}
        contents = {name: path.read_bytes() for name, path in files.items() if path.suffix != ".json"}
        # How long it took is told too.
        found.append((contents, rows.drop(columns="seconds").to_csv(), measured.to_csv()))
    assert found[1] == found[0] and len(found[0][0]) == 3 * 3


def test_a_net_that_onnx_lacks_stays_in_this_process(scans_folder, tmp_path, segmenter, monkeypatch, caplog):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)
    caplog.set_level("INFO", logger="lumbarflow")
    *_, update = run(scans_folder, tmp_path / "masks", segmenter, workers=Workers("loky", 2))
    assert len(update.made) == 3
    assert "predict: in this process alone, others cannot be sent it (PicklingError: ONNX Runtime" in caplog.messages[0]


def test_a_bad_scan_is_reported_and_the_others_go_on(scans_folder, tmp_path, segmenter):
    (scans_folder / "broken.mha").write_bytes((scans_folder / "clinic/b.mha").read_bytes()[:-30])
    constant = read_volume(scans_folder / "a.nii.gz")
    write_volume(constant.with_array(np.full_like(constant.array, 7)), scans_folder / "flat.nii")
    _, rows, _, update = run(scans_folder, tmp_path / "masks", segmenter)
    assert row_of(rows, "broken")["outcome"] == row_of(rows, "flat")["outcome"] == "failed"
    assert (rows["outcome"] == "segmented").sum() == 3
    assert "constant" in row_of(rows, "flat")["found"] and row_of(rows, "flat")["what_to_do"]
    assert row_of(rows, "broken")["file"] == "broken.mha"
    assert sorted(update.failed) == ["broken", "flat"] and len(update.made) == 3
    assert not (tmp_path / "masks/broken_seg.mha").exists()
    # Tried again next time, and done when it has been mended; what is done stays.
    write_volume(constant, scans_folder / "flat.nii")
    _, rows, _, update = run(scans_folder, tmp_path / "masks", segmenter)
    assert (update.made, update.failed) == (["flat"], ["broken"]) and len(update.reused) == 3
    assert row_of(rows, "flat")["outcome"] == "segmented"


def test_what_nobody_foresaw_is_one_scans_trouble_too(scans_folder, tmp_path, segmenter, monkeypatch):
    real = prediction.segment_volume

    def fail(segmenter, volume, disagreement=False):
        if volume.size == (6, 8, 4):
            raise RuntimeError("a cosmic ray")
        if volume.size == (7, 9, 5):
            raise MemoryError
        return real(segmenter, volume, disagreement)

    monkeypatch.setattr(prediction, "segment_volume", fail)
    _, rows, _, _ = run(scans_folder, tmp_path / "masks", segmenter)
    assert row_of(rows, "clinic/b")["found"] == "it cannot be segmented (RuntimeError: a cosmic ray)"
    assert row_of(rows, "a")["found"] == "too large for the memory"
    assert row_of(rows, "c")["outcome"] == "segmented"


def test_outputs_that_cannot_be_written_are_one_scans_trouble_too(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    output.mkdir()
    (output / "clinic").write_text("a file where a folder has to be")
    _, rows, _, _ = run(scans_folder, output, segmenter)
    assert "its outputs cannot be written (FileExistsError" in row_of(rows, "clinic/b")["found"]
    assert row_of(rows, "a")["outcome"] == row_of(rows, "c")["outcome"] == "segmented"
    (output / "clinic").unlink()
    _, rows, _, update = run(scans_folder, output, segmenter)
    assert update.made == ["clinic/b"] and set(rows["outcome"]) == {"segmented"}


def test_nothing_is_overwritten_unless_allowed(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    run(scans_folder, output, segmenter)
    before = (output / "a_seg.nii.gz").read_bytes()
    (output / "c_seg.nrrd").unlink()

    # Another model: earlier masks and figures stay, and the row says so. What is missing is made.
    other = Segmenter(Bands(), NET | {"size": [12, 12]})
    other.model.input_shape = (None, 12, 12, 1)
    _, rows, _, update = run(scans_folder, output, other, model="net 2", digest="2")
    assert update.made == ["c"]
    row = row_of(rows, "a")
    assert row["outcome"] == "kept" and row["model"] == "net 1" and row["volume_ml_canal"] > 0
    assert "made by net 1" in row["found"] and "overwrite=true" in row["what_to_do"]
    assert (output / "a_seg.nii.gz").read_bytes() == before

    _, rows, _, update = run(scans_folder, output, other, model="net 2", digest="2", overwrite=True)
    assert sorted(update.made) == ["a", "clinic/b"] and update.reused == ["c"]
    assert set(rows["model"]) == {"net 2"} and set(rows["outcome"]) == {"segmented"}


def test_what_a_new_mask_comes_without_is_removed_with_the_old_one(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    run(scans_folder, output, segmenter, preview=True)
    assert (output / "a_preview.png").is_file()
    (output / "a_notes.png").write_text("by hand")
    run(scans_folder, output, segmenter, model="net 2", digest="2", overwrite=True)
    assert (output / "a_seg.nii.gz").is_file() and not (output / "a_preview.png").exists()
    assert (output / "a_notes.png").read_text() == "by hand"


def test_somebody_elses_mask_is_not_overwritten(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    output.mkdir()
    (output / "a_seg.nii.gz").write_text("by hand")
    _, rows, _, update = run(scans_folder, output, segmenter)
    assert sorted(update.made) == ["c", "clinic/b"]
    row = row_of(rows, "a")
    assert row["outcome"] == "kept" and "a_seg.nii.gz is there already, and not from here" in row["found"]
    assert (output / "a_seg.nii.gz").read_text() == "by hand"


def test_somebody_elses_table_is_not_overwritten(scans_folder, tmp_path, segmenter):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/measurements.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"measurements.csv is there already, and not from here; expected a folder"):
        run(scans_folder, tmp_path / "masks", segmenter)


def test_a_changed_scan_changed_settings_and_lost_files_are_noticed(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    run(scans_folder, output, segmenter)
    (output / "c_seg.nrrd").unlink()
    _, _, _, update = run(scans_folder, output, segmenter)
    assert update.made == ["c"]
    image = read_volume(scans_folder / "a.nii.gz")
    write_volume(image.with_array(image.array[::-1].copy()), scans_folder / "a.nii.gz")
    _, rows, _, update = run(scans_folder, output, segmenter)
    assert not update.made and row_of(rows, "a")["outcome"] == "kept"
    _, _, _, update = run(scans_folder, output, segmenter, overwrite=True, labels="instances")
    assert sorted(update.made) == ["a", "c", "clinic/b"]


def test_a_scan_that_was_cut_short_is_made_again(scans_folder, tmp_path, segmenter, monkeypatch):
    real = prediction.write_json

    def stop_before_the_last_word(path, value):
        if value.get("key") is not None and path.name == "c.json":
            raise KeyboardInterrupt
        real(path, value)

    output = tmp_path / "masks"
    with monkeypatch.context() as context:
        context.setattr(prediction, "write_json", stop_before_the_last_word)
        with pytest.raises(KeyboardInterrupt):
            run(scans_folder, output, segmenter)
    assert (output / "c_seg.nrrd").is_file()
    _, rows, _, update = run(scans_folder, output, segmenter)
    assert "c" in update.made and set(rows["outcome"]) == {"segmented"}


def test_masks_of_another_run_stay_in_the_table(scans_folder, tmp_path, segmenter, make_volume):
    output = tmp_path / "masks"
    run(scans_folder, output, segmenter)
    write_volume(make_volume((4, 8, 6)), tmp_path / "more/d.mha")
    _, rows, _, update = run(tmp_path / "more", output, segmenter)
    assert update.made == ["d"] and not update.removed
    assert rows["scan"].tolist() == ["a", "c", "clinic/b", "d"]


@pytest.mark.parametrize(
    ("values", "sure", "warning"),
    [
        (None, 0.97, ""),
        (None, 0.28, r"low confidence \(mean entropy vertebrae 1.00, canal 1.00, IVD 1.00; usual below 0.9\)"),
        ("no IVD", 0.97, "found no IVD"),
        ("dark", 0.97, "no spine found"),
    ],
)
def test_what_to_look_at_is_said(tmp_path, make_volume, segmenter, monkeypatch, values, sure, warning):
    # -(0.28 ln 0.28 + 0.72 ln 0.24) / ln 4 = 0.998; interpolation between bands adds a little.
    monkeypatch.setattr(Bands, "sure", sure)
    if values is not None:
        cut = {"no IVD": [-0.5, 0.0, 99], "dark": [99, 99.5, 99.9]}[values]
        monkeypatch.setattr(
            Bands, "predict", lambda self, images, **_: np.eye(4, dtype=np.float32)[np.digitize(images[..., 0], cut)]
        )
    write_volume(make_volume((5, 9, 7)), tmp_path / "scans/a.mha")
    _, rows, _, _ = run(tmp_path / "scans", tmp_path / "masks", segmenter)
    assert re.fullmatch(warning, rows["warnings"].item()), rows["warnings"].item()


def test_augmentation_is_chosen_by_a_word(segmenter):
    choose = prediction.choose_augmentation
    assert choose(segmenter, "as_evaluated") is segmenter
    assert choose(segmenter, "on").augmented and not choose(segmenter, "off").augmented
    registered = segmenter.with_test_time_augmentation({"rotation_degrees": 5.0})
    assert choose(registered, "on") is registered and choose(registered, "as_evaluated") is registered
    assert not choose(registered, "off").augmented
    with pytest.raises(ValueError, match=r"test_time_augmentation is 'yes'; expected one of as_evaluated, on, off"):
        choose(segmenter, "yes")


def test_disagreement_is_measured_when_asked_for(scans_folder, tmp_path, segmenter):
    _, rows, _, _ = run(scans_folder, tmp_path / "masks", segmenter, disagreement=True)
    assert ((rows["disagreement_canal"] >= 0) & (rows["disagreement_canal"] <= 1)).all()
    _, rows, _, _ = run(scans_folder, tmp_path / "others", segmenter)
    assert rows["disagreement_canal"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "both"}, r"predict.labels is 'both'; expected one of classes, instances"),
        ({"overwrite": "yes"}, r"predict.overwrite is 'yes'; expected true or false"),
        ({"low_confidence": 2}, r"predict.low_confidence is 2; expected a number from 0 to 1"),
        ({"test_time_augmentation": "always"}, r"predict.test_time_augmentation is 'always'; expected one of"),
        ({"label": "classes"}, r"unknown setting predict.label"),
        ({"limits": SETTINGS["limits"] | {"slices": 3}}, r"unknown setting predict.limits.slices"),
    ],
)
def test_settings_that_make_no_sense_stop_before_any_scan(scans_folder, tmp_path, segmenter, change, message):
    with pytest.raises(ValueError, match=message):
        run(scans_folder, tmp_path / "masks", segmenter, **change)


def test_records_name_no_folder_of_this_machine(scans_folder, tmp_path, segmenter):
    folder, _, _, _ = run(scans_folder, tmp_path / "masks", segmenter)
    for name in folder.series():
        assert str(tmp_path) not in json.dumps(folder.record(name))


def test_instances_and_measurements_of_a_phantom(tmp_path, synthetic_series):
    """A net that finds everything: its masks are the truth, so ids and counts must be too."""
    plan, image, truth = synthetic_series
    sagittal_truth, _ = to_sagittal(truth)

    class Truth:
        model = None

        def segmentation(self, slices, spacing, disagreement=None):
            from lumbarflow.inference import Segmentation
            from lumbarflow.labels import LabelTable

            table = LabelTable({"vertebrae": ["1-25", "101-125"], "canal": [100], "IVD": ["201-225"]})
            labels = table.classes(sagittal_truth.array)
            return Segmentation(labels, dict.fromkeys(("vertebrae", "canal", "IVD"), 0.1), None)

    write_volume(image, tmp_path / "scans/p.mha")
    settings = {"labels": "instances", "preview": True, "measurements": True}
    _, rows, measured, _ = run(tmp_path / "scans", tmp_path / "masks", Truth(), **settings)
    mask = read_volume(tmp_path / "masks/p_seg.mha", LabelMap)
    partial = (truth.array > 100) & (truth.array < 200)
    expected = np.where(partial, truth.array - 100, truth.array)
    agree = mask.array == expected
    assert agree[expected > 0].mean() > 0.98 and ((mask.array > 0) == (expected > 0)).mean() > 0.999
    row = rows.iloc[0]
    ids = np.unique(expected)
    assert (row["vertebrae"], row["discs"]) == (np.sum((ids > 0) & (ids < 100)), np.sum(ids > 200))
    assert row["discs"] == plan.discs
    assert row["outcome"] == "segmented"
    for name in ("preview", "measurements"):
        assert (tmp_path / f"masks/p_{name}.png").stat().st_size > 10_000
    assert set(measured["scan"]) == {"p"}
    assert {"disc", "vertebra", "spine"} == set(measured["structure"])
    canals = measured.loc[measured["quantity"] == "canal_ap", "value"].dropna()
    assert len(canals) >= 5 and canals.between(8, 30).all()


def test_a_volume_that_is_no_error_of_ours_keeps_its_message():
    error = VolumeError("x.mha", "2 dimensions", "3", "Export it.")
    assert prediction.problem_of("x.mha", error) is error


def test_probabilities_lie_on_the_scans_own_grid(make_volume, segmenter):
    volume = make_volume((4, 8, 6))
    probabilities = prediction.probabilities(segmenter, volume)
    assert probabilities.shape == (4, 8, 6, 4) and probabilities.dtype == np.float32
    done = segment_volume(segmenter, volume)
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), done.restore(done.classes.array).array)
    assert isinstance(done.image, Volume)


def with_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def a_series(folder, make_dicom, volume, **options):
    return make_dicom(folder / "x", volume, **options)


def with_nan(volume):
    values = volume.array.astype(np.float32)
    values[1, 2, 3] = np.nan
    return volume.with_array(values)


def store_array(array, path, **vector):
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(array, **vector), str(path))


BAD = {
    "truncated DICOM": (
        lambda f, v, d: with_bytes(a_series(f, d, v)[2], lambda b: b[:-40]), "IM0003.dcm", "86 bytes of pixels"
    ),
    "mixed orientations": (
        lambda f, v, d: a_series(
            f, d, v, edit=lambda s, k: setattr(s, "ImageOrientationPatient", [1, 0, 0, 0, k % 2, 1 - k % 2])
        ),
        "x", "slices of 2 orientations",
    ),
    "duplicates": (lambda f, v, d: a_series(f, d, v, duplicate=1), "x", "IM0002.dcm and IM0006.dcm both at"),
    "missing slices": (lambda f, v, d: a_series(f, d, v, missing=[1]), "x", "a gap of 7.80 mm between IM0001.dcm"),
    "DICOM in colour": (
        lambda f, v, d: a_series(
            f, d, v, edit=lambda s, k: [setattr(s, "SamplesPerPixel", 3), setattr(s, "PixelData", s.PixelData * 3)]
        ),
        "IM0001.dcm", "a colour image",
    ),
    "CT": (lambda f, v, d: a_series(f, d, v, modality="CT"), "IM0001.dcm", "Modality CT"),
    "zero spacing in DICOM": (
        lambda f, v, d: a_series(f, d, v, edit=lambda s, k: setattr(s, "PixelSpacing", [0, 1])),
        "IM0001.dcm", "PixelSpacing 0 1 mm",
    ),
    "one DICOM slice": (lambda f, v, d: a_series(f, d, v, missing=[1, 2, 3, 4]), "IM0001.dcm", "a single slice"),
    "colour": (
        lambda f, v, d: store_array(np.ones((4, 5, 6, 3), np.uint8), f / "x.mha", isVector=True),
        "x.mha", "3 values per voxel",
    ),
    "2-D": (lambda f, v, d: store_array(v.array[0], f / "x.nrrd"), "x.nrrd", "2 dimensions"),
    "4-D": (
        lambda f, v, d: store_array(np.stack([v.array] * 2), f / "x.nii", isVector=False), "x.nii", "4 dimensions"
    ),
    "not finite": (lambda f, v, d: write_volume(with_nan(v), f / "x.mha"), "x.mha", "1 voxels that aren't finite"),
    "constant": (
        lambda f, v, d: write_volume(v.with_array(np.full_like(v.array, 7)), f / "x.mha"), "x.mha", "constant value 7"
    ),
    "negative spacing": (
        lambda f, v, d: [
            write_volume(v, f / "x.mha"),
            with_bytes(f / "x.mha", lambda b: b.replace(b"ElementSpacing = 0.75", b"ElementSpacing = -0.75")),
        ],
        "x.mha", "spacing -0.75 1.3 3.9 mm",
    ),
    "voxels outside": (
        lambda f, v, d: [
            write_volume(v, f / "x.mhd"), with_bytes(f / "x.mhd", lambda b: b.replace(b"x.zraw", b"../x.zraw")),
        ],
        "x.mhd", "its ElementDataFile points outside its folder",
    ),
    "a link out": (
        lambda f, v, d: [write_volume(v, f.parent / "o.mha"), (f / "x.mha").symlink_to(f.parent / "o.mha")],
        "x.mha", "a link that leads out",
    ),
    "a name that is not UTF-8": (
        lambda f, v, d: [write_volume(v, f / "x.mha"), os.rename(f / "x.mha", os.fsencode(f) + b"/x\xff.mha")],
        r"x\xff.mha", "a name that is not UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "file", "found"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_scan_arrives_in_the_table(
    tmp_path, make_volume, make_dicom, segmenter, make, file, found
):
    folder = tmp_path / "scans"
    write_volume(make_volume((5, 9, 7)), folder / "good.nii")
    make(folder, make_volume((5, 9, 7)), make_dicom)
    _, rows, _, _ = run(folder, tmp_path / "masks", segmenter)
    good, bad = row_of(rows, "good"), rows[rows["scan"] != "good"].iloc[0]
    assert len(rows) == 2 and good["outcome"] == "segmented" and bad["outcome"] == "failed"
    assert bad["file"] == file and found in bad["found"] and bad["expected"] and bad["what_to_do"]
    assert not [known for known in make_dicom.identifiers if known in rows.to_csv()]


def test_the_second_file_of_a_header_is_not_overwritten_and_missed_when_gone(tmp_path, make_volume, segmenter):
    write_volume(make_volume((5, 9, 7)), tmp_path / "scans/a.mhd")
    voxels = tmp_path / "masks/a_seg.zraw"
    voxels.parent.mkdir()
    voxels.write_text("by hand")
    _, rows, _, _ = run(tmp_path / "scans", tmp_path / "masks", segmenter)
    assert rows["outcome"].item() == "kept" and "a_seg.zraw is there already" in rows["found"].item()
    assert voxels.read_text() == "by hand"
    voxels.unlink()
    run(tmp_path / "scans", tmp_path / "masks", segmenter)
    voxels.unlink()
    _, _, _, update = run(tmp_path / "scans", tmp_path / "masks", segmenter)
    assert update.made == ["a"] and voxels.is_file()


def test_an_output_that_is_gone_is_made_again_and_the_others_stay(scans_folder, tmp_path, segmenter):
    output = tmp_path / "masks"
    run(scans_folder, output, segmenter, preview=True)
    (output / "c_preview.png").unlink()
    (output / "c_seg.nrrd").write_text("corrected by hand")
    _, rows, _, update = run(scans_folder, output, segmenter, preview=True)
    assert update.made == ["c"] and set(rows["outcome"]) == {"segmented"}
    assert (output / "c_preview.png").is_file() and (output / "c_seg.nrrd").read_text() == "corrected by hand"


def test_a_scan_that_was_cut_short_is_not_told_as_segmented(
    scans_folder, tmp_path, segmenter, monkeypatch, make_volume
):
    real = prediction.write_volume

    def stop(volume, path):
        if path.name == "c_seg.nrrd":
            raise KeyboardInterrupt
        real(volume, path)

    with monkeypatch.context() as context:
        context.setattr(prediction, "write_volume", stop)
        with pytest.raises(KeyboardInterrupt):
            run(scans_folder, tmp_path / "masks", segmenter)
    write_volume(make_volume((4, 8, 6)), tmp_path / "more/d.mha")
    _, rows, _, _ = run(tmp_path / "more", tmp_path / "masks", segmenter)
    row = row_of(rows, "c")
    assert row["outcome"] == "failed" and "the run was interrupted" in row["found"]
    assert row_of(rows, "d")["outcome"] == "segmented"


def test_an_error_of_the_system_names_no_folder_of_this_machine(tmp_path):
    error = OSError(28, "No space left on device", str(tmp_path))
    problem = prediction.problem_of("a.mha", error)
    assert problem.found == "it cannot be segmented (OSError: No space left on device)"


def test_dicom_files_may_have_names_that_are_not_utf8(tmp_path, make_volume, make_dicom, segmenter):
    for number, file in enumerate(make_dicom(tmp_path / "scans/x", make_volume((5, 9, 7)))):
        os.rename(file, os.fsencode(file.parent) + b"/\xff%d" % number)
    _, rows, _, _ = run(tmp_path / "scans", tmp_path / "masks", segmenter)
    assert rows["outcome"].item() == "segmented"
    with_bytes(next((tmp_path / "scans/x").iterdir()), lambda content: content[:-40])
    _, rows, _, _ = run(tmp_path / "scans", tmp_path / "masks", segmenter, overwrite=True)
    assert rows["outcome"].item() == "failed" and re.fullmatch(r"\\xff\d", rows["file"].item())


def test_what_a_killed_run_leaves_is_no_scan(scans_folder, tmp_path, segmenter):
    (tmp_path / "masks/.predictions").mkdir(parents=True)
    (tmp_path / "masks/.predictions/.partial-abcdefgha.json").touch()
    _, rows, _, _ = run(scans_folder, tmp_path / "masks", segmenter)
    assert rows["scan"].tolist() == ["a", "c", "clinic/b"]
