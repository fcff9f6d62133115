from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow import models
from lumbarflow.models.atlas import adapt
from lumbarflow.networks import load_model, save_model

SIZE = (20, 28)
# A quarter of the size.
FARTHEST = (5, 7)


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An uneven pattern and its labels, far enough inside to be shifted by FARTHEST: float32 and uint8 (H, W)."""
    rng = np.random.default_rng(seed)
    image, label = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.uint8)
    image[5:15, 7:21] = rng.normal(1, 0.5, (10, 14))
    label[6:10, 8:19], label[9:14, 10:13], label[5:8, 15:20] = 1, 2, 3
    return image, label


def shifted(plane: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pixel by pixel, with 0 from outside."""
    result = np.zeros_like(plane)
    for r, c in np.ndindex(*plane.shape):
        if 0 <= r - down < plane.shape[0] and 0 <= c - right < plane.shape[1]:
            result[r, c] = plane[r - down, c - right]
    return result


def batch(*planes: np.ndarray) -> np.ndarray:
    return np.stack(planes).astype(np.float32)[..., None]


def adapted(images, labels, **settings):
    model = models.build("atlas", images[0].shape, 1, 4, **settings)
    adapt(model, [(batch(*images), np.stack(labels))])
    return model


@pytest.fixture(scope="module")
def model():
    image, label = scene()
    return adapted([image], [label])


def shifts_of(model, *images) -> list[list[int]]:
    return np.asarray(model.get_layer("atlas").shifts(batch(*images))).tolist()


def predicted(model, *images) -> np.ndarray:
    return np.asarray(model(batch(*images))).argmax(axis=-1)


@given(
    st.lists(
        st.tuples(st.integers(-FARTHEST[0], FARTHEST[0]), st.integers(-FARTHEST[1], FARTHEST[1])),
        min_size=1,
        max_size=4,
    )
)
def test_slices_that_are_shifted_have_their_labels_shifted_equally(model, shifts):
    image, label = scene()
    moved = [shifted(image, *shift) for shift in shifts]
    assert shifts_of(model, *moved) == [list(shift) for shift in shifts]
    np.testing.assert_array_equal(predicted(model, *moved), [shifted(label, *shift) for shift in shifts])


def test_the_shift_is_the_one_of_the_highest_correlation_summed_pixel_by_pixel():
    # Noise, whose correlation is as high around the edges as within them: wrapping around would find other shifts.
    rng = np.random.default_rng(5)
    template, *images = rng.normal(size=(17, 8, 11))
    model = adapted([template], [np.zeros((8, 11), np.uint8)], maximum_shift=0.4)
    template = (template - template.mean()) / np.linalg.norm(template - template.mean())
    expected = []
    for image in images:
        scores = {
            (down, right): ((image - image.mean()) * shifted(template, down, right)).sum()
            for down in range(-3, 4)
            for right in range(-4, 5)
        }
        expected.append(list(max(scores, key=scores.get)))
    assert shifts_of(model, *images) == expected


def test_brightness_and_contrast_do_not_move_a_slice(model):
    image = shifted(scene()[0], -4, 6)
    assert shifts_of(model, image, 3 * image + 40, 0.01 * image - 0.5) == [[-4, 6]] * 3


def test_frequencies_are_counted_pixel_by_pixel():
    labels = np.array(
        [
            [[0, 1, 2], [3, 3, 0]],
            [[0, 1, 1], [3, 0, 0]],
            [[0, 2, 1], [3, 0, 0]],
            [[1, 1, 3], [3, 0, 0]],
        ],
        np.uint8,
    )
    images = np.random.default_rng(0).normal(size=labels.shape)
    model = adapted(images, labels, maximum_shift=0.0)
    expected = np.array(
        [
            [[3, 1, 0, 0], [0, 3, 1, 0], [0, 2, 1, 1]],
            [[0, 0, 0, 4], [3, 0, 0, 1], [4, 0, 0, 0]],
        ]
    )
    np.testing.assert_array_equal(model.get_layer("atlas").frequencies, expected / 4)
    np.testing.assert_array_equal(predicted(model, images[0]), [[[0, 1, 1], [3, 0, 0]]])


def test_masks_are_counted_after_alignment_with_the_other_slices():
    # Two of the three lie alike, so that the third is the one to be moved, whatever batch it comes in.
    image, label = scene()
    third = label.copy()
    third[9, 10] = 3
    model = models.build("atlas", SIZE, 1, 4)
    moved = batch(shifted(image, 3, -5)), shifted(third, 3, -5)[None]
    adapt(model, [(batch(image, image), np.stack([label, label])), moved])
    expected = np.eye(4)[label]
    expected[9, 10] = [0, 0, 2 / 3, 1 / 3]
    np.testing.assert_allclose(model.get_layer("atlas").frequencies, expected, rtol=1e-6)
    standardised = (image - image.mean()) / np.linalg.norm(image - image.mean())
    # Away from the rows and columns that the third slice doesn't reach.
    inside = np.s_[: -FARTHEST[0], FARTHEST[1] :]
    np.testing.assert_allclose(model.get_layer("atlas").template[inside], standardised[inside], atol=1e-6)
    # Every call starts anew: what was the template before does not align anything.
    adapt(model, [(batch(shifted(image, 3, -5)), shifted(label, 3, -5)[None])])
    np.testing.assert_array_equal(model.get_layer("atlas").frequencies, np.eye(4)[shifted(label, 3, -5)])


