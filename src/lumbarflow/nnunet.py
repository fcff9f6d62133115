"""The split as a raw data set of nnU-Net v2, so that it can be trained on the same patients and tested on the same.

Images and labels lie as the raw files do, in their storage order and geometry: what nnU-Net predicts from an image is
on the raw image's own grid.

Source of the format: nnU-Net 2, `documentation/dataset_format.md` and `nnunetv2/experiment_planning` (which copies
`splits_final.json` from the raw data set to the preprocessed one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lumbarflow.files import read_json, write_atomically, write_json
from lumbarflow.imaging import LabelMap, Orientation, Volume, write_volume
from lumbarflow.labels import CLASSES
from lumbarflow.parameters import check_names
from lumbarflow.split import check_split
from lumbarflow.store import RECORD, SeriesStore, Update, Work

SETTINGS = ("dataset_id", "dataset_name", "include_test", "file_ending", "reference", "licence")
FILE_ENDINGS = (".nii.gz", ".mha", ".nrrd")
RAW = "nnUNet_raw"

# nnU-Net's folders: it takes training and validation from one, and looks at the test cases of the other never.
PARTS = {"train": "Tr", "validation": "Tr", "test": "Ts"}


@dataclass(frozen=True)
class Export:
    """What an exported data set should hold.

    Attributes:
        folder: the data set's, relative to the store's.
        work: series -> Work; its files are named relative to the store's folder.
        documents: file name, likewise -> JSON-able value or text. They are written last, in this order.
    """

    folder: str
    work: Mapping[str, Work]
    documents: Mapping[str, Any]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Stop at settings of `export_nnunet` that nnU-Net could not use.

    Raises:
        ValueError: unknown names, an id outside 1 to 999, a name nnU-Net can't take apart, an unknown file ending.
    """
    check_names(settings, SETTINGS, "export_nnunet")
    number, name, ending = settings["dataset_id"], settings["dataset_name"], settings["file_ending"]
    if type(number) is not int or not 1 <= number <= 999:
        raise ValueError(f"export_nnunet.dataset_id is {number!r}; expected a whole number from 1 to 999. Choose one.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)):
        raise ValueError(
            f"export_nnunet.dataset_name is {name!r}; expected letters, digits, '_' and '-'. It names a folder."
        )
    if ending not in FILE_ENDINGS:
        raise ValueError(
            f"export_nnunet.file_ending is {ending!r}; expected one of {', '.join(FILE_ENDINGS)}. "
            "nnU-Net reads those without loss."
        )


def dataset_folder(settings: Mapping[str, Any]) -> str:
    """The data set's folder, relative to the store's, e.g. nnUNet_raw/Dataset301_LumbarSpine."""
    return f"{RAW}/Dataset{settings['dataset_id']:03d}_{settings['dataset_name']}"


def sides_of_series(split: pd.DataFrame, include_test: bool) -> dict[str, str]:
    """Series -> "train", "validation" or, if they are included, "test"; sorted by name.

    Args:
        split: see `split.split_slices`.
    Raises:
        ValueError: a series or a patient on several sides, or a side that is empty.
    """
    sides = split.groupby("series")["side"].unique()
    if torn := int((sides.map(len) > 1).sum()):
        raise ValueError(
            f"{torn} series stand on several sides of the split (split.method slice); expected each on one, since "
            "nnU-Net takes series whole. Split by patient: --params=split.method=patient"
        )
    check_split(split, leaky=False)
    return {series: side[0] for series, side in sides.items() if include_test or side[0] != "test"}


def case_files(settings: Mapping[str, Any], series: str, side: str) -> tuple[str, str]:
    """Where image (its only channel, 0000) and labels of a series lie, relative to the store's folder."""
    folder, part, ending = dataset_folder(settings), PARTS[side], settings["file_ending"]
    return f"{folder}/images{part}/{series}_0000{ending}", f"{folder}/labels{part}/{series}{ending}"


def stored_pair(image: Volume, labels: LabelMap, record: Mapping[str, Any]) -> tuple[Volume, LabelMap]:
    """An ingested, sagittal image and its classes in the storage order and geometry of the raw image.

    Both get the image's own numbers, also where the raw mask's differed within ingest.tolerances: nnU-Net wants them
    equal.
    """
    orientation, geometry = Orientation.from_dict(record["orientation"]), record["geometry"]
    return (
        Volume(orientation.restore(image.array), **geometry),
        LabelMap(orientation.restore(labels.array), **geometry),
    )


def documents(settings: Mapping[str, Any], sides: Mapping[str, str], synthetic: bool) -> dict[str, Any]:
    """The files beside the cases: split, a README of commands and, as the last, dataset.json.

    Args:
        sides: see `sides_of_series`.
        synthetic: whether the scans are made by lumbarflow.
    """
    names = {side: sorted(series for series, own in sides.items() if own == side) for side in PARTS}
    folder, number = dataset_folder(settings), settings["dataset_id"]
    test = f"{folder}/imagesTs" if names["test"] else "IMAGES"
    description = {
        "channel_names": {"0": "MRI"},  # anything but CT: nnU-Net then normalises each image by itself
        "labels": {name: index for index, name in enumerate(CLASSES)},
        "numTraining": len(names["train"]) + len(names["validation"]),
        "file_ending": settings["file_ending"],
        "name": settings["dataset_name"],
        "description": (
            "Synthetic lumbar spine MRI made by lumbarflow, no patients" if synthetic else "Lumbar spine MRI"
        ),
        **{name: settings[name] for name in ("reference", "licence") if settings.get(name)},
    }
    readme = f"""A raw data set of nnU-Net v2, written by lumbarflow's pipeline export_nnunet.

imagesTr, labelsTr: {len(names["train"])} series to train, {len(names["validation"])} to validate
imagesTs, labelsTs: {len(names["test"])} series to test, which nnU-Net doesn't train on
splits_final.json: one fold, 0, lumbarflow's split by patient; any other would be a random one of nnU-Net's

In this folder:

    export nnUNet_raw="$PWD/{RAW}" nnUNet_preprocessed="$PWD/nnUNet_preprocessed" nnUNet_results="$PWD/nnUNet_results"
    nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity
    nnUNetv2_train {number} 3d_fullres 0
    nnUNetv2_predict -d {number} -c 3d_fullres -f 0 -i {test} -o predictions

The planning copies splits_final.json to nnUNet_preprocessed. It stops if another split lies there already: delete that
folder when the split has changed. Predictions are named like the series and lie on the grids of their raw images.
"""
    return {
        "README.txt": readme,
        f"{folder}/splits_final.json": [{"train": names["train"], "val": names["validation"]}],
        f"{folder}/dataset.json": description,
    }


class NnunetStore(SeriesStore):
    """A SeriesStore in nnU-Net's layout. A series' record lies in `records/` and lists the series' files.

    Files that no record lists belong to somebody else and are never touched; in the data set they are an error.
    """

    DOCUMENTS = "documents.json"  # lists the documents of the last export

    def series(self) -> list[str]:
        return sorted(path.name.removesuffix(".json") for path in self.root.glob("records/[!.]*.json"))

    def path(self, series: str, name: str) -> Path:
        return self.root / (f"records/{series}.json" if name == RECORD else name)

    def export(self, export: Export, description: str = "export") -> Update:
        """Bring the folder up to date.

        Raises:
            ValueError: the data set, or another of the same id, holds files that this store did not write.
        """
        written = self._documents()
        self._check_foreign(export.folder, written)
        # nnU-Net takes no folder without dataset.json: an export that was cut short can't be trained on by mistake.
        for name in written:
            self._delete(name)
        update = self.update(export.work, description)
        write_json(self.root / self.DOCUMENTS, list(export.documents))
        for name, value in export.documents.items():
            if isinstance(value, str):
                write_atomically(self.root / name, lambda partial, text=value: partial.write_text(text, "utf-8"))
            else:
                write_json(self.root / name, value)
        return update

    def _check_foreign(self, folder: str, documents: list[str]) -> None:
        own = {*documents, *(name for series in self.series() for name in self._files(series))}
        same_id = folder[: len(f"{RAW}/Dataset000")]  # nnU-Net finds data sets by it alone
        found = {
            path.relative_to(self.root).as_posix()
            for pattern in ("images*/[!.]*", "labels*/[!.]*", "*.json")
            for path in self.root.glob(f"{same_id}*/{pattern}")
        }
        if foreign := sorted(found - own):
            raise ValueError(
                f"{self.root}: {len(foreign)} files that lumbarflow did not write ({foreign[0]}, ...); expected none "
                "in its data set or another of the same id. Set export_nnunet.dataset_id to a free one, or move them."
            )

    def _documents(self) -> list[str]:
        path = self.root / self.DOCUMENTS
        return read_json(path) if path.is_file() else []

    def _files(self, series: str) -> list[str]:
        try:
            return self.record(series)["files"]
        except (OSError, ValueError):  # a spoilt record: its series is made again
            return []

    def _key(self, series: str) -> str | None:
        whole = all((self.root / name).is_file() for name in self._files(series))
        return super()._key(series) if whole else None

    def _remove(self, series: str) -> None:
        for name in self._files(series):
            self._delete(name)
        self.path(series, RECORD).unlink(missing_ok=True)

    def _delete(self, name: str) -> None:
        """Remove a file, and the folders that it leaves empty."""
        path = self.root / name
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()

    def _write(self, series: str, work: Work) -> None:
        # The record comes first: files that an interruption left are then known as this store's, and the series is made
        # again because some are missing.
        files = dict(work.make())
        record = {"key": work.key, **files.pop(RECORD), "files": sorted(files)}
        self._remove(series)  # it may have stood on another side
        write_json(self.path(series, RECORD), record)
        for name, value in files.items():
            write_volume(value, self.root / name)
