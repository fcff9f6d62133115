"""What a training needs to go on after an interruption, in one file that is whole or not there; NumPy only.

The file is an uncompressed `.npz` archive of plain arrays (no pickle): the state of every variable, the best weights
so far, and a JSON text with what else the training remembers. It is written under a temporary name, flushed to the disk
and renamed, so that a reader meets the last whole one whatever happens to the writer.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow.files import write_atomically

FORMAT_VERSION = 1
_PROGRESS = "progress"


@dataclass(frozen=True)
class Checkpoint:
    """A training after a whole epoch.

    Attributes:
        progress: JSON-able: what is remembered beside arrays (the key of the training, its history, ...).
        state: values of all variables, in the order that the training has them; empty once it is finished.
        best: weights of the net that is returned, as Keras's `get_weights` gives them.
    """

    progress: Mapping[str, Any]
    state: Sequence[np.ndarray]
    best: Sequence[np.ndarray]

    def write(self, path: str | Path) -> None:
        """Raises OSError if the file cannot be written; one that was there before is then still there."""
        text = json.dumps({"format_version": FORMAT_VERSION, **self.progress}, allow_nan=False)
        arrays = {_PROGRESS: np.frombuffer(text.encode(), np.uint8)}
        for group in ("state", "best"):
            arrays |= {f"{group}_{k:04d}": value for k, value in enumerate(getattr(self, group))}

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:
                np.savez(file, **arrays)
                # Renaming makes a name durable, not what it names.
                file.flush()
                os.fsync(file.fileno())

        write_atomically(path, write)

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint | None:
        """None if there is no such file.

        Raises:
            ValueError: it is no checkpoint of this format, or damaged.
            OSError: it cannot be read.
        """
        if not Path(path).is_file():
            return None
        remedy = "Remove it, or set training.resume to false, to train anew."
        try:
            with np.load(path, allow_pickle=False) as archive:
                progress = json.loads(archive[_PROGRESS].tobytes().decode())
                groups = {
                    group: [archive[name] for name in sorted(archive.files) if name.startswith(f"{group}_")]
                    for group in ("state", "best")
                }
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a whole checkpoint ({error}); expected one of ours. {remedy}") from error
        version = progress.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version {version!r}; expected {FORMAT_VERSION}. {remedy}")
        return cls(progress, **groups)
