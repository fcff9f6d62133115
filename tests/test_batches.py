from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.batches import SliceBatches, balanced_probabilities
from lumbarflow.model_input import FORMAT_VERSION, ModelInput

SIZE = (6, 10)


@pytest.fixture(scope="module")
def model_input(tmp_path_factory) -> ModelInput:
    """Three and two slices to train, one to validate; every slice has a level of its own, 0 to 5."""
    root = tmp_path_factory.mktemp("model_input")
    rng = np.random.default_rng(0)
    sides: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    series, level = {}, 0
    for name, side, count in (("1_t1", "train", 3), ("1_t2", "train", 2), ("2_t2", "validation", 1)):
        folder = root / "series" / name
        folder.mkdir(parents=True)
        labels = rng.integers(0, 4, (count, *SIZE)).astype(np.uint8)
        images = (np.arange(level, level + count)[:, None, None] + rng.uniform(0, 0.5, labels.shape)).astype(np.float16)
        level += count
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", labels)
        counts = [np.bincount(label.ravel(), minlength=4).tolist() for label in labels]
        series[name] = {"n_slices": count, "class_counts": counts}
        sides[side][name] = list(range(count))
    manifest = {"format_version": FORMAT_VERSION, "size": list(SIZE), "series": series, "sides": sides}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return ModelInput.open(root)


def test_an_epoch_shows_every_slice_and_fills_the_last_batch_from_its_beginning(model_input):
    batches = SliceBatches(model_input, "train", 2, seed=3, shuffle=True)
    orders = []
    for epoch in range(3):
        batches.epoch = epoch
        orders.append(np.concatenate([batches.positions(k) for k in range(len(batches))]).tolist())
    assert [sorted(order[:5]) for order in orders] == [[0, 1, 2, 3, 4]] * 3
    assert [order[5] for order in orders] == [order[0] for order in orders]
    assert len({tuple(order) for order in orders}) == 3
    assert [batches[k][0].shape for k in range(3)] == [(2, *SIZE, 1)] * 3


def test_a_batch_larger_than_the_side_goes_round_it(model_input):
    batches = SliceBatches(model_input, "train", 12, shuffle=True)
    assert len(batches) == 1
    assert Counter(batches.positions(0).tolist()) == {
        position: 3 if position in batches.positions(0)[:2] else 2 for position in range(5)
    }


def test_without_shuffling_the_last_batch_is_what_is_left(model_input):
    batches = SliceBatches(model_input, "train", 2)
    assert [batches.positions(k).tolist() for k in range(3)] == [[0, 1], [2, 3], [4]]
    assert batches[2][0].shape == (1, *SIZE, 1)


def test_batches_are_the_stored_slices(model_input):
    images, labels = SliceBatches(model_input, "train", 4)[0]
    assert (images.dtype, labels.dtype) == (np.float32, np.uint8)
    assert np.array_equal(images[3, ..., 0], model_input.image("1_t2", 0))
    assert np.array_equal(labels[3], model_input.label("1_t2", 0))


def test_neighbours_are_channels_of_the_same_series(model_input):
    images, labels = SliceBatches(model_input, "train", 5, neighbours=1)[0]
    assert images.shape == (5, *SIZE, 3)
    # The level of a slice is its place: 0, 1, 2 in the first series, 3, 4 in the second; the ends are repeated.
    levels = np.floor(images.min(axis=(1, 2)))
    assert levels.tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 4], [3, 4, 4]]
    assert np.array_equal(labels[1], model_input.label("1_t1", 1))


def test_labels_are_repeated_for_nets_with_several_outputs(model_input):
    _, labels = SliceBatches(model_input, "train", 2, outputs=3)[0]
    assert isinstance(labels, tuple)
    assert all(np.array_equal(label, labels[0]) for label in labels)
    assert len(labels) == 3


def test_augmentation_follows_from_seed_epoch_and_slice_alone(model_input):
    def batches(seed=0, epoch=0, shuffle=False):
        made = SliceBatches(model_input, "train", 1, seed=seed, shuffle=shuffle, augmentation=AugmentationSettings())
        made.epoch = epoch
        return made

    # Read backwards and in another order, each slice looks the same.
    forwards = [batches()[k] for k in range(5)]
    reading = batches(shuffle=True)
    shuffled = {int(reading.positions(k)[0]): reading[k] for k in reversed(range(5))}
    for position, (images, labels) in enumerate(forwards):
        assert np.array_equal(images, shuffled[position][0])
        assert np.array_equal(labels, shuffled[position][1])
    assert not np.array_equal(batches(epoch=1)[0][0], forwards[0][0])
    assert not np.array_equal(batches(seed=1)[0][0], forwards[0][0])
    assert not np.array_equal(forwards[0][0], SliceBatches(model_input, "train", 1)[0][0])


def test_a_slice_that_is_shown_again_looks_different(model_input):
    batches = SliceBatches(model_input, "train", 6, shuffle=True, augmentation=AugmentationSettings())
    assert batches.positions(0)[0] == batches.positions(0)[5]
    images, _ = batches[0]
    assert not np.array_equal(images[0], images[5])


