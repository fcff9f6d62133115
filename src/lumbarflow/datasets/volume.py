"""Volumes as Kedro datasets: one file, or a folder of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets.partitions import PartitionedDataset

from lumbarflow.files import file_digest
from lumbarflow.imaging import LabelMap, Volume, VolumeError, read_volume, volume_files, write_volume, written_files
from lumbarflow.storage import WorkingCopy, errors_told, folder_of, is_remote, joined

KINDS = {"image": Volume, "labels": LabelMap}


def _pulled(folder: WorkingCopy, name: str) -> list[Path]:
    """A volume's files on this machine, the named one first."""
    folder.pull([name])
    if folder.is_remote and not (folder.path / name).is_file():
        raise VolumeError(
            joined(folder.address, name), "no such file", "an existing file", "Restore it from the source."
        )
    files = volume_files(folder.path / name)
    if len(files) > 1:
        folder.pull([file.name for file in files])
    return files


class VolumeDataset(AbstractDataset[Volume, Volume]):
    """One 3-D volume (array, spacing, origin, direction) through SimpleITK.

    YAML:
        mask:
          type: lumbarflow.datasets.VolumeDataset
          filepath: data/01_raw/masks/1_t2.mha
          kind: labels

    Args:
        filepath: `.mha`, `.mhd`, `.nii`, `.nii.gz` or `.nrrd`; a path, or an address on another storage.
        kind: "image", or "labels" for integer label maps.
        metadata: passed over by Kedro, read by plugins such as Kedro-Viz.
    """

    def __init__(
        self,
        *,
        filepath: str,
        kind: str = "image",
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"VolumeDataset kind {kind!r}; expected one of {sorted(KINDS)}")
        self._folder, self._name = folder_of(filepath, credentials)
        self._kind = kind
        self.metadata = metadata

    def load(self) -> Volume:
        return read_volume(_pulled(self._folder, self._name)[0], KINDS[self._kind])

    def save(self, data: Volume) -> None:
        path = self._folder.path / self._name
        write_volume(data, path)
        self._folder.push([file.name for file in written_files(path)])

    def _describe(self) -> dict[str, Any]:
        return {"filepath": joined(self._folder.address, self._name), "kind": self._kind}

    def _exists(self) -> bool:
        return self._folder.exists(self._name)


class DigestDataset(AbstractDataset[None, str]):
    """The hex digest of a volume file's bytes (for `.mhd`, of its data file too): what tells whether it changed.

    YAML:
        digest:
          type: lumbarflow.datasets.DigestDataset
          filepath: data/01_raw/images/1_t2.mha
    """

    def __init__(
        self, *, filepath: str, credentials: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None
    ):
        self._folder, self._name = folder_of(filepath, credentials)
        self.metadata = metadata

    def load(self) -> str:
        return file_digest(_pulled(self._folder, self._name))

    def save(self, data: None) -> None:
        raise NotImplementedError("a digest is computed from its file; there is nothing to save")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": joined(self._folder.address, self._name)}

    def _exists(self) -> bool:
        return self._folder.exists(self._name)


class FileFolderDataset(PartitionedDataset):
    """PartitionedDataset over the files directly in a folder, named with their suffix; an absent folder is empty.

    Loading gives file name -> callable, so that one file at a time is in memory. The pipeline, not the dataset, says
    what it means when nothing is there.

    YAML:
        raw_images:
          type: lumbarflow.datasets.FileFolderDataset
          path: data/01_raw/images
          dataset: lumbarflow.datasets.VolumeDataset
    """

    def load(self) -> dict:
        self._invalidate_caches()
        return super().load() if self._list_partitions() else {}

    def _list_partitions(self) -> list[str]:
        with errors_told(self._path, "read") if is_remote(self._path) else nullcontext():
            paths = super()._list_partitions() if self._filesystem.exists(self._normalized_path) else []
        # Hidden files, and folders, are what systems and interrupted writers leave behind.
        return [path for path in paths if "/." not in f"/{self._path_to_partition(path)}"]
