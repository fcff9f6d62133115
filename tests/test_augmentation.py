from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from lumbarflow.augmentation import FOLD_FREE, Augmentation, AugmentationSettings, apply_augmentation, draw_augmentation

LATER = {"elastic_shift": 0.1, "bias_field": 0.5, "low_resolution": 0.5, "low_resolution_factor": 3}
SETTINGS = AugmentationSettings(flip_rows=0.5, flip_columns=0.5, **LATER)
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
    off = {field.name: 0 for field in dataclasses.fields(AugmentationSettings)}
    off = AugmentationSettings(**off | {"elastic_cells": 1, "low_resolution_factor": 1})
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


@pytest.mark.parametrize("channels", [(), (2,)])
def test_a_float32_image_is_not_written_to(channels):
    # The one dtype in which no copy is needed, were it not for that.
    image, label = np.random.default_rng(0).normal(size=(6, 9, *channels)).astype(np.float32), np.ones((6, 9), np.uint8)
    before = image.copy()
    for drawn in (Augmentation(brightness=1), Augmentation(shift_rows=1.5, brightness=1), Augmentation()):
        changed, kept = apply_augmentation(image, label, drawn)
        changed += 1
        kept += 1
        assert np.array_equal(image, before)
        assert (label == 1).all()


@given(seed=SEEDS)
@settings(deadline=None)
def test_drawn_numbers_stay_within_their_settings(seed):
    wide = AugmentationSettings(
        rotation_degrees=20, scale=0.5, shift=0.1, gamma=1, contrast=0.25, brightness=2, noise=3, elastic_shift=0.2,
        elastic_cells=2, bias_field=1, low_resolution=1, low_resolution_factor=3,
    )  # fmt: skip
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
    assert np.shape(drawn.elastic) == (2, 5, 5)
    assert (np.abs(drawn.elastic).max(axis=(1, 2)) <= [20, 60]).all()
    assert np.shape(drawn.bias_field) == (4, 4)
    assert np.abs(drawn.bias_field).max() <= math.log(2)
    assert 1 <= drawn.low_resolution <= 3


def test_drawn_numbers_use_the_whole_of_their_settings():
    wide = AugmentationSettings(
        rotation_degrees=20, scale=0.5, shift=0.1, noise=3, flip_rows=0.25, flip_columns=1, elastic_shift=0.2,
        elastic_cells=1, bias_field=1, low_resolution=0.25, low_resolution_factor=3,
    )  # fmt: skip
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
    # Of every control point by itself.
    assert (np.ptp([one.elastic for one in drawn], axis=0) > np.array([39, 119])[:, None, None]).all()
    assert (np.ptp([one.bias_field for one in drawn], axis=0) > 1.9 * math.log(2)).all()
    factors = np.array([one.low_resolution for one in drawn])
    assert np.mean(factors != 1) == pytest.approx(0.25, abs=0.04)
    assert np.median(factors[factors != 1]) == pytest.approx(3**0.5, abs=0.1)
    assert factors.max() > 2.95
    # Neither one another's numbers nor those of the noise.
    noise = [np.random.default_rng(one.noise_seed).uniform(-1, 1) for one in drawn]
    rotations = [one.rotation_degrees for one in drawn]
    corners = [(one.elastic[0][0][0], one.elastic[1][0][0], one.bias_field[0][0]) for one in drawn]
    related = np.corrcoef(np.column_stack([rotations, corners, factors != 1, noise]), rowvar=False)
    assert np.abs(related - np.eye(6)).max() < 0.1


def test_a_draw_is_that_of_before_the_later_changes():
    rng = np.random.default_rng(11)
    drawn = draw_augmentation(rng, AugmentationSettings(flip_rows=0.5, flip_columns=0.5), (3, 5))
    pinned = Augmentation(
        rotation_degrees=-7.428595944616008, scale=0.9997981656752253, shift_rows=0.048719211659211586,
        shift_columns=-0.3770487933024444, flip_rows=True, flip_columns=False, gamma=0.8313177157978217,
        contrast=1.1271532526358587, brightness=-0.12887382715374093, noise=0.06218835927963828, noise_seed=3729466512,
    )  # fmt: skip
    assert dataclasses.replace(drawn, scale=1, gamma=1, contrast=1) == dataclasses.replace(
        pinned, scale=1, gamma=1, contrast=1
    )
    # Powers may differ by their last digit between C libraries.
    for name in ("scale", "gamma", "contrast"):
        assert getattr(drawn, name) == pytest.approx(getattr(pinned, name), rel=1e-15)
    assert rng.integers(2**32) == 1584813398


