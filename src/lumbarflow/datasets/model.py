"""What training reads and writes, as Kedro datasets: the model input folder and the `.keras` file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from lumbarflow.files import write_json
from lumbarflow.model_input import MANIFEST, ModelInput
from lumbarflow.storage import WorkingCopy, folder_of, joined


class ModelInputDataset(AbstractDataset[dict, ModelInput]):
    """The self-contained training folder (see `lumbarflow.model_input`); saving writes its manifest.

    YAML:
        model_input:
          type: lumbarflow.datasets.ModelInputDataset
          path: data/05_model_input
    """

    def __init__(self, *, path: str, credentials: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None):
        self._folder = WorkingCopy(path, credentials)
        self.metadata = metadata

    def load(self) -> ModelInput:
        return ModelInput.open(self._folder.pull())

    def save(self, data: dict) -> None:
        write_json(self._folder.path / MANIFEST, data)
        self._folder.push([MANIFEST])

    def _describe(self) -> dict[str, Any]:
        return {"path": self._folder.address}

    def _exists(self) -> bool:
        return self._folder.exists(MANIFEST)


class FolderDataset(AbstractDataset[None, Path]):
    """A folder that a node fills by itself while it works, such as that of checkpoints; it loads as its path.

    On another storage that is the path of a working copy, which the storage takes over once a minute until `release`.

    YAML:
        training_folder:
          type: lumbarflow.datasets.FolderDataset
          path: data/06_models/training

    Args:
        path: the folder.
        remove: whether another storage loses what is removed here.
    """

    def __init__(
        self,
        *,
        path: str,
        remove: bool = True,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        self._folder = WorkingCopy(path, credentials)
        self._remove = remove
        self._pushing = ExitStack()
        self.metadata = metadata

    def load(self) -> Path:
        self._release()
        self._folder.pull()
        return self._pushing.enter_context(self._folder.pushing(remove=self._remove))

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._folder.address}: this folder is filled by the node that is given its path")

    def _release(self) -> None:
        self._pushing.close()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._folder.address}

    def _exists(self) -> bool:
        return True  # made by whoever writes to it


class KerasModelDataset(AbstractDataset[Any, Any]):
    """A Keras model in a `.keras` file: configuration and weights, no code; loaded in safe mode.

    YAML:
        model:
          type: lumbarflow.datasets.KerasModelDataset
          filepath: data/06_models/model.keras
    """

    def __init__(
        self, *, filepath: str, credentials: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None
    ):
        self._folder, self._name = folder_of(filepath, credentials)
        self.metadata = metadata

    # Keras and its backend cost seconds: they are imported when a model is read or written, not with the catalog.
    def load(self) -> Any:
        from lumbarflow.networks import load_model

        self._folder.pull([self._name])
        return load_model(self._folder.path / self._name)

    def save(self, data: Any) -> None:
        from lumbarflow.networks import save_model

        save_model(data, self._folder.path / self._name)
        self._folder.push([self._name])

    def _describe(self) -> dict[str, Any]:
        return {"filepath": joined(self._folder.address, self._name)}

    def _exists(self) -> bool:
        return self._folder.exists(self._name)
