from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumbarflow.augmentation import Augmentation, AugmentationSettings, apply_augmentation, draw_augmentation

SETTINGS = AugmentationSettings(flip_rows=0.5, flip_columns=0.5)
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))
SEEDS = st.integers(0, 2**32 - 1)


def random_slice(seed: int, size) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=size).astype(np.float16), rng.integers(0, 4, size).astype(np.uint8)


@given(seed=SEEDS, size=SIZES)
@settings(deadline=None)
def test_the_default_augmentation_changes_nothing(seed, size):
    image, label = random_slice(seed, size)
    changed_image, changed_label = apply_augmentation(image.copy(), label.copy(), Augmentation())
    assert changed_image.dtype == np.float32
    assert np.array_equal(changed_image, image)
    assert np.array_equal(changed_label, label)


@given(seed=SEEDS)
@settings(deadline=None)
def test_settings_of_0_draw_the_identity(seed):
    off = AugmentationSettings(**{field.name: 0 for field in dataclasses.fields(AugmentationSettings)})
    drawn = draw_augmentation(np.random.default_rng(seed), off, (5, 7))
    assert dataclasses.replace(drawn, noise_seed=0) == Augmentation()


@given(seed=SEEDS, size=SIZES)
@settings(deadline=None)
def test_one_seed_gives_one_result(seed, size):
    image, label = random_slice(seed, size)
    drawn = [draw_augmentation(np.random.default_rng(seed), SETTINGS, size) for _ in range(2)]
    assert drawn[0] == drawn[1]
    (image_1, label_1), (image_2, label_2) = (apply_augmentation(image, label, one) for one in drawn)
    assert np.array_equal(image_1, image_2)
    assert np.array_equal(label_1, label_2)
    assert draw_augmentation(np.random.default_rng(seed + 1), SETTINGS, size) != drawn[0]


@given(seed=SEEDS, size=SIZES)
@settings(deadline=None)
def test_classes_stay_classes_and_inputs_stay_as_they_were(seed, size):
    image, label = random_slice(seed, size)
    label[label == 2] = 3
    before = image.copy(), label.copy()
    changed_image, changed_label = apply_augmentation(
        image, label, draw_augmentation(np.random.default_rng(seed), SETTINGS, size)
    )
    assert set(np.unique(changed_label)) <= set(np.unique(label)) | {0}
    assert (changed_label.dtype, changed_label.shape) == (np.uint8, size)
    assert (changed_image.dtype, changed_image.shape) == (np.float32, size)
    assert np.isfinite(changed_image).all()
    assert np.array_equal(image, before[0])
    assert np.array_equal(label, before[1])


@given(seed=SEEDS)
@settings(deadline=None)
def test_drawn_numbers_stay_within_their_settings(seed):
    wide = AugmentationSettings(
        rotation_degrees=20, scale=0.5, shift=0.1, gamma=1, contrast=0.25, brightness=2, noise=3
    )
    drawn = draw_augmentation(np.random.default_rng(seed), wide, (100, 300))
    assert abs(drawn.rotation_degrees) <= 20
    assert 1 / 1.5 <= drawn.scale <= 1.5
    assert abs(drawn.shift_rows) <= 10
    assert abs(drawn.shift_columns) <= 30
    assert 0.5 <= drawn.gamma <= 2
    assert 0.8 <= drawn.contrast <= 1.25
    assert abs(drawn.brightness) <= 2
    assert 0 <= drawn.noise <= 3
    assert not drawn.flip_rows
    assert not drawn.flip_columns


def test_drawn_numbers_use_the_whole_of_their_settings():
    wide = AugmentationSettings(rotation_degrees=20, scale=0.5, shift=0.1, noise=3, flip_rows=0.25, flip_columns=1)
    rng = np.random.default_rng(0)
    drawn = [draw_augmentation(rng, wide, (100, 300)) for _ in range(2000)]
    assert np.ptp([one.rotation_degrees for one in drawn]) > 39
    assert np.ptp([one.shift_rows for one in drawn]) > 19
    assert np.ptp([one.shift_columns for one in drawn]) > 59
    assert np.ptp([one.noise for one in drawn]) > 2.9
    assert min(one.scale for one in drawn) < 0.68
    assert max(one.scale for one in drawn) > 1.48
    assert np.mean([one.flip_rows for one in drawn]) == pytest.approx(0.25, abs=0.04)
    assert all(one.flip_columns for one in drawn)
    assert len({one.noise_seed for one in drawn}) == 2000


