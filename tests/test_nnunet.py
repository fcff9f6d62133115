"""The exported data set, read by the rules of nnU-Net's documentation alone, and its updates."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import yaml
from kedro.io import DatasetError

from lumbarflow import nnunet
from lumbarflow.datasets.nnunet import NnunetDataset
from lumbarflow.imaging import LabelMap, read_volume, to_sagittal
from lumbarflow.labels import CLASSES
from lumbarflow.nnunet import NnunetStore
from lumbarflow.pipelines.export_nnunet.nodes import export_nnunet
from lumbarflow.store import SeriesStore, Work

ROOT = Path(__file__).parents[1]
SETTINGS = yaml.safe_load((ROOT / "conf/base/parameters_export_nnunet.yml").read_text())["export_nnunet"]
FOLDER = "nnUNet_raw/Dataset301_LumbarSpine"
SIDES = {"1_t1": "train", "1_t2": "train", "2_t2": "validation", "3_t2_SPACE": "test"}
# Storage orders: columns, rows and slices first; the second is left-handed, as scanners' files may be.
DIRECTIONS = [[[0, 0, -1], [1, 0, 0], [0, -1, 0]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], np.eye(3)]


# --- the format, by nnU-Net's documentation ---------------------------------------------------------------------------


def read_image(path: Path) -> sitk.Image:
    return sitk.ReadImage(str(path))


def geometry(image: sitk.Image) -> list[float]:
    return [*image.GetSize(), *image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()]


def check_cases(folder: Path, part: str, facts: dict) -> set[str]:
    """Check images<part> and labels<part>; returns the names of the cases."""
    ending, channels = facts["file_ending"], len(facts["channel_names"])
    images, labels = ({path.name for path in (folder / f"{kind}{part}").iterdir()} for kind in ("images", "labels"))
    cases = {name.removesuffix(ending) for name in labels}
    assert labels == {case + ending for case in cases}
    assert images == {f"{case}_{channel:04d}{ending}" for case in cases for channel in range(channels)}
    for case in cases:
        label = read_image(folder / f"labels{part}" / (case + ending))
        values = sitk.GetArrayFromImage(label)
        assert np.issubdtype(values.dtype, np.integer)
        assert set(np.unique(values)) <= set(facts["labels"].values())
        for channel in range(channels):
            image = read_image(folder / f"images{part}" / f"{case}_{channel:04d}{ending}")
            assert image.GetNumberOfComponentsPerPixel() == 1
            assert np.all(np.isfinite(sitk.GetArrayFromImage(image)))
            assert geometry(image) == geometry(label)
    return cases


def check_format(raw: Path) -> Path:
    """Check the one data set in a folder nnUNet_raw; returns its folder."""
    (folder,) = raw.iterdir()
    number = re.fullmatch(r"Dataset(\d{3})_\w+", folder.name)
    assert number and int(number[1]) > 0
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["labels"]["background"] == 0
    assert sorted(facts["labels"].values()) == list(range(len(facts["labels"])))
    assert list(facts["channel_names"]) == [str(channel) for channel in range(len(facts["channel_names"]))]
    training = check_cases(folder, "Tr", facts)
    assert len(training) == facts["numTraining"] > 0
    if (folder / "imagesTs").exists():
        assert not training & check_cases(folder, "Ts", facts)
    for fold in json.loads((folder / "splits_final.json").read_text()):
        assert set(fold) == {"train", "val"}
        assert fold["train"] and fold["val"] and not set(fold["train"]) & set(fold["val"])
        assert set(fold["train"]) | set(fold["val"]) <= training
        assert all(len(names) == len(set(names)) for names in fold.values())
    return folder


# --- what there is to export ------------------------------------------------------------------------------------------


def make_split(sides: dict[str, str] = SIDES) -> pd.DataFrame:
    rows = [(name.split("_")[0], name, index, side) for name, side in sides.items() for index in range(3)]
    return pd.DataFrame(rows, columns=["patient", "series", "slice", "side"])


@pytest.fixture
def raw(make_volume):
    """Series -> image and classes as their raw files would hold them: other shapes, spacings and storage orders."""
    pairs = {}
    for i, name in enumerate(sorted({*SIDES, "4_t2"})):
        shape, grid = (3 + i, 7, 5), {"spacing_mm": (0.7 + i, 1.1, 4.2), "direction": DIRECTIONS[i % 3]}
        classes = np.random.default_rng(i).integers(0, len(CLASSES), shape)
        image = make_volume(shape, dtype=(np.int16, np.uint16, np.float32)[i % 3], **grid)
        pairs[name] = image, make_volume(shape, kind=LabelMap, dtype=np.uint8, values=classes, **grid)
    return pairs


@pytest.fixture
def series(raw, tmp_path) -> SeriesStore:
    store = SeriesStore(tmp_path / "series")
    store.update({name: ingested(name, *pair) for name, pair in raw.items()})
    return store


def ingested(name, image, labels, key="k", **facts) -> Work:
    sagittal, orientation = to_sagittal(image)
    grid = {"spacing_mm": image.spacing_mm, "origin_mm": image.origin_mm, "direction": image.direction.tolist()}
    record = {"outcome": "accepted", "orientation": orientation.to_dict(), "geometry": grid, "synthetic": True, **facts}
    files = {"image.mha": sagittal, "labels.mha": to_sagittal(labels)[0], "record.json": record}
    return Work(key + name, lambda: files)


@pytest.fixture
def store(tmp_path) -> NnunetStore:
    return NnunetStore(tmp_path / "nnunet")


@pytest.fixture
def run(series, store):
    """Export as the pipeline does."""

    def run(sides=SIDES, **settings):
        NnunetDataset(path=str(store.root)).save(export_nnunet(series, make_split(sides), SETTINGS | settings))
        return check_format(store.root / "nnUNet_raw")

    return run


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what is exported -------------------------------------------------------------------------------------------------


def test_the_data_set_has_nnunets_names_and_test_cases_stand_apart(run, store):
    folder = run()
    assert folder == store.root / FOLDER
    assert names(folder) == {
        "dataset.json",
        "splits_final.json",
        *(f"imagesTr/{name}_0000.nii.gz" for name in ("1_t1", "1_t2", "2_t2")),
        *(f"labelsTr/{name}.nii.gz" for name in ("1_t1", "1_t2", "2_t2")),
        "imagesTs/3_t2_SPACE_0000.nii.gz",
        "labelsTs/3_t2_SPACE.nii.gz",
    }
    split = json.loads((folder / "splits_final.json").read_text())
    assert split == [{"train": ["1_t1", "1_t2"], "val": ["2_t2"]}]
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "vertebrae": 1, "canal": 2, "IVD": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        "name": "LumbarSpine",
        "description": "Synthetic lumbar spine MRI made by lumbarflow, no patients",
    }


@pytest.mark.parametrize(("ending", "precision"), [(".nii.gz", 1e-6), (".mha", 0), (".nrrd", 1e-15)])
def test_every_case_is_its_raw_file_again_voxel_for_voxel(run, raw, ending, precision):
    folder = run(file_ending=ending)
    for name, side in SIDES.items():
        part = "Ts" if side == "test" else "Tr"
        for path, expected in zip(
            (folder / f"images{part}/{name}_0000{ending}", folder / f"labels{part}/{name}{ending}"),
            raw[name],
            strict=True,
        ):
            image = read_image(path)
            array = sitk.GetArrayFromImage(image)
            assert array.dtype == expected.array.dtype and np.array_equal(array, expected.array)
            grid = [*expected.spacing_mm, *expected.origin_mm, *expected.direction.ravel()]
            assert geometry(image)[3:] == pytest.approx(grid, rel=precision, abs=precision)


def test_the_test_side_may_be_left_out(run):
    folder = run()
    assert (folder / "imagesTs").exists()
    run(include_test=False)
    assert not (folder / "imagesTs").exists() and not (folder / "labelsTs").exists()


def test_facts_of_real_scans_are_those_of_the_settings(series, store, raw):
    series.update({name: ingested(name, *pair, key="real", synthetic=False) for name, pair in raw.items()})
    settings = SETTINGS | {"reference": "who and where", "licence": "CC-BY-4.0"}
    documents = export_nnunet(series, make_split(), settings).documents
    facts = documents[f"{FOLDER}/dataset.json"]
    assert facts["description"] == "Lumbar spine MRI"
    assert (facts["reference"], facts["licence"]) == ("who and where", "CC-BY-4.0")


def test_the_readme_names_counts_and_commands_but_no_series(run, store):
    run()
    text = (store.root / "README.txt").read_text()
    assert "imagesTr, labelsTr: 2 series to train, 1 to validate\nimagesTs, labelsTs: 1 series to test" in text
    assert "nnUNetv2_plan_and_preprocess -d 301 --verify_dataset_integrity" in text
    assert f"-i {FOLDER}/imagesTs -o predictions" in text
    assert not any(name in text for name in SIDES)
    run(include_test=False)
    assert "0 series to test" in (store.root / "README.txt").read_text()
    assert "-i IMAGES -o predictions" in (store.root / "README.txt").read_text()


def test_nnunets_own_integrity_check_passes(run):
    integrity = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity",
        reason="nnU-Net is not installed: it pulls CUDA wheels and is no dependency",
        exc_type=ImportError,
    )
    integrity.verify_dataset_integrity(str(run()), num_processes=1)


def test_the_module_imports_neither_kedro_nor_simpleitk():
    code = "import sys, lumbarflow.nnunet; print(sorted({'kedro', 'mlflow', 'SimpleITK'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# --- updates ----------------------------------------------------------------------------------------------------------


def of_the_store(caplog) -> list[str]:
    """What the store said last; others may talk too, as the tests before have left their levels."""
    said = [record for record in caplog.records if record.name == "lumbarflow.store"]
    return [record.getMessage() for record in said][-1:]


def test_only_what_changed_is_written_again(run, series, raw, caplog):
    folder = run()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    with caplog.at_level(logging.INFO, logger="lumbarflow.store"):
        run()
        assert of_the_store(caplog) == ["export_nnunet: 0 made, 4 unchanged and taken from the last run, 0 removed"]
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
        caplog.clear()
        work = {name: ingested(name, *pair) for name, pair in raw.items()}
        series.update(work | {"2_t2": ingested("2_t2", *raw["4_t2"], key="new")})
        caplog.clear()
        run()
        assert of_the_store(caplog) == ["export_nnunet: 1 made, 3 unchanged and taken from the last run, 0 removed"]
    image = read_image(folder / "imagesTr/2_t2_0000.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(image), raw["4_t2"][0].array)


def test_series_follow_the_split(run, store, raw):
    run()
    folder = run({"1_t1": "test", "1_t2": "test", "3_t2_SPACE": "train", "4_t2": "validation"})
    assert names(folder / "imagesTr") == {"3_t2_SPACE_0000.nii.gz", "4_t2_0000.nii.gz"}
    assert names(folder / "labelsTr") == {"3_t2_SPACE.nii.gz", "4_t2.nii.gz"}
    assert names(folder / "imagesTs") == {"1_t1_0000.nii.gz", "1_t2_0000.nii.gz"}
    assert names(folder / "labelsTs") == {"1_t1.nii.gz", "1_t2.nii.gz"}
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": ["3_t2_SPACE"], "val": ["4_t2"]}]
    assert store.series() == ["1_t1", "1_t2", "3_t2_SPACE", "4_t2"]


def test_from_training_to_validation_no_file_moves(run, caplog):
    run()
    with caplog.at_level(logging.INFO, logger="lumbarflow.store"):
        folder = run(SIDES | {"1_t1": "validation", "1_t2": "validation", "2_t2": "train"})
    assert of_the_store(caplog) == ["export_nnunet: 0 made, 4 unchanged and taken from the last run, 0 removed"]
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": ["2_t2"], "val": ["1_t1", "1_t2"]}]


@pytest.mark.parametrize("settings", [{"dataset_id": 7}, {"dataset_name": "Spine"}, {"file_ending": ".mha"}])
def test_another_name_leaves_nothing_of_the_old_one(run, store, settings):
    run()
    before = names(store.root)
    folder = run(**settings)  # checks that it is the only data set
    assert folder.name == f"Dataset{settings.get('dataset_id', 301):03d}_{settings.get('dataset_name', 'LumbarSpine')}"
    assert len(names(store.root)) == len(before)


@pytest.mark.parametrize("lost", ["imagesTr/1_t2_0000.nii.gz", "labelsTs/3_t2_SPACE.nii.gz"])
def test_a_lost_file_is_written_again(run, lost):
    folder = run()
    (folder / lost).unlink()
    run()
    assert (folder / lost).is_file()


def test_a_folder_that_somebody_removed_is_made_again(run, store):
    before = names(run())
    shutil.rmtree(store.root / "nnUNet_raw")
    assert names(run(SIDES)) == before
    shutil.rmtree(store.root / FOLDER / "labelsTs")
    run(include_test=False)


@pytest.mark.parametrize("moment", range(4))
def test_an_interrupted_export_is_no_data_set_and_is_finished_by_the_next(run, store, monkeypatch, moment):
    moved = {"1_t1": "test", "1_t2": "test", "2_t2": "validation", "3_t2_SPACE": "train"}
    run()
    written = []

    def killed(volume, path):
        if len(written) == moment:
            raise KeyboardInterrupt
        written.append(path)
        original(volume, path)

    original = nnunet.write_volume
    monkeypatch.setattr(nnunet, "write_volume", killed)
    with pytest.raises(KeyboardInterrupt):
        run(moved)
    assert not (store.root / FOLDER / "dataset.json").exists()
    monkeypatch.undo()
    folder = run(moved)
    assert names(folder / "imagesTr") == {"2_t2_0000.nii.gz", "3_t2_SPACE_0000.nii.gz"}


@pytest.mark.parametrize(
    "name", ["imagesTr/9_t2_0000.nii.gz", "labelsTs/9_t2.nii.gz", "dataset.json", "splits_final.json"]
)
@pytest.mark.parametrize("dataset", ["Dataset301_LumbarSpine", "Dataset301_Other"])
def test_somebody_elses_data_set_is_an_error_and_stays(run, store, dataset, name):
    theirs = store.root / "nnUNet_raw" / dataset / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    message = rf"1 files that lumbarflow did not write \(nnUNet_raw/{dataset}/{name}, \.\.\.\); expected none in its"
    with pytest.raises(DatasetError, match=message):
        run()
    assert theirs.read_text() == "mine"


def test_files_of_nnunet_itself_and_of_other_data_sets_are_left_alone(run, store, tmp_path):
    folder = run()
    others = [
        "nnUNet_raw/Dataset3011/dataset.json",
        "nnUNet_preprocessed/Dataset301_LumbarSpine/x.npz",
        f"{FOLDER}/p/a",
    ]
    for name in others:
        (store.root / name).parent.mkdir(parents=True)
        (store.root / name).write_text("mine")
    (folder / ".hidden").write_text("mine")
    export = export_nnunet(SeriesStore(tmp_path / "series"), make_split(), SETTINGS | {"dataset_id": 7})
    store.export(export)
    assert all((store.root / name).read_text() == "mine" for name in [*others, f"{FOLDER}/.hidden"])
    assert names(folder) == {"p/a", ".hidden"}


def test_a_store_reads_what_it_wrote(run, store, raw):
    run()
    assert store.record("1_t1")["files"] == [f"{FOLDER}/imagesTr/1_t1_0000.nii.gz", f"{FOLDER}/labelsTr/1_t1.nii.gz"]
    image = store.volume("1_t1", store.record("1_t1")["files"][0])
    assert np.array_equal(image.array, raw["1_t1"][0].array)
    assert read_volume(store.path("1_t1", f"{FOLDER}/labelsTr/1_t1.nii.gz"), LabelMap).array.dtype == np.uint8


# --- what cannot be exported ------------------------------------------------------------------------------------------


def test_a_slice_split_cannot_be_exported(series):
    split = make_split()
    split.loc[[1, 10], "side"] = "test", "train"
    with pytest.raises(ValueError, match=r"2 series stand on several sides.*split.method slice.*split.method=patient"):
        export_nnunet(series, split, SETTINGS)


def test_a_patient_on_two_sides_cannot_be_exported(series):
    with pytest.raises(ValueError, match=r"1 patients stand on more than one side of the split; expected each on one"):
        export_nnunet(series, make_split(SIDES | {"1_t1": "test"}), SETTINGS)


@pytest.mark.parametrize("include_test", [True, False])
def test_a_side_without_series_cannot_be_exported(series, include_test):
    split = make_split({name: side for name, side in SIDES.items() if side != "validation"})
    with pytest.raises(ValueError, match=r"the split leaves validation empty"):
        export_nnunet(series, split, SETTINGS | {"include_test": include_test})


@pytest.mark.parametrize("outcome", [None, "rejected"])
def test_a_split_of_other_series_than_the_ingested_ones_is_an_error(series, raw, outcome):
    work = {name: ingested(name, *pair) for name, pair in raw.items() if name != "2_t2"}
    if outcome:
        work["2_t2"] = ingested("2_t2", *raw["2_t2"], key="new", outcome=outcome)
    series.update(work)
    with pytest.raises(ValueError, match=r"1 series of the split are not among the ingested ones; expected all"):
        export_nnunet(series, make_split(), SETTINGS)


@pytest.mark.parametrize("number", [0, 1000, -1, 3.5, "301", True, None])
def test_an_id_that_nnunet_could_not_use_is_an_error(series, number):
    with pytest.raises(ValueError, match=rf"dataset_id is {number!r}; expected a whole number from 1 to 999"):
        export_nnunet(series, make_split(), SETTINGS | {"dataset_id": number})


@pytest.mark.parametrize("name", ["", "a/b", "..", "lumbar spine", "-x", "é"])
def test_a_name_that_is_no_folder_is_an_error(series, name):
    with pytest.raises(ValueError, match=rf"dataset_name is {re.escape(repr(name))}; expected letters, digits"):
        export_nnunet(series, make_split(), SETTINGS | {"dataset_name": name})


def test_a_lossy_or_unknown_file_ending_is_an_error(series):
    with pytest.raises(ValueError, match=r"file_ending is '.png'; expected one of .nii.gz, .mha, .nrrd"):
        export_nnunet(series, make_split(), SETTINGS | {"file_ending": ".png"})


def test_a_misspelt_setting_is_an_error(series):
    with pytest.raises(ValueError, match=r"unknown setting export_nnunet.licens"):
        export_nnunet(series, make_split(), SETTINGS | {"licens": "MIT"})
