"""Volumes as Kedro datasets: one file, or a folder of them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets.partitions import PartitionedDataset

from lumbarflow.files import file_digest
from lumbarflow.imaging import LabelMap, Volume, read_volume, volume_files, write_volume

KINDS = {"image": Volume, "labels": LabelMap}


class VolumeDataset(AbstractDataset[Volume, Volume]):
    """One 3-D volume (array, spacing, origin, direction) through SimpleITK.

    YAML:
        mask:
          type: lumbarflow.datasets.VolumeDataset
          filepath: data/01_raw/masks/1_t2.mha
          kind: labels

    Args:
        filepath: `.mha`, `.mhd`, `.nii`, `.nii.gz` or `.nrrd`.
        kind: "image", or "labels" for integer label maps.
        metadata: passed over by Kedro, read by plugins such as Kedro-Viz.
    """

    def __init__(self, *, filepath: str, kind: str = "image", metadata: dict[str, Any] | None = None):
        if kind not in KINDS:
            raise ValueError(f"VolumeDataset kind {kind!r}; expected one of {sorted(KINDS)}")
        self._filepath = PurePosixPath(filepath)
        self._kind = kind
        self.metadata = metadata

    def load(self) -> Volume:
        return read_volume(str(self._filepath), KINDS[self._kind])

    def save(self, data: Volume) -> None:
        write_volume(data, str(self._filepath))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "kind": self._kind}

    def _exists(self) -> bool:
        return Path(self._filepath).is_file()


class DigestDataset(AbstractDataset[None, str]):
    """The hex digest of a volume file's bytes (for `.mhd`, of its data file too): what tells whether it changed.

    YAML:
        digest:
          type: lumbarflow.datasets.DigestDataset
          filepath: data/01_raw/images/1_t2.mha
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None):
        self._filepath = PurePosixPath(filepath)
        self.metadata = metadata

    def load(self) -> str:
        return file_digest(volume_files(str(self._filepath)))

    def save(self, data: None) -> None:
        raise NotImplementedError("a digest is computed from its file; there is nothing to save")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def _exists(self) -> bool:
        return Path(self._filepath).is_file()


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
        if not self._filesystem.exists(self._normalized_path):
            return []
        # Hidden files, and folders, are what systems and interrupted writers leave behind.
        return [path for path in super()._list_partitions() if "/." not in f"/{self._path_to_partition(path)}"]