def test_a_result_is_that_of_before_the_later_changes():
    image = np.arange(15.0).reshape(3, 5) ** 1.5 / 10 - 2
    label = (np.arange(15).reshape(3, 5) % 4).astype(np.uint8)
    drawn = draw_augmentation(
        np.random.default_rng(11), AugmentationSettings(flip_rows=0.5, flip_columns=0.5), label.shape
    )
    changed_image, changed_label = apply_augmentation(image, label, drawn)
    pinned = [
        [1.1133486, 1.8330054, 2.074798, 1.8378463, 0.80406827],
        [-0.8627517, -0.4145024, 0.38355798, 0.9991281, 0.4496378],
        [-2.3331769, -2.0336506, -1.5415024, -0.87039906, -1.2943733],
    ]
    # float32 powers may differ by their last digit between processors.
    assert np.allclose(changed_image, np.array(pinned, np.float32), rtol=3e-7, atol=0)
    assert changed_label.tolist() == [[2, 3, 0, 1, 2], [1, 2, 3, 0, 1], [1, 2, 2, 3, 0]]


@given(seed=SEEDS, size=SIZES)
def test_the_later_changes_leave_the_other_numbers_alone(seed, size):
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    without, drawn = (
        draw_augmentation(rng, AugmentationSettings(**chosen), size)
        for rng, chosen in zip(rngs, ({}, LATER), strict=True)
    )
    assert drawn.elastic
    assert dataclasses.replace(drawn, elastic=(), bias_field=(), low_resolution=1.0) == without
    assert rngs[0].random() == rngs[1].random()
    # Nor does one of them change another.
    for name, value in LATER.items():
        alone = draw_augmentation(
            np.random.default_rng(seed), AugmentationSettings(**LATER | {name: 1 if "factor" in name else 0}), size
        )
        own = {"elastic_shift": "elastic", "bias_field": "bias_field"}.get(name, "low_resolution")
        kept = {"elastic": drawn.elastic, "bias_field": drawn.bias_field, "low_resolution": drawn.low_resolution}
        assert {key: getattr(alone, key) for key in kept if key != own} == {
            key: one for key, one in kept.items() if key != own
        }, (name, value)


def test_the_configured_augmentation_is_the_default():
    path = Path(__file__).parents[1] / "conf/base/parameters_fit.yml"
    configured = yaml.safe_load(path.read_text())["augmentation"]
    assert list(configured) == [field.name for field in dataclasses.fields(AugmentationSettings)]
    assert AugmentationSettings(**configured) == AugmentationSettings()


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
        rotation_degrees=40, shift=0.15, flip_rows=0.5, flip_columns=0.5, gamma=0, contrast=0, brightness=0, noise=0,
        elastic_shift=0.1,
    )  # fmt: skip
    drawn = draw_augmentation(np.random.default_rng(seed), still, label.shape)
    moved_image, moved_label = apply_augmentation(label / 3, label, drawn)
    # Pixels on the edge are partly bright; those clearly in or out must agree.
    assert (moved_label[moved_image > 0.76] == 3).all()
    assert (moved_label[moved_image < 0.24] == 0).all()
    assert (moved_image > 0.76).sum() > 20