@given(seed=SEEDS, size=SIZES, rows=st.integers(-26, 26), columns=st.integers(-26, 26))
@settings(deadline=None)
def test_whole_pixel_shifts_are_exact(seed, size, rows, columns):
    image, label = random_slice(seed, size)
    moved_image, moved_label = apply_augmentation(image, label, Augmentation(shift_rows=rows, shift_columns=columns))
    expected_image, expected_label = np.full(size, image.min(), np.float32), np.zeros(size, np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            if 0 <= row - rows < size[0] and 0 <= column - columns < size[1]:
                expected_image[row, column] = image[row - rows, column - columns]
                expected_label[row, column] = label[row - rows, column - columns]
    assert np.array_equal(moved_image, expected_image)
    assert np.array_equal(moved_label, expected_label)


@given(seed=SEEDS, length=st.integers(1, 25), turns=st.integers(-3, 3))
@settings(deadline=None)
def test_quarter_turns_are_those_of_numpy(seed, length, turns):
    image, label = random_slice(seed, (length, length))
    turned_image, turned_label = apply_augmentation(image, label, Augmentation(rotation_degrees=90 * turns))
    assert np.allclose(turned_image, np.rot90(image, turns), atol=1e-4)
    assert np.array_equal(turned_label, np.rot90(label, turns))


@given(seed=SEEDS, size=SIZES)
@settings(deadline=None)
def test_flips_are_exact(seed, size):
    image, label = random_slice(seed, size)
    flipped_image, flipped_label = apply_augmentation(image, label, Augmentation(flip_rows=True))
    assert np.array_equal(flipped_image, image[::-1])
    assert np.array_equal(flipped_label, label[::-1])
    flipped_image, flipped_label = apply_augmentation(image, label, Augmentation(flip_columns=True))
    assert np.array_equal(flipped_image, image[:, ::-1])
    assert np.array_equal(flipped_label, label[:, ::-1])


def test_a_flip_comes_before_the_rotation():
    image, label = random_slice(0, (6, 6))
    both = Augmentation(flip_columns=True, rotation_degrees=90)
    assert np.array_equal(apply_augmentation(image, label, both)[1], np.rot90(label[:, ::-1]))


def test_half_a_pixel_is_the_mean_of_two():
    image = np.array([[0.0, 4.0, 8.0]])
    moved, _ = apply_augmentation(image, np.zeros((1, 3), np.uint8), Augmentation(shift_columns=0.5))
    # The first pixel lies half in the air outside, which is the minimum, 0.
    assert moved.tolist() == [[0.0, 2.0, 6.0]]


def test_scale_enlarges_about_the_centre():
    label = np.zeros((8, 12), np.uint8)
    label[3:5, 5:7] = 1
    _, larger = apply_augmentation(label.astype(float), label, Augmentation(scale=2))
    expected = np.zeros((8, 12), np.uint8)
    expected[2:6, 4:8] = 1
    assert np.array_equal(larger, expected)


@given(seed=SEEDS)
@settings(deadline=None)
def test_image_and_label_move_together(seed):
    # A bright square on unequal sides, away from the centre: where the label goes, brightness goes.
    label = np.zeros((40, 56), np.uint8)
    label[8:20, 30:46] = 3
    still = AugmentationSettings(
        rotation_degrees=40, shift=0.15, flip_rows=0.5, flip_columns=0.5, gamma=0, contrast=0, brightness=0, noise=0
    )
    drawn = draw_augmentation(np.random.default_rng(seed), still, label.shape)
    moved_image, moved_label = apply_augmentation(label / 3, label, drawn)
    # Pixels on the edge are partly bright; those clearly in or out must agree.
    assert (moved_label[moved_image > 0.76] == 3).all()
    assert (moved_label[moved_image < 0.24] == 0).all()
    assert (moved_image > 0.76).sum() > 20


def test_gamma_bends_the_slices_own_range():
    image, label = np.array([[-1.0, 0.0, 3.0]]), np.zeros((1, 3), np.uint8)
    bent, _ = apply_augmentation(image, label, Augmentation(gamma=2))
    # 0 lies a quarter up the range of 4: 4 * 0.25**2 - 1.
    assert np.allclose(bent, [[-1.0, -0.75, 3.0]])


def test_gamma_leaves_a_constant_slice_alone():
    image = np.full((2, 3), 5.0)
    bent, _ = apply_augmentation(image, np.zeros((2, 3), np.uint8), Augmentation(gamma=2))
    assert np.array_equal(bent, image)


def test_contrast_and_brightness_by_hand():
    image, label = np.array([[0.0, 1.0, 5.0]]), np.zeros((1, 3), np.uint8)
    changed, _ = apply_augmentation(image, label, Augmentation(contrast=2, brightness=0.5))
    assert np.allclose(changed, [[-1.5, 0.5, 8.5]])


def test_noise_has_its_standard_deviation_and_seed():
    image, label = np.zeros((80, 100)), np.zeros((80, 100), np.uint8)
    noisy, _ = apply_augmentation(image, label, Augmentation(noise=0.5, noise_seed=1))
    assert noisy.std() == pytest.approx(0.5, rel=0.05)
    assert noisy.mean() == pytest.approx(0, abs=0.03)
    other, _ = apply_augmentation(image, label, Augmentation(noise=0.5, noise_seed=2))
    assert abs(np.corrcoef(noisy.ravel(), other.ravel())[0, 1]) < 0.05


def test_image_and_label_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image \(2, 3\) and label \(3, 2\) differ in shape"):
        apply_augmentation(np.zeros((2, 3)), np.zeros((3, 2), np.uint8), Augmentation())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": -0.1}, "augmentation.scale is -0.1; expected a finite number, 0 or more"),
        ({"noise": float("nan")}, "augmentation.noise is nan"),
        ({"flip_rows": 2}, "augmentation.flip_rows is 2; expected a probability"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**setting)