def test_what_leaves_at_one_edge_does_not_come_back_at_the_other():
    image, label = scene()
    label[0], label[:, -1] = 1, 2
    model = adapted([image], [label])
    moved = predicted(model, shifted(image, -3, 4))[0]
    np.testing.assert_array_equal(moved, shifted(label, -3, 4))
    assert not moved[-3:].any()
    assert not moved[:, :4].any()
    # Nor in the masks that are counted.
    model = adapted([image, image, shifted(image, 3, -4)], [label, label, label])
    frequencies = np.asarray(model.get_layer("atlas").frequencies)
    np.testing.assert_allclose(frequencies[-3:, :4, 0], np.full((3, 4), 1), rtol=1e-6)
    np.testing.assert_allclose(frequencies[8:-3, 0], [[1, 0, 0, 0]] * 9, rtol=1e-6)


def test_no_shift_is_farther_than_allowed():
    image, label = scene()
    model = adapted([image], [label], maximum_shift=0.15)
    # 0.15 of 20 and of 28 pixels, rounded down.
    (down, right), nearer = shifts_of(model, shifted(image, 5, -7), shifted(image, -3, 4))
    assert abs(down) <= 3
    assert abs(right) <= 4
    assert nearer == [-3, 4]


@pytest.mark.parametrize("grey", [0.0, -1.37, 1000.1])
def test_a_constant_slice_stays_where_it_is(model, grey):
    constant = np.full(SIZE, grey)
    assert shifts_of(model, constant, scene()[0]) == [[0, 0], [0, 0]]
    # As one of the training slices it moves nothing either.
    image, label = scene()
    both = adapted([constant, image], [np.zeros_like(label), label])
    np.testing.assert_array_equal(both.get_layer("atlas").frequencies, (np.eye(4)[label] + np.eye(4)[0]) / 2)


def test_a_slice_is_the_same_in_every_batch(model):
    rng = np.random.default_rng(3)
    images = rng.normal(size=(5, *SIZE, 1)).astype(np.float32)
    together = model.predict(images, verbose=0)
    alone = model.predict(images, batch_size=1, verbose=0)
    np.testing.assert_array_equal(together, alone)


def test_before_it_is_adapted_all_classes_are_equally_frequent():
    model = models.build("atlas", (3, 5), 1, 4)
    np.testing.assert_array_equal(
        model(np.random.default_rng(0).normal(size=(2, 3, 5, 1))), np.full((2, 3, 5, 4), 0.25)
    )


def test_nothing_is_trained_and_everything_is_float32_and_saved(model, tmp_path):
    mixed = models.build("atlas", SIZE, 1, 4, precision="mixed_bfloat16", maximum_shift=0.1)
    assert mixed.trainable_weights == []
    # The template and four classes.
    assert mixed.count_params() == 20 * 28 * 5
    assert {str(weight.dtype) for weight in mixed.weights} == {"float32"}
    assert mixed.get_layer("atlas").compute_dtype == "float32"
    assert type(mixed).from_config(mixed.get_config()).get_layer("atlas").maximum_shift == 0.1
    save_model(model, tmp_path / "model.keras")
    image, label = scene()
    np.testing.assert_array_equal(
        predicted(load_model(tmp_path / "model.keras"), shifted(image, 2, 3))[0], shifted(label, 2, 3)
    )


def test_more_than_one_channel_is_refused():
    with pytest.raises(ValueError, match="atlas: the slices have 2 channels; expected 1"):
        models.build("atlas", SIZE, 2, 4)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_shift_that_is_no_share_of_the_size_is_refused(share):
    with pytest.raises(ValueError, match=r"atlas: maximum_shift is .*; expected a share of the size in \[0, 1\)"):
        models.build("atlas", SIZE, 1, 4, maximum_shift=share)


def test_training_slices_that_cannot_be_counted_are_refused():
    image, label = scene()
    model = models.build("atlas", SIZE, 1, 4)
    with pytest.raises(ValueError, match="atlas: there are no training slices; expected at least one"):
        adapt(model, [])
    with pytest.raises(ValueError, match="atlas: a training mask holds the label 4; expected 0 to 3"):
        adapt(model, [(batch(image), label[None] + 1)])
    damaged = image.copy()
    damaged[2, 3] = np.nan
    with pytest.raises(
        FloatingPointError, match="atlas: batch 2 of the training slices holds values that are not finite"
    ):
        adapt(model, [(batch(image), label[None]), (batch(damaged), label[None])])
