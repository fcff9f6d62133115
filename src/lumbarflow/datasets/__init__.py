"""The project's Kedro datasets: the one seam between its data and the disk."""

from lumbarflow.datasets.artifact import ArtifactDataset
from lumbarflow.datasets.model import FolderDataset, KerasModelDataset, ModelInputDataset
from lumbarflow.datasets.nnunet import NnunetDataset
from lumbarflow.datasets.prediction import PredictionFolderDataset, RegisteredModelDataset, ScanFolderDataset
from lumbarflow.datasets.series_store import SeriesStoreDataset, SyntheticCohortDataset
from lumbarflow.datasets.tables import OptionalCSVDataset
from lumbarflow.datasets.text import MarkdownDataset
from lumbarflow.datasets.volume import DigestDataset, FileFolderDataset, VolumeDataset

__all__ = [
    "ArtifactDataset",
    "DigestDataset",
    "FileFolderDataset",
    "FolderDataset",
    "KerasModelDataset",
    "MarkdownDataset",
    "ModelInputDataset",
    "NnunetDataset",
    "OptionalCSVDataset",
    "PredictionFolderDataset",
    "RegisteredModelDataset",
    "ScanFolderDataset",
    "SeriesStoreDataset",
    "SyntheticCohortDataset",
    "VolumeDataset",
]