def coordinates_seen(size, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel was taken from, rows and columns (2, H, W), and which came from within the slice (H, W)."""
    there = np.indices(size).astype(np.float32)
    back = np.reshape(size, (2, 1, 1)) - 1 - there
    # Outside is 0, the minimum of all: only within do the ramps up and down add up.
    ramps = np.concatenate([there, back]).transpose(1, 2, 0)
    seen = apply_augmentation(ramps, np.zeros(size, np.uint8), augmentation)[0].transpose(2, 0, 1)
    within = np.isclose(seen[:2] + seen[2:], np.reshape(size, (2, 1, 1)) - 1, rtol=0, atol=1e-3).all(axis=0)
    return seen[:2], within


def spline_surface(control, size) -> np.ndarray:
    """SciPy's own cubic B-spline over the same cells."""
    for axis, length in enumerate(size):
        cells = np.shape(control)[axis] - 3
        spline = BSpline(np.arange(-3, cells + 4) / cells, np.moveaxis(control, axis, 0), 3)
        control = np.moveaxis(spline((np.arange(length) + 0.5) / length), 0, axis)
    return control


def orientation(seen: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Signed area (n,) that each square of four pixels' centres had before, of those wholly within."""
    down, across = seen[:, 1:, :-1] - seen[:, :-1, :-1], seen[:, :-1, 1:] - seen[:, :-1, :-1]
    whole = within[1:, 1:] & within[1:, :-1] & within[:-1, 1:] & within[:-1, :-1]
    return (down[0] * across[1] - down[1] * across[0])[whole]


@given(seed=SEEDS, cells=st.integers(1, 5), size=st.tuples(st.integers(12, 30), st.integers(31, 50)))
def test_elastic_shifts_are_those_of_a_cubic_spline(seed, cells, size):
    control = np.random.default_rng(seed).uniform(-3, 3, (2, cells + 3, cells + 3))
    seen, within = coordinates_seen(size, Augmentation(elastic=control.tolist()))
    assert within.sum() > 100
    expected = np.indices(size) - np.stack([spline_surface(one, size) for one in control])
    assert np.allclose(seen[:, within], expected[:, within], atol=1e-4)


@given(seed=SEEDS, rows=st.floats(-5, 5), columns=st.floats(-5, 5))
def test_control_points_that_move_as_one_shift_the_slice(seed, rows, columns):
    settings = AugmentationSettings(rotation_degrees=30, scale=0.3, shift=0.2, flip_rows=0.5, flip_columns=0.5)
    drawn = draw_augmentation(np.random.default_rng(seed), settings, (20, 31))
    drawn = dataclasses.replace(drawn, gamma=1, contrast=1, brightness=0, noise=0)
    bent = dataclasses.replace(drawn, elastic=(((rows,) * 5,) * 5, ((columns,) * 5,) * 5))
    shifted = dataclasses.replace(
        drawn, shift_rows=drawn.shift_rows + rows, shift_columns=drawn.shift_columns + columns
    )
    (bent_from, bent_within), (shifted_from, within) = (coordinates_seen((20, 31), one) for one in (bent, shifted))
    both = within & bent_within
    assert both.sum() > 0.9 * within.sum()
    assert np.allclose(bent_from[:, both], shifted_from[:, both], atol=1e-4)


@given(seed=SEEDS, cells=st.integers(1, 6), size=st.tuples(st.integers(40, 60), st.integers(61, 90)))
def test_permitted_elastic_shifts_never_fold(seed, cells, size):
    strongest = AugmentationSettings(
        rotation_degrees=45, scale=0.5, flip_rows=0.5, gamma=0, contrast=0, brightness=0, noise=0,
        elastic_shift=FOLD_FREE / cells * (1 - 1e-12), elastic_cells=cells,
    )  # fmt: skip
    drawn = draw_augmentation(np.random.default_rng(seed), strongest, size)
    # Every control point as far as it may go.
    limit = np.reshape(size, (2, 1, 1)) * strongest.elastic_shift
    for elastic in (np.array(drawn.elastic), np.copysign(limit, drawn.elastic)):
        area = orientation(*coordinates_seen(size, dataclasses.replace(drawn, elastic=elastic.tolist())))
        assert area.size > 100
        assert (-area if drawn.flip_rows else area).min() > 0


@pytest.mark.parametrize(("shift_in_cells", "least"), [(FOLD_FREE, 0.0177), (0.5, -0.0232)])
def test_the_limit_of_elastic_shifts_is_where_they_begin_to_fold(shift_in_cells, least):
    # The worst of all fields shifts rows and columns alike, its control points signed as the sum of its derivatives
    # has them at 0.755 of a cell. There the area falls to 1 - 2.0464 * shift_in_cells.
    size, t = (150, 210), 0.755
    value = np.array([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    slope = np.array([-((1 - t) ** 2), 3 * t**2 - 4 * t, -3 * t**2 + 2 * t + 1, t**2]) / 2
    sign = np.sign(np.outer(slope, value) + np.outer(value, slope))
    elastic = np.stack([sign * length * shift_in_cells for length in size])
    seen, within = coordinates_seen(size, Augmentation(elastic=elastic.tolist()))
    assert orientation(seen, within).min() == pytest.approx(least, abs=0.002)


def test_a_bias_field_multiplies_the_distance_from_air():
    # Pixels at a quarter and three quarters of the only cell; there the third control column counts 121 / 384 and
    # 235 / 384. Air stays what it is, though it is negative.
    image, label = np.array([[-3.0, 1.0], [1.0, -1.0]]), np.zeros((2, 2), np.uint8)
    column = math.log(2) * 384 / 235
    changed, _ = apply_augmentation(image, label, Augmentation(bias_field=((0, 0, column, 0),) * 4))
    weaker = 2 ** (121 / 235)
    assert np.allclose(changed, [[-3.0, -3 + 4 * 2], [-3 + 4 * weaker, -3 + 2 * 2]], atol=1e-5)
    changed, _ = apply_augmentation(
        image, label, Augmentation(bias_field=((0,) * 4, (0,) * 4, (column,) * 4, (0,) * 4))
    )
    assert np.allclose(changed, [[-3.0, -3 + 4 * weaker], [-3 + 4 * 2, -3 + 2 * 2]], atol=1e-5)


@given(seed=SEEDS, size=SIZES)
def test_a_bias_field_stays_within_its_width_and_leaves_labels(seed, size):
    image, label = random_slice(seed, size)
    only = AugmentationSettings(
        rotation_degrees=0, scale=0, shift=0, gamma=0, contrast=0, brightness=0, noise=0, bias_field=0.5
    )
    drawn = draw_augmentation(np.random.default_rng(seed), only, size)
    changed_image, changed_label = apply_augmentation(image, label, drawn)
    low = image.astype(np.float32).min()
    before, after = image - low, changed_image - low
    assert (after >= before / 1.5 - 1e-5).all()
    assert (after <= before * 1.5 + 1e-5).all()
    assert (after[before == 0] == 0).all()
    assert np.array_equal(changed_label, label)


def test_low_resolution_averages_and_interpolates():
    # Two pixels of 2 and 10, at 0.5 and 2.5 of the fine ones.
    image = np.array([[0.0, 4.0, 8.0, 12.0]])
    changed, _ = apply_augmentation(image, np.zeros((1, 4), np.uint8), Augmentation(low_resolution=2))
    assert np.allclose(changed, [[2, 4, 8, 10]])
    # 3 / 1.6 is rounded to two pixels, of 1 and 7: the middle one belongs to both by half.
    column = np.array([[0.0], [3.0], [9.0]])
    changed, _ = apply_augmentation(column, np.zeros((3, 1), np.uint8), Augmentation(low_resolution=1.6))
    assert np.allclose(changed, [[1], [4], [7]])


@given(seed=SEEDS, size=SIZES, factor=st.floats(1, 40))
def test_low_resolution_changes_the_image_within_its_range_alone(seed, size, factor):
    image, label = random_slice(seed, size)
    changed, kept = apply_augmentation(image, label, Augmentation(low_resolution=factor))
    assert np.array_equal(kept, label)
    assert image.min() - 1e-5 <= changed.min()
    assert changed.max() <= image.max() + 1e-5
    flat, _ = apply_augmentation(np.full(size, 2.5), label, Augmentation(low_resolution=factor))
    assert np.allclose(flat, 2.5)
    # Alike from both ends of both axes.
    turned, _ = apply_augmentation(image[::-1, ::-1].T, label.T, Augmentation(low_resolution=factor))
    assert np.allclose(turned.T[::-1, ::-1], changed, atol=1e-4)
    average, _ = apply_augmentation(image, label, Augmentation(low_resolution=100))
    assert np.allclose(average, image.astype(float).mean(), atol=1e-4)


def test_noise_is_not_smoothed_by_low_resolution():
    image, label = np.zeros((80, 100)), np.zeros((80, 100), np.uint8)
    alone, _ = apply_augmentation(image, label, Augmentation(noise=0.5))
    noisy, _ = apply_augmentation(image, label, Augmentation(noise=0.5, low_resolution=4))
    assert np.array_equal(noisy, alone)


@given(seed=SEEDS, size=SIZES)
def test_one_channel_is_changed_as_a_slice_is(seed, size):
    image, label = random_slice(seed, size)
    drawn = draw_augmentation(np.random.default_rng(seed), SETTINGS, size)
    plain_image, plain_label = apply_augmentation(image, label, drawn)
    channel_image, channel_label = apply_augmentation(image[..., None], label, drawn)
    assert (channel_image.shape, channel_image.dtype) == ((*size, 1), np.float32)
    assert np.array_equal(channel_image[..., 0], plain_image)
    assert np.array_equal(channel_label, plain_label)


@given(seed=SEEDS, size=SIZES)
def test_channels_of_one_minimum_move_as_slices_do(seed, size):
    rng = np.random.default_rng(seed)
    image, label = rng.normal(size=(*size, 3)), rng.integers(0, 4, size).astype(np.uint8)
    image[0, 0] = -9
    before = image.copy()
    drawn = draw_augmentation(rng, SETTINGS, size)
    drawn = dataclasses.replace(drawn, gamma=1, contrast=1, noise=0, bias_field=())
    changed, moved_label = apply_augmentation(image, label, drawn)
    assert changed.shape == (*size, 3)
    for channel in range(3):
        alone, alone_label = apply_augmentation(image[..., channel], label, drawn)
        assert np.array_equal(changed[..., channel], alone)
        assert np.array_equal(moved_label, alone_label)
    assert np.array_equal(image, before)


def test_channels_share_air_range_and_mean():
    image, label = np.array([[[-1.0, 0.0], [0.0, 3.0]]]), np.zeros((1, 2), np.uint8)
    bent, _ = apply_augmentation(image, label, Augmentation(gamma=2))
    # Of -1 .. 3 both: 0 lies a quarter up.
    assert np.allclose(bent, [[[-1.0, -0.75], [-0.75, 3.0]]])
    stretched, _ = apply_augmentation(image, label, Augmentation(contrast=2))
    assert np.allclose(stretched, [[[-2.5, -0.5], [-0.5, 5.5]]])
    gained, _ = apply_augmentation(image, label, Augmentation(bias_field=((math.log(2),) * 4,) * 4))
    assert np.allclose(gained, [[[-1.0, 1.0], [1.0, 7.0]]])
    moved, _ = apply_augmentation(image, label, Augmentation(shift_columns=1))
    assert moved.tolist() == [[[-1.0, -1.0], [-1.0, 0.0]]]
    moved, _ = apply_augmentation(image[..., ::-1], label, Augmentation(shift_columns=1))
    assert moved.tolist() == [[[-1.0, -1.0], [0.0, -1.0]]]


def test_each_channel_has_noise_of_its_own():
    image, label = np.zeros((80, 100, 3)), np.zeros((80, 100), np.uint8)
    noisy, _ = apply_augmentation(image, label, Augmentation(noise=0.5, noise_seed=1))
    assert np.allclose(noisy.std(axis=(0, 1)), 0.5, rtol=0.05)
    assert np.abs(np.corrcoef(noisy.reshape(-1, 3), rowvar=False) - np.eye(3)).max() < 0.05


def test_temporary_arrays_are_those_of_one_channel():
    label = np.zeros((96, 130), np.uint8)
    drawn = draw_augmentation(np.random.default_rng(0), dataclasses.replace(SETTINGS, low_resolution=1), label.shape)
    peaks = []
    for channels in (1, 9):
        image = np.random.default_rng(1).normal(size=(*label.shape, channels)).astype(np.float16)
        tracemalloc.start()
        apply_augmentation(image, label, drawn)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pixels = 4 * label.size  # bytes, float32
    # Eight channels more cost their own result alone.
    assert peaks[1] - peaks[0] < 8.5 * pixels
    assert peaks[0] < 12 * pixels


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


@pytest.mark.parametrize("size", [(4,), (2, 3, 4, 1), (1, 2, 3)])
def test_images_other_than_a_slice_with_or_without_channels_are_refused(size):
    with pytest.raises(ValueError, match=r"image \(.*\) and label \(.*\) differ in shape; .* also \(H, W, channels\)"):
        apply_augmentation(np.zeros(size), np.zeros(size[:2] if len(size) != 3 else (2, 3), np.uint8), Augmentation())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": -0.1}, "augmentation.scale is -0.1; expected a finite number, 0 or more"),
        ({"noise": float("nan")}, "augmentation.noise is nan"),
        ({"flip_rows": 2}, "augmentation.flip_rows is 2; expected a probability"),
        ({"low_resolution": 1.5}, "augmentation.low_resolution is 1.5; expected a probability"),
        ({"low_resolution_factor": 0.5}, "augmentation.low_resolution_factor is 0.5; expected 1 or more"),
        ({"bias_field": -1}, "augmentation.bias_field is -1; expected a finite number, 0 or more"),
        ({"elastic_cells": 0}, "augmentation.elastic_cells is 0; expected a whole number, 1 or more"),
        ({"elastic_cells": 2.5}, "augmentation.elastic_cells is 2.5; expected a whole number, 1 or more"),
        ({"elastic_shift": 0.121}, "elastic_shift is 0.121 with 4 elastic_cells, which may fold .* at most 0.48"),
        ({"elastic_shift": 0.06, "elastic_cells": 9}, "elastic_shift is 0.06 with 9 elastic_cells, which may fold"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**setting)


def test_the_largest_elastic_shifts_are_permitted():
    for shift, cells in ((0.48, 1), (0.16, 3), (0.12, 4), (0.06, 8)):
        assert AugmentationSettings(elastic_shift=shift, elastic_cells=cells).elastic_shift == shift
