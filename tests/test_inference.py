from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.augmentation import Augmentation, apply_augmentation
from lumbarflow.imaging import SAGITTAL_AXES, Volume
from lumbarflow.inference import Segmenter
from lumbarflow.resampling import InPlaneGrid
from lumbarflow.training_record import weights_digest

SETTINGS = {"size": [16, 16], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100], "batch_size": 2}


class ByIntensity:
    """A stand-in for a net: bright pixels are canal, middling ones vertebrae, dark ones background."""

    input_shape = (None, 16, 16, 1)

    def __init__(self):
        self.batches: list[tuple[int, ...]] = []
        self.weights = np.ones(3, np.float32)

    def get_weights(self):
        return [self.weights]

    def predict(self, images, batch_size, verbose):
        self.batches.append(images.shape)
        grey = images[..., 0]
        classes = np.where(grey > 2, 2, np.where(grey > 0, 1, 0))
        return np.eye(4, dtype=np.float32)[classes]


def slices(n: int = 5) -> np.ndarray:
    """(n, 32, 24): dark, with a middling left half of the lower rows and a bright block in them."""
    image = np.zeros((n, 32, 24), np.int16)
    image[:, 16:, :12] = 500
    image[:, 20:28, 4:10] = 1000
    return image


def test_labels_come_back_on_the_slices_own_grid():
    # 32 x 24 pixels of 1 x 1 mm go through 16 x 16 pixels of 2 mm, so blocks of even size come back as they were.
    labels = Segmenter(ByIntensity(), SETTINGS).labels(slices(), (1.0, 1.0))
    assert (labels.shape, labels.dtype) == ((5, 32, 24), np.uint8)
    assert np.array_equal(labels[0, 2:14], np.zeros((12, 24)))
    assert (labels[:, 22:26, 6:8] == 2).all()
    assert (labels[:, 29:31, 1:10] == 1).all()
    assert (labels[:, 18:, 14:] == 0).all()


def test_probabilities_decide_the_labels_and_sum_to_1():
    segmenter = Segmenter(ByIntensity(), SETTINGS)
    probabilities = segmenter.probabilities(slices(3), (1.0, 0.7))
    assert (probabilities.shape, probabilities.dtype) == ((3, 32, 24, 4), np.float32)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), segmenter.labels(slices(3), (1.0, 0.7)))


def test_memory_is_that_of_a_batch_and_the_result_does_not_depend_on_it():
    net = ByIntensity()
    labels = Segmenter(net, SETTINGS).labels(slices(5), (1.0, 1.0))
    assert net.batches == [(2, 16, 16, 1), (2, 16, 16, 1), (1, 16, 16, 1)]
    other = Segmenter(ByIntensity(), SETTINGS | {"batch_size": 5}).labels(slices(5), (1.0, 1.0))
    np.testing.assert_array_equal(labels, other)


class Recorded:
    """A net that keeps what it is shown and finds background everywhere."""

    def __init__(self, *size: int, channels: int = 1):
        self.input_shape = (None, *size, channels)
        self.shown: list[np.ndarray] = []

    def predict(self, images, batch_size, verbose):
        self.shown.append(images)
        return np.eye(4, dtype=np.float32)[np.zeros(images.shape[:3], int)]


@pytest.mark.parametrize(("neighbours", "batch_size"), [(1, 2), (2, 2), (2, 3), (7, 1), (1, 5)])
@pytest.mark.parametrize("normalisation", ["z_score", "column_l2"])
def test_neighbouring_slices_are_channels(neighbours, batch_size, normalisation, monkeypatch):
    scan = np.random.default_rng(3).integers(0, 900, (5, 9, 7)).astype(np.int16)
    settings = SETTINGS | {"size": [6, 8], "batch_size": batch_size, "normalisation": normalisation}
    alone, net = Recorded(6, 8), Recorded(6, 8, channels=2 * neighbours + 1)
    Segmenter(alone, settings | {"batch_size": 5}).labels(scan, (1.0, 0.6))
    prepared = alone.shown[0][..., 0]

    resampled = []
    to_model = InPlaneGrid.to_model
    monkeypatch.setattr(
        InPlaneGrid,
        "to_model",
        lambda grid, part, outside: resampled.append(len(part)) or to_model(grid, part, outside),
    )
    labels = Segmenter(net, settings).labels(scan, (1.0, 0.6))
    assert labels.shape == scan.shape
    assert sum(resampled) == 5, "each slice once"
    assert max(resampled) <= batch_size + neighbours, "not the whole series"
    shown = np.concatenate(net.shown)
    assert (shown.dtype, shown.shape) == (np.float32, (5, 6, 8, 2 * neighbours + 1))
    padded = np.pad(prepared, ((neighbours, neighbours), (0, 0), (0, 0)), mode="edge")
    for index in range(5):
        expected = np.moveaxis(padded[index : index + 2 * neighbours + 1], 0, -1)
        np.testing.assert_array_equal(shown[index], expected)


