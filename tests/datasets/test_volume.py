"""Volumes, their digests and folders of them, as Kedro loads and saves them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import SimpleITK as sitk
from kedro.io import DataCatalog, DatasetError

from lumbarflow.datasets import DigestDataset, FileFolderDataset, VolumeDataset
from lumbarflow.imaging import LabelMap, Volume, VolumeError, geometry_differences, write_volume

EXACT = {"spacing_mm": 0, "origin_mm": 0, "direction": 0}


@pytest.mark.parametrize("kind, expected", [("image", Volume), ("labels", LabelMap)])
def test_a_volume_comes_back_with_its_geometry(make_volume, tmp_path, kind, expected):
    dataset = VolumeDataset(filepath=str(tmp_path / "1_t2.mha"), kind=kind)
    assert not dataset.exists()
    volume = make_volume()
    dataset.save(volume)
    again = dataset.load()
    assert dataset.exists() and type(again) is expected
    assert np.array_equal(again.array, volume.array) and geometry_differences(volume, again, EXACT) == []


def test_the_catalog_builds_it_by_its_name(make_volume, tmp_path):
    entry = {
        "type": "lumbarflow.datasets.VolumeDataset",
        "filepath": str(tmp_path / "1_t2.nrrd"),
        "kind": "labels",
        "metadata": {"kedro-viz": {"layer": "raw"}},
    }
    catalog = DataCatalog.from_config({"mask": entry})
    catalog.save("mask", make_volume(kind=LabelMap))
    assert type(catalog.load("mask")) is LabelMap
    assert str(tmp_path / "1_t2.nrrd") in str(catalog["mask"])


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"VolumeDataset kind 'mask'; expected one of \['image', 'labels'\]"):
        VolumeDataset(filepath="1_t2.mha", kind="mask")


def test_the_reason_of_a_bad_file_lies_below_kedros_error(tmp_path):
    (tmp_path / "1_t2.mha").write_bytes(b"garbage")
    with pytest.raises(DatasetError, match="no MetaImage header; expected lines of") as caught:
        VolumeDataset(filepath=str(tmp_path / "1_t2.mha")).load()
    assert isinstance(caught.value.__cause__, VolumeError)


def test_a_digest_follows_the_bytes(tmp_path):
    path = tmp_path / "1_t2.nii"
    path.write_bytes(b"one")
    dataset = DigestDataset(filepath=str(path))
    assert dataset.exists() and not DigestDataset(filepath=str(tmp_path / "2_t2.nii")).exists()
    assert dataset.load() == hashlib.blake2b(b"one", digest_size=16).hexdigest()
    path.write_bytes(b"two")
    assert dataset.load() == hashlib.blake2b(b"two", digest_size=16).hexdigest()
    assert str(path) in str(dataset)


def test_a_digest_follows_the_data_file_of_a_header_too(make_volume, tmp_path):
    path = tmp_path / "1_t2.mhd"
    sitk.WriteImage(sitk.GetImageFromArray(make_volume().array), str(path))
    dataset = DigestDataset(filepath=str(path))
    before, header = dataset.load(), path.read_bytes()
    data = bytearray((tmp_path / "1_t2.raw").read_bytes())
    data[7] ^= 1
    (tmp_path / "1_t2.raw").write_bytes(data)
    changed = dataset.load()
    assert changed != before and path.read_bytes() == header
    path.write_bytes(header.replace(b"Offset = 0 0 0", b"Offset = 0 0 9"))
    assert dataset.load() not in (before, changed)


def test_a_digest_cannot_be_saved(tmp_path):
    with pytest.raises(DatasetError, match="a digest is computed from its file; there is nothing to save"):
        DigestDataset(filepath=str(tmp_path / "1_t2.mha")).save("abc")


@pytest.fixture
def folder(tmp_path):
    return FileFolderDataset(path=str(tmp_path / "images"), dataset="lumbarflow.datasets.VolumeDataset")


def test_an_absent_folder_is_empty(folder):
    assert folder.load() == {} and not folder.exists()


def test_a_folder_of_hidden_files_is_empty(folder, tmp_path):
    for name in (".DS_Store", ".partial-x/1_t2.mha"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    assert folder.load() == {} and not folder.exists()


def test_files_are_loaded_one_at_a_time_when_asked_for(folder, make_volume, tmp_path):
    volume = make_volume()
    write_volume(volume, tmp_path / "images/1_t2.nii.gz")
    (tmp_path / "images/2_t2.mha").write_bytes(b"garbage")
    (tmp_path / "images/.hidden.mha").write_bytes(b"garbage")
    loaders = folder.load()  # opens neither
    assert sorted(loaders) == ["1_t2.nii.gz", "2_t2.mha"] and folder.exists()
    assert np.array_equal(loaders["1_t2.nii.gz"]().array, volume.array)
    with pytest.raises(DatasetError, match="2_t2.mha: no MetaImage header"):
        loaders["2_t2.mha"]()


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_files_that_come_later_are_seen(folder, make_volume, tmp_path, there):
    if there:
        (tmp_path / "images").mkdir()
    assert folder.load() == {}
    write_volume(make_volume(), tmp_path / "images/1_t2.mha")
    assert list(folder.load()) == ["1_t2.mha"]


def test_a_hidden_folder_above_hides_nothing(make_volume, tmp_path, monkeypatch):
    write_volume(make_volume(), tmp_path / ".cache/images/1_t2.mha")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / ".cache/images"), ".cache/images", "./.cache/../.cache/images"):
        assert list(FileFolderDataset(path=path, dataset="lumbarflow.datasets.VolumeDataset").load()) == ["1_t2.mha"]


def test_a_volume_that_is_not_on_its_storage_is_named_by_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMBARFLOW_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match="memory://nowhere/1_t2.mha: no such file; expected"):
        VolumeDataset(filepath="memory://nowhere/1_t2.mha").load()
