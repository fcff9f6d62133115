"""Batches of prepared slices, read from mapped files and changed at random; importing this imports Keras.

Every random number of a slice follows from the seed, the epoch and the slice's place in the epoch's order, so neither
threads nor the order of reading change what the net sees.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from lumbarflow.augmentation import AugmentationSettings, apply_augmentation, draw_augmentation
from lumbarflow.backend import load_keras
from lumbarflow.model_input import ModelInput

keras = load_keras()


class SliceBatches(keras.utils.PyDataset):
    """Batches of one side: images float32 (n, H, W, channels) and labels uint8 (n, H, W).

    Args:
        model_input, side: which slices.
        batch_size: slices per batch.
        seed: of order and augmentation.
        shuffle: for training: a new order for each `epoch`, and the last batch filled up with the first slices of that
            order, so that all batches are equally large: no step weighs a slice more than another does, nothing is
            compiled for a second shape, and devices can share every batch. False: the fixed order, and the last batch
            may be smaller.
        augmentation: drawn anew for each slice and `epoch`; None for none.
        balanced: share of the probability by which slices are drawn so that each foreground class is shown equally
            often, see `balanced_probabilities`; 0 shows every slice once. With `shuffle` only.
        neighbours: slices on either side that are further channels, see `ModelInput.image`.
        outputs: how often the labels are repeated, for nets with several outputs.
        workers: threads that prepare the batches to come; 0 reads when asked.
    Attributes:
        slices: (series, slice) of the side, see `ModelInput.slices`.
        epoch: set it before the first batch of an epoch is read.
    Raises:
        ValueError: the side has no slices.
    """

    def __init__(
        self,
        model_input: ModelInput,
        side: str,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augmentation: AugmentationSettings | None = None,
        balanced: float = 0.0,
        neighbours: int = 0,
        outputs: int = 1,
        workers: int = 0,
    ):
        # None of Keras's workers: what they have read ahead when an epoch ends, they hand out in the next one.
        # (TensorFlow reads ahead by itself, in one thread and within the epoch.)
        super().__init__(workers=0)
        self.model_input, self.batch_size, self.seed = model_input, batch_size, seed
        self.shuffle, self.augmentation = shuffle, augmentation
        self.neighbours, self.outputs = neighbours, outputs
        self.slices = model_input.slices(side)
        self.epoch = 0
        if not self.slices:
            raise ValueError(
                f"{model_input.root}: the side {side!r} has no slices; expected at least one. "
                "See split and slice_index for why, change the split or the filters, and preprocess again."
            )
        self._probabilities = balanced_probabilities(self._class_counts(), balanced) if balanced else None
        self._order: tuple[int, np.ndarray] = (-1, np.arange(len(self.slices)))
        self._ahead = 2 * workers
        self._threads = ThreadPoolExecutor(workers, "batches") if workers else None
        self._prepared: dict[tuple[int, int], Future] = {}

    def __len__(self) -> int:
        return math.ceil(len(self.slices) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | tuple[np.ndarray, ...]]:
        epoch = self.epoch
        if self._threads is None:
            return self._read(epoch, index)
        last = min(index + self._ahead, len(self) - 1)
        for wanted in range(index, last + 1):
            if (epoch, wanted) not in self._prepared:
                self._prepared[epoch, wanted] = self._threads.submit(self._read, epoch, wanted)
        # Of another epoch, or read for the shapes alone: nobody will ask for them.
        for key in [key for key in self._prepared if key[0] != epoch or not index <= key[1] <= last]:
            self._prepared.pop(key).cancel()
        return self._prepared.pop((epoch, index)).result()

    def positions(self, index: int) -> np.ndarray:
        """Where the slices of batch `index` of this epoch stand in `slices`."""
        order = self._order_of(self.epoch)
        return order[self._places(index) % len(order)]

    def slices_of(self, index: int) -> list[tuple[str, int]]:
        """(series, slice) of batch `index` of this epoch, in the batch's order."""
        return [self.slices[position] for position in self.positions(index)]

    def _read(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray | tuple[np.ndarray, ...]]:
        order, places = self._order_of(epoch), self._places(index)
        channels = 2 * self.neighbours + 1
        images = np.empty((len(places), *self.model_input.size, channels), np.float32)
        labels = np.empty((len(places), *self.model_input.size), np.uint8)
        for k, place in enumerate(places):
            image, labels[k] = self._slice(int(order[place % len(order)]), int(place), epoch)
            images[k] = image.reshape(images.shape[1:])
        return images, labels if self.outputs == 1 else (labels,) * self.outputs

    def _places(self, index: int) -> np.ndarray:
        start = index * self.batch_size
        stop = start + self.batch_size
        return np.arange(start, stop if self.shuffle else min(stop, len(self.slices)))

    def _order_of(self, epoch: int) -> np.ndarray:
        count = len(self.slices)
        if not self.shuffle:
            return np.arange(count)
        known, order = self._order
        if known != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            if self._probabilities is None:
                order = rng.permutation(count)
            else:
                order = rng.choice(count, size=count, p=self._probabilities)
            # One assignment, so that threads meet either epoch's pair, never half of each.
            self._order = epoch, order
        return order

    def _slice(self, position: int, place: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        series, index = self.slices[position]
        image = self.model_input.image(series, index, self.neighbours)
        label = self.model_input.label(series, index)
        if self.augmentation is None:
            return image, label
        # A slice that an epoch shows more than once looks different each time, so its place tells them apart; a slice
        # that it shows once is told from others by its position, whatever the order. 1 tells these numbers from those
        # of the order, which has the shorter key.
        repeated = self._probabilities is not None or place >= len(self.slices)
        key = (self.seed, epoch, position, 1, place) if repeated else (self.seed, epoch, position, 1)
        drawn = draw_augmentation(np.random.default_rng(key), self.augmentation, self.model_input.size)
        return apply_augmentation(image, label, drawn)

    def _class_counts(self) -> np.ndarray:
        series = self.model_input.manifest["series"]
        return np.array([series[name]["class_counts"][index] for name, index in self.slices])


def balanced_probabilities(counts: np.ndarray, balance: float) -> np.ndarray:
    """How likely each slice is to be drawn.

    A class's share of the probability is spread over the slices by how many of the class's pixels each has, every
    foreground class having the same share; a class that no slice has is left out.

    Args:
        counts: int (n, classes), pixels of each class in each slice, background first.
        balance: 0 draws every slice equally often, 1 by the classes alone, between them the weighted mean of the two.
    Returns:
        float64 (n,), sum 1.
    """
    foreground = counts[:, 1:].astype(np.float64)
    totals = foreground.sum(axis=0)
    foreground, totals = foreground[:, totals > 0], totals[totals > 0]
    uniform = np.full(len(counts), 1 / len(counts))
    if not totals.size:
        return uniform
    probabilities = (1 - balance) * uniform + balance * (foreground / totals).mean(axis=1)
    return probabilities / probabilities.sum()