def test_a_net_without_a_middle_channel_is_an_error():
    with pytest.raises(ValueError, match=r"the net takes 4 channels; expected an odd number.*2 \* neighbours \+ 1"):
        Segmenter(Recorded(16, 16, channels=4), SETTINGS)


def augmented(shift=0.0, degrees=0.0, **changes) -> dict:
    return SETTINGS | changes | {"test_time_augmentation": {"shift": shift, "rotation_degrees": degrees}}


class ByPlace:
    """A net that says the same whatever it sees: class 1 in the first row, background below."""

    input_shape = (None, 4, 8, 1)

    def predict(self, images, batch_size, verbose):
        classes = np.zeros(images.shape[:3], int)
        classes[:, 0] = 1
        return np.eye(2, dtype=np.float32)[classes]


def test_shifted_views_are_averaged_where_they_show_a_pixel():
    # 0.25 of 4 x 8: one row and two columns. Shown down, a pixel is found in the row below; so row 1, shown up, is
    # where the net says class 1. Row 0 cannot be seen in what was shown up, row 3 not in what was shown down, and the
    # outer two columns only in what was shown the other way.
    probabilities = Segmenter(ByPlace(), augmented(0.25, size=[4, 8])).predict(np.zeros((3, 4, 8, 1), np.float32))
    middle = [3 / 4, 1 / 5, 0, 0]
    outer = [2 / 3, 1 / 4, 0, 0]
    expected = np.array([outer, outer, middle, middle, middle, middle, outer, outer]).T
    for one in probabilities:
        np.testing.assert_allclose(one[..., 1], expected, atol=1e-6)
        np.testing.assert_allclose(one[..., 0], 1 - expected, atol=1e-6)


def test_shifts_are_by_whole_pixels():
    # 0.3 of 4 rows and of 2 columns: 1.2 rows and 0.6 columns, 1 of each. What comes in is air: the minimum, 0.
    net = Recorded(4, 2)
    ramp = np.repeat(np.array([0, 10, 20, 30], np.float32)[:, None], 2, axis=1)
    Segmenter(net, augmented(0.3, size=[4, 2])).predict(ramp[None, ..., None])
    assert len(net.shown) == 5
    np.testing.assert_array_equal(net.shown[0][0, ..., 0], ramp)
    np.testing.assert_array_equal(net.shown[1][0, :, 0, 0], [0, 0, 10, 20])  # down
    np.testing.assert_array_equal(net.shown[2][0, :, 0, 0], [10, 20, 30, 0])  # up
    np.testing.assert_array_equal(net.shown[3][0, ..., 0], ramp * [0, 1])  # to the right
    np.testing.assert_array_equal(net.shown[4][0, ..., 0], ramp * [1, 0])  # to the left
    # A shift of less than half a pixel is none.
    net = Recorded(4, 2)
    Segmenter(net, augmented(0.1, size=[4, 2])).predict(ramp[None, ..., None])
    assert len(net.shown) == 1


def test_turned_views_are_averaged():
    # By 90 degrees the net's first row comes back as the last column, and as the first.
    class Square(ByPlace):
        input_shape = (None, 3, 3, 1)

    probabilities = Segmenter(Square(), augmented(0, 90, size=[3, 3])).predict(np.zeros((1, 3, 3, 1), np.float32))
    np.testing.assert_allclose(probabilities[0, ..., 1] * 3, [[2, 1, 2], [1, 0, 1], [1, 0, 1]], atol=1e-5)


def test_all_channels_are_moved_together():
    net = Recorded(4, 8, channels=3)
    images = np.random.default_rng(0).normal(size=(2, 4, 8, 3)).astype(np.float32)
    Segmenter(net, augmented(0.25, 0, size=[4, 8])).predict(images)
    down, up = net.shown[1], net.shown[2]
    np.testing.assert_array_equal(down[:, 1:], images[:, :-1])
    np.testing.assert_array_equal(up[:, :-1], images[:, 1:])
    # One minimum over all channels is air, as in training.
    np.testing.assert_array_equal(down[:, 0], np.broadcast_to(images.min(axis=(1, 2, 3))[:, None, None], (2, 8, 3)))