SHOWN = """
import sys
import numpy as np
from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.backend import load_keras
from lumbarflow.batches import SliceBatches
from lumbarflow.model_input import ModelInput

keras = load_keras()
inputs = keras.Input((6, 10, 1))
model = keras.Model(inputs, keras.layers.Conv2D(4, 1, activation="softmax")(inputs))
# The loss of a step is what its labels sum up to.
model.compile("sgd", loss=lambda y, p: keras.ops.sum(p) * 0 + keras.ops.sum(keras.ops.cast(y, "float32")))
settings = AugmentationSettings(shift=0.5)
model_input = ModelInput.open(sys.argv[1])

class Epochs(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        train.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        shown.append(float(logs["loss"]))

for workers in (0, 3):
    train = SliceBatches(model_input, "train", 2, shuffle=True, augmentation=settings, workers=workers)
    shown = []
    # As after an interruption: what Keras reads before, for the shapes alone, is of another epoch.
    model.fit(train, initial_epoch=1, epochs=4, callbacks=[Epochs()], verbose=0, shuffle=False)
    expected = []
    for epoch in range(1, 4):
        train.epoch = epoch
        expected.append(np.mean([float(train[k][1].sum()) for k in range(3)]))
    np.testing.assert_allclose(shown, expected, err_msg=f"{workers} workers")
    assert len(set(expected)) > 1
    once = SliceBatches(model_input, "train", 2, workers=workers)
    total = sum(float(once[k][1].sum()) for k in range(3))
    # The last batch is of one slice; Keras weighs it as such.
    scored = [model.evaluate(once, verbose=0) for _ in range(2)]
    assert scored[0] == scored[1], f"{workers} workers: {scored}"
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_threads_read_each_epoch_under_its_own_number(model_input, backend):
    # Keras reads a batch for its shapes, and starts the next epoch before it says so: nothing of it may reach the net.
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, str(model_input.root)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"KERAS_BACKEND": backend},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_batches_prepared_ahead_are_those_that_are_asked_for(model_input):
    plain, ahead = (
        SliceBatches(model_input, "train", 1, shuffle=True, augmentation=AugmentationSettings(), workers=workers)
        for workers in (0, 2)
    )
    # Forwards, once more from the start, backwards, and under another epoch half-way.
    for epoch, index in [(0, 0), (0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 0), (0, 4), (2, 3), (2, 2), (2, 1)]:
        plain.epoch = ahead.epoch = epoch
        for one, other in zip(plain[index], ahead[index], strict=True):
            assert np.array_equal(one, other)
        assert len(ahead._prepared) <= 4, "nothing that nobody asks for is kept"


@pytest.mark.parametrize("side", ["test", "validation"])
def test_a_side_without_slices_is_refused(model_input, side):
    emptied = ModelInput(model_input.root, model_input.manifest | {"sides": {"test": {}, "validation": {}}})
    with pytest.raises(ValueError, match=f"the side '{side}' has no slices; expected at least one"):
        SliceBatches(emptied, side, 2)


def test_balanced_sampling_draws_by_the_classes(model_input):
    batches = SliceBatches(model_input, "train", 5, shuffle=True, balanced=1.0)
    counts = np.array([c for name in ("1_t1", "1_t2") for c in model_input.manifest["series"][name]["class_counts"]])
    wanted = balanced_probabilities(counts, 1.0)
    drawn = Counter()
    for epoch in range(400):
        batches.epoch = epoch
        drawn.update(batches.positions(0).tolist())
    shares = np.array([drawn[k] for k in range(5)]) / 2000
    np.testing.assert_allclose(shares, wanted, atol=0.04)


def test_a_balanced_share_is_spread_by_pixels_of_each_class():
    # Background, then vertebrae 10 + 30, canal 5 + 0, no disc anywhere.
    counts = np.array([[85, 10, 5, 0], [70, 30, 0, 0]])
    # The classes that occur have half each: (10 / 40 + 5 / 5) / 2 and (30 / 40 + 0) / 2.
    np.testing.assert_allclose(balanced_probabilities(counts, 1.0), [0.625, 0.375])
    np.testing.assert_allclose(balanced_probabilities(counts, 0.5), [0.5625, 0.4375])
    np.testing.assert_allclose(balanced_probabilities(counts, 0.0), [0.5, 0.5])
    np.testing.assert_allclose(balanced_probabilities(np.array([[9, 0, 0, 0]] * 4), 1.0), [0.25] * 4)


@given(arrays(np.int64, st.tuples(st.integers(1, 7), st.just(4)), elements=st.integers(0, 500)), st.floats(0, 1))
def test_balanced_probabilities_sum_to_1_and_show_classes_equally(counts, balance):
    probabilities = balanced_probabilities(counts, balance)
    assert probabilities.sum() == pytest.approx(1)
    assert (probabilities >= 0).all()
    if balance < 1:
        assert (probabilities > 0).all(), "no slice is lost"
