"""The classes, their colours, and the table from raw label ids to classes: the only place that knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

CLASSES = ("background", "vertebrae", "canal", "IVD")
CLASS_COUNT = len(CLASSES)
FOREGROUND = range(1, CLASS_COUNT)

# Okabe and Ito's colours, told apart with every common colour blindness and readable on grey MRI.
PALETTE = {"background": "#000000", "vertebrae": "#E69F00", "canal": "#56B4E9", "IVD": "#CC79A7"}
# Foreground of the reference that a prediction left out: their green, seen on bright fluid and dark bone.
MISSED = "#009E73"

# SPIDER's instance labels: vertebrae 1.. from the lowest up (PARTIAL_OFFSET + n where the edge cuts number n), the
# canal, discs 201.. from the lowest up.
CANAL_ID = 100
PARTIAL_OFFSET = 100
DISC_OFFSET = 200

_UNKNOWN = 255


class UnknownLabelError(ValueError):
    """Label ids that the table does not name; `ids` lists them."""

    def __init__(self, ids: Sequence[int]):
        super().__init__(f"unknown label ids {list(ids)}")
        self.ids = list(ids)

    def __reduce__(self):
        return type(self), (self.ids,)


class LabelTable:
    """Raw label ids -> classes, in one pass (so that no id is mapped twice).

    Args:
        table: class name -> ids; an id is an int or a range in words, "101-125" (both ends included). Background is
            id 0 and need not be named.
    Raises:
        ValueError: a class that isn't one of CLASSES, an id out of 0..65535 or given to two classes.
    """

    def __init__(self, table: Mapping[str, Sequence[int | str]]):
        unknown = sorted(set(table) - set(CLASSES))
        if unknown:
            raise ValueError(f"labels.table names the classes {unknown}; expected names from {list(CLASSES)}")
        self.ids: dict[str, list[int]] = {name: [] for name in CLASSES}
        self.ids["background"] = [0]
        for name, entries in table.items():
            for entry in entries:
                self.ids[name] += [i for i in _ids(entry) if i not in self.ids[name]]
        everything = [(i, name) for name, ids in self.ids.items() for i in ids]
        self._lookup = np.full(max(i for i, _ in everything) + 1, _UNKNOWN, np.uint8)
        for i, name in everything:
            if self._lookup[i] != _UNKNOWN:
                raise ValueError(
                    f"labels.table gives id {i} to both {CLASSES[self._lookup[i]]!r} and {name!r}; "
                    "expected one class per id"
                )
            self._lookup[i] = CLASSES.index(name)

    def classes(self, ids: np.ndarray) -> np.ndarray:
        """Integer array of any shape -> uint8 classes of the same shape.

        Raises:
            UnknownLabelError: ids that the table does not name.
        """
        if ids.size and (ids.min() < 0 or ids.max() >= len(self._lookup)):
            raise UnknownLabelError(self._unknown(ids))
        classes = self._lookup[ids]
        if np.any(classes == _UNKNOWN):
            raise UnknownLabelError(self._unknown(ids))
        return classes

    def _unknown(self, ids: np.ndarray) -> list[int]:
        return np.setdiff1d(ids, np.flatnonzero(self._lookup != _UNKNOWN)).tolist()

    def to_dict(self) -> dict[str, list[int]]:
        """Class name -> sorted ids: the table written out, for hashes and reports."""
        return {name: sorted(ids) for name, ids in self.ids.items()}


def _ids(entry: int | str) -> range:
    first, dash, last = str(entry).partition("-")
    try:
        ids = range(int(first), int(last or first) + 1) if dash == "" or last else range(0)
    except ValueError:
        ids = range(0)
    if not ids or ids[-1] > 65535:
        raise ValueError(f"labels.table holds {entry!r}; expected an id from 0 to 65535 or a range like '101-125'")
    return ids


def class_counts(classes: np.ndarray) -> np.ndarray:
    """uint8 (n, rows, columns) -> int64 (n, CLASS_COUNT): pixels of each class in each slice."""
    return np.stack([np.bincount(plane.ravel(), minlength=CLASS_COUNT) for plane in classes]).astype(np.int64)