def test_what_a_view_shows_is_what_training_would_show():
    image = np.random.default_rng(0).normal(size=(9, 7, 3)).astype(np.float32)
    net = Recorded(9, 7, channels=3)
    Segmenter(net, augmented(0.1, 12.5, size=[9, 7])).predict(image[None])
    moves = [{"shift_rows": 1}, {"shift_rows": -1}, {"shift_columns": 1}, {"shift_columns": -1}]
    moves += [{"rotation_degrees": 12.5}, {"rotation_degrees": -12.5}]
    for shown, move in zip(net.shown[1:], moves, strict=True):
        expected, _ = apply_augmentation(image, np.zeros((9, 7), int), Augmentation(**move))
        np.testing.assert_allclose(shown[0], expected, atol=1e-5)


@pytest.mark.parametrize(("shift", "degrees"), [(0.125, 0), (0.25, 90), (0, 90)])
def test_a_net_that_moves_with_its_input_decides_the_same(shift, degrees):
    # It looks at one pixel at a time, and whole pixels are moved: every view says the same.
    plain, moved = (Segmenter(ByIntensity(), settings) for settings in (SETTINGS, augmented(shift, degrees)))
    np.testing.assert_array_equal(moved.labels(slices(), (1.0, 1.0)), plain.labels(slices(), (1.0, 1.0)))
    probabilities = moved.probabilities(slices(), (1.0, 1.0))
    np.testing.assert_allclose(probabilities, plain.probabilities(slices(), (1.0, 1.0)), atol=1e-6)


class Blurred:
    """A net of many-valued probabilities that depend on grey and place."""

    def __init__(self, *size: int):
        self.input_shape = (None, *size, 1)

    def predict(self, images, batch_size, verbose):
        ramp = np.linspace(-1, 1, images.shape[1])[:, None, None] * np.arange(4)
        shares = np.exp(images * np.array([0.1, -0.3, 0.7, 0]) + ramp)
        return (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.99), st.floats(0, 179))
def test_averaged_probabilities_sum_to_1(height, width, shift, degrees):
    segmenter = Segmenter(Blurred(height, width), augmented(shift, degrees, size=[height, width]))
    images = np.random.default_rng(height).normal(size=(2, height, width, 1)).astype(np.float32)
    probabilities = segmenter.predict(images)
    assert (probabilities.shape, probabilities.dtype) == ((2, height, width, 4), np.float32)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    assert probabilities.min() >= 0


def test_off_is_the_net_alone():
    images = np.random.default_rng(0).normal(size=(2, 9, 7, 1)).astype(np.float32)
    net = Blurred(9, 7)
    for settings in (augmented(size=[9, 7]), SETTINGS | {"size": [9, 7]}):
        np.testing.assert_array_equal(Segmenter(net, settings).predict(images), net.predict(images, 2, 0))
    assert np.any(Segmenter(net, augmented(0.1, size=[9, 7])).predict(images) != net.predict(images, 2, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -0.1}, r"test_time_augmentation.shift is -0.1; expected 0 or more, below 1; 0 is off"),
        ({"shift": 1.0}, r"shift is 1.0; expected 0 or more, below 1"),
        ({"rotation_degrees": float("nan")}, r"rotation_degrees is nan; expected 0 or more, below 180"),
        ({"rotate": 5}, r"unknown setting evaluation.test_time_augmentation.rotate; expected some of \['shift'"),
    ],
)
def test_impossible_test_time_augmentation_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(ByIntensity(), SETTINGS | {"test_time_augmentation": settings})


class Unsure(ByIntensity):
    """The same, but torn between vertebrae and background, and nearly sure of the canal."""

    input_shape = (None, 32, 24, 1)

    def predict(self, images, batch_size, verbose):
        decided = super().predict(images, batch_size, verbose)
        beliefs = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.9, 0.1], [0, 0, 0, 1]], np.float32)
        beliefs[1] += np.array([-0.01, 0.01, 0, 0], np.float32)
        return beliefs[decided.argmax(axis=-1)]


