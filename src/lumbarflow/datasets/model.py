"""What training reads and writes, as Kedro datasets: the model input folder and the `.keras` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from lumbarflow.files import write_json
from lumbarflow.model_input import MANIFEST, ModelInput


class ModelInputDataset(AbstractDataset[dict, ModelInput]):
    """The self-contained training folder (see `lumbarflow.model_input`); saving writes its manifest.

    YAML:
        model_input:
          type: lumbarflow.datasets.ModelInputDataset
          path: data/05_model_input
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None):
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> ModelInput:
        return ModelInput.open(self._path)

    def save(self, data: dict) -> None:
        write_json(self._path / MANIFEST, data)

    def _describe(self) -> dict[str, Any]:
        return {"path": str(self._path)}

    def _exists(self) -> bool:
        return (self._path / MANIFEST).is_file()


class FolderDataset(AbstractDataset[None, Path]):
    """A folder that a node fills by itself while it works, such as that of checkpoints; it loads as its path.

    YAML:
        training_folder:
          type: lumbarflow.datasets.FolderDataset
          path: data/06_models/training
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None):
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> Path:
        return self._path

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._path}: this folder is filled by the node that is given its path")

    def _describe(self) -> dict[str, Any]:
        return {"path": str(self._path)}

    def _exists(self) -> bool:
        return True  # made by whoever writes to it


class KerasModelDataset(AbstractDataset[Any, Any]):
    """A Keras model in a `.keras` file: configuration and weights, no code; loaded in safe mode.

    YAML:
        model:
          type: lumbarflow.datasets.KerasModelDataset
          filepath: data/06_models/model.keras
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None):
        self._filepath = Path(filepath)
        self.metadata = metadata

    # Keras and its backend cost seconds: they are imported when a model is read or written, not with the catalog.
    def load(self) -> Any:
        from lumbarflow.networks import load_model

        return load_model(self._filepath)

    def save(self, data: Any) -> None:
        from lumbarflow.networks import save_model

        save_model(data, self._filepath)

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def _exists(self) -> bool:
        return self._filepath.is_file()
