from __future__ import annotations

import numpy as np
import pytest

from lumbarflow.imaging import SAGITTAL_AXES, Volume
from lumbarflow.inference import Segmenter, weights_digest

SETTINGS = {"size": [16, 16], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100], "batch_size": 2}


class ByIntensity:
    """A stand-in for a net: bright pixels are canal, middling ones vertebrae, dark ones background."""

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
    with pytest.raises(ValueError, match=message):
        Segmenter(ByIntensity(), SETTINGS).labels(array, spacing)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"\['percentiles'\] are missing"):
        Segmenter(ByIntensity(), {key: value for key, value in SETTINGS.items() if key != "percentiles"})