def test_the_entropy_of_each_structure_by_hand():
    # 32 x 24 pixels are the net's own: nothing is interpolated.
    net, scan = Unsure(), slices(5)
    scan[4, 20:28, 4:10] = 500  # no canal in the last batch
    settings = SETTINGS | {"size": [32, 24]}
    found = Segmenter(net, settings).segmentation(scan, (1.0, 1.0))
    assert net.batches == [(2, 32, 24, 1), (2, 32, 24, 1), (1, 32, 24, 1)]
    np.testing.assert_array_equal(found.labels, Segmenter(Unsure(), settings).labels(scan, (1.0, 1.0)))
    assert (found.labels.dtype, np.unique(found.labels).tolist()) == (np.uint8, [0, 1, 2])
    torn = -(0.49 * np.log(0.49) + 0.51 * np.log(0.51)) / np.log(4)
    nearly = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) / np.log(4)
    assert found.entropy == pytest.approx({"vertebrae": torn, "canal": nearly, "IVD": np.nan}, abs=1e-6, nan_ok=True)
    assert found.disagreement is None


class RowsByGrey:
    """A net that finds vertebrae in the first row of dark slices and in the first two of bright ones."""

    input_shape = (None, 4, 8, 1)

    def __init__(self):
        self.calls = 0

    def predict(self, images, batch_size, verbose):
        self.calls += 1
        classes = np.zeros(images.shape[:3], int)
        classes[:, 0] = 1
        classes[images[..., 0].mean(axis=(1, 2)) > 0, 1] = 1
        return np.eye(4, dtype=np.float32)[classes] * 0.8 + 0.05


DARK_AND_BRIGHT = np.array([0, 100], np.int16)[:, None, None] * np.ones((2, 4, 8), np.int16)
MOVED = {"shift": 0.25}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_disagreement_by_hand(batch_size):
    # By one row and two columns. Shown down, the dark slice's row of 8 is lost above row 0, where the slice as it is
    # has it; of the bright one's two rows one is found, in row 0. So 8 pixels are shared, of 0 + 8 and 8 + 16: a Dice
    # of 1/2. Shown up, 8 are shared in row 1, of 8 and 0, 16 and 8. To the sides all agree where they can be seen.
    segmenter = Segmenter(RowsByGrey(), SETTINGS | {"size": [4, 8], "batch_size": batch_size})
    found = segmenter.segmentation(DARK_AND_BRIGHT, (1.0, 1.0), MOVED)
    expected = {"vertebrae": (1 / 2 + 1 / 2 + 0 + 0) / 4, "canal": np.nan, "IVD": np.nan}
    assert found.disagreement == pytest.approx(expected, nan_ok=True)


def test_a_structure_that_only_some_views_show_is_compared_in_those():
    class Middle(RowsByGrey):
        def predict(self, images, batch_size, verbose):
            classes = np.zeros(images.shape[:3], int)
            classes[:, 1, :2] = 3
            return np.eye(4, dtype=np.float32)[classes]

    settings = SETTINGS | {"size": [4, 8]}
    found = Segmenter(Middle(), settings).segmentation(DARK_AND_BRIGHT, (1.0, 1.0), {"shift": 0.75})
    # Moved by 3 of 4 rows, a slice shows its first or its last row alone, which is background on both sides. Moved by 6
    # of 8 columns it shows two: those of the disc, which comes back elsewhere, or those it comes back in.
    assert found.disagreement == pytest.approx({"vertebrae": np.nan, "canal": np.nan, "IVD": 1}, nan_ok=True)


def test_a_net_that_moves_with_its_input_does_not_disagree():
    found = Segmenter(ByIntensity(), SETTINGS).segmentation(slices(), (1.0, 1.0), {"shift": 0.125})
    assert found.disagreement == pytest.approx({"vertebrae": 0, "canal": 0, "IVD": np.nan}, nan_ok=True)


def test_disagreement_does_not_depend_on_test_time_augmentation_which_saves_its_passes():
    def segmentation(augmentation):
        net = RowsByGrey()
        settings = SETTINGS | {"size": [4, 8], "test_time_augmentation": augmentation}
        found = Segmenter(net, settings).segmentation(DARK_AND_BRIGHT, (1.0, 1.0), MOVED)
        calls = net.calls
        plain = Segmenter(net, settings).segmentation(DARK_AND_BRIGHT, (1.0, 1.0))
        np.testing.assert_array_equal(found.labels, plain.labels)
        assert str(found.entropy) == str(plain.entropy), "of the very same probabilities"
        return found.disagreement, calls

    alone, calls = segmentation({})
    assert calls == 5, "as they are, up, down, to the left and to the right"
    for augmentation, expected in ((MOVED, 5), (MOVED | {"rotation_degrees": 30}, 7), ({"rotation_degrees": 30}, 7)):
        found, calls = segmentation(augmentation)
        assert found == pytest.approx(alone, nan_ok=True)
        assert calls == expected


@pytest.mark.parametrize(
    ("disagreement", "message"),
    [
        ({}, r"disagreement \{\} moves nothing at the net's size \[16, 16\]; expected a shift of a pixel"),
        ({"shift": 0.01}, r"disagreement \{'shift': 0.01\} moves nothing"),
        ({"rotate": 3}, r"unknown setting disagreement.rotate"),
        ({"shift": 1.5}, r"disagreement.shift is 1.5; expected 0 or more, below 1"),
    ],
)
def test_a_disagreement_that_cannot_be_is_named(disagreement, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(ByIntensity(), SETTINGS).segmentation(slices(), (1.0, 1.0), disagreement)


def test_test_time_augmentation_can_be_another_than_the_registered():
    plain = Segmenter(Blurred(9, 7), SETTINGS | {"size": [9, 7]})
    images = np.random.default_rng(0).normal(size=(2, 9, 7, 1)).astype(np.float32)
    before = plain.predict(images)
    moved = plain.with_test_time_augmentation({"shift": 0.2, "rotation_degrees": 5})
    assert moved.model is plain.model
    built = Segmenter(plain.model, augmented(0.2, 5, size=[9, 7]))
    np.testing.assert_array_equal(moved.predict(images), built.predict(images))
    np.testing.assert_array_equal(moved.with_test_time_augmentation({}).predict(images), before)
    np.testing.assert_array_equal(plain.predict(images), before)
    assert (plain.augmented, moved.augmented) == (False, True)
    with pytest.raises(ValueError, match=r"test_time_augmentation.shift is 2; expected 0 or more"):
        plain.with_test_time_augmentation({"shift": 2})


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_volume_is_segmented_in_its_own_storage_order(axes, flip):
    sagittal = slices()
    stored = np.transpose(sagittal, axes)
    # Columns of the direction belong to index x, y, z: the array axes in reverse.
    direction = SAGITTAL_AXES[list(axes)][::-1].T.copy()
    if flip:
        stored = stored[::-1]
        direction[:, 2] *= -1
    spacing = tuple(np.array([4.0, 1.0, 1.0])[list(axes)][::-1])
    volume = Volume(np.ascontiguousarray(stored), spacing, (5, -3, 2), direction)
    labels = Segmenter(ByIntensity(), SETTINGS).segment(volume)
    expected = np.transpose(Segmenter(ByIntensity(), SETTINGS).labels(sagittal, (1.0, 1.0)), axes)
    np.testing.assert_array_equal(labels.array, expected[::-1] if flip else expected)
    assert (labels.spacing_mm, labels.origin_mm) == (volume.spacing_mm, volume.origin_mm)
    np.testing.assert_array_equal(labels.direction, volume.direction)


def test_the_digest_follows_the_weights():
    net, same = ByIntensity(), ByIntensity()
    assert weights_digest(net) == weights_digest(same)
    same.weights = same.weights * 2
    assert weights_digest(net) != weights_digest(same)


@pytest.mark.parametrize(
    ("array", "spacing", "message"),
    [
        (np.zeros((3, 4)), (1, 1), r"slices of shape \(3, 4\); expected \(n, rows, columns\)"),
        (np.zeros((0, 3, 4)), (1, 1), r"slices of shape \(0, 3, 4\)"),
        (slices(), (1.0,), r"pixel spacing \(1.0,\); expected two positive lengths"),
        (slices(), (1.0, 0.0), r"pixel spacing \(1.0, 0.0\); expected two positive lengths"),
        (slices(), (1.0, float("nan")), r"expected two positive lengths"),
        (np.ones((2, 8, 8)), (1, 1), r"intensities are constant"),
        (np.full((2, 8, 8), np.nan), (1, 1), r"aren't finite"),
    ],
)
def test_what_cannot_be_segmented_is_named(array, spacing, message):
    segmenter = Segmenter(ByIntensity(), SETTINGS)
    for segment in (segmenter.labels, segmenter.probabilities, segmenter.segmentation):
        with pytest.raises(ValueError, match=message):
            segment(array, spacing)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"\['percentiles'\] are missing"):
        Segmenter(ByIntensity(), {key: value for key, value in SETTINGS.items() if key != "percentiles"})
