"""Resampling by hand, centres held together, no class invented; spacings and shapes are unequal throughout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lumbarflow.resampling import InPlaneGrid, axis_weights

# 40 x 20 pixels of 0.5 x 0.8 mm (20 x 16 mm) in 32 x 24: the longer extent per pixel is the columns', 16/24 mm.
GRID = InPlaneGrid((40, 20), (0.5, 0.8), (32, 24))
STRETCHED = InPlaneGrid((40, 20), (0.5, 0.8), (32, 24), keep_aspect=False)

grids = st.builds(
    InPlaneGrid,
    native_shape=st.tuples(*[st.integers(3, 30)] * 2),
    native_spacing_mm=st.tuples(*[st.floats(0.3, 3.0)] * 2),
    size=st.tuples(*[st.integers(3, 30)] * 2),
    keep_aspect=st.booleans(),
)


# --- weights by hand --------------------------------------------------------------------------------------------------


def test_sampling_twice_as_fine():
    # Output centres lie at input coordinates -0.25, 0.25, 0.75 and 1.25; beyond the centres the last pixel is held.
    assert axis_weights(2, 4, 0.5).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]


def test_sampling_twice_as_coarse():
    # Centres at 0.5 and 2.5; a triangle of half-width 2 gives 1.5, 1.5, 0.5 and 0 halves: 3/7, 3/7, 1/7, 0.
    expected = [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]]
    np.testing.assert_allclose(axis_weights(4, 2, 2.0), expected, rtol=1e-6)


def test_samples_between_the_outermost_centre_and_the_edge_are_held():
    # Centres at -0.25, 1.5 and 3.25; the first is held at 0, where a triangle of half-width 7/4 gives 1 and 3/7.
    np.testing.assert_allclose(axis_weights(4, 3, 1.75)[0], [0.7, 0.3, 0, 0], rtol=1e-6)


def test_the_same_grid_is_the_identity():
    assert np.array_equal(axis_weights(5, 5, 1.0), np.eye(5))


def test_samples_outside_the_input_have_no_weight():
    # Centres at -2 ... 3 over two pixels whose edges lie at -0.5 and 1.5.
    assert axis_weights(2, 6, 1.0).tolist() == [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]
    # Centres at -0.625, 0.125, 0.875, 1.625: an eighth of a pixel beyond the edge is outside.
    assert axis_weights(2, 4, 0.75).tolist() == [[0, 0], [0.875, 0.125], [0.125, 0.875], [0, 0]]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 8.0))
def test_weights_sum_to_one_or_are_absent(n_in, n_out, step):
    weights = axis_weights(n_in, n_out, step)
    assert weights.shape == (n_out, n_in) and weights.dtype == np.float32
    assert np.all(weights >= 0)
    sums = weights.sum(axis=1)
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0))
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-5)  # neither end is favoured


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_keeping_the_aspect_pads_and_is_isotropic():
    assert GRID.model_spacing_mm == pytest.approx((16 / 24, 16 / 24))
    # 32 rows of 2/3 mm are 21.3 mm over 20 mm: the centres of the outermost rows lie 0.33 mm outside the scan.
    image = GRID.to_model(np.ones((1, 40, 20)), outside=-7.0)
    np.testing.assert_allclose(image[0, 1:-1], 1, rtol=1e-6)
    assert np.array_equal(image[0, [0, -1]], np.full((2, 24), -7))


def test_padding_goes_to_the_other_axis_when_that_is_the_shorter_one():
    grid = InPlaneGrid((20, 40), (0.8, 0.5), (24, 32))
    image = grid.to_model(np.ones((2, 20, 40)), outside=-7.0)
    np.testing.assert_allclose(image[:, :, 1:-1], 1, rtol=1e-6)
    assert np.all(image[:, :, [0, -1]] == -7)


def test_stretching_fills_the_size():
    assert STRETCHED.model_spacing_mm == pytest.approx((20 / 32, 16 / 24))
    np.testing.assert_allclose(STRETCHED.to_model(np.ones((1, 40, 20)), outside=-7.0), 1, rtol=1e-6)


@given(grids, st.floats(-1000, 1000))
def test_a_constant_stays_one_both_ways(grid, value):
    model = grid.to_model(np.full((1, *grid.native_shape), value), outside=value)
    np.testing.assert_allclose(model, value, rtol=1e-5, atol=1e-6)
    native = grid.to_native(np.full((1, *grid.size), value))
    assert model.dtype == native.dtype == np.float32
    np.testing.assert_allclose(native, value, rtol=1e-5, atol=1e-6)


@given(grids)
def test_no_native_pixel_is_lost(grid):
    # On the way back every pixel of the scan lies within the net's grid: shares sum to 1 everywhere.
    np.testing.assert_allclose(grid.to_native(np.ones((1, *grid.size))), 1, rtol=1e-5)


def centroid_mm(image, spacing_mm):
    """(row, column) centre of gravity of a 2-D image from the middle of its grid."""
    axes = [(np.arange(n) - (n - 1) / 2) * spacing for n, spacing in zip(image.shape, spacing_mm, strict=True)]
    return np.array([(image.sum(axis=1) @ axes[0]), (image.sum(axis=0) @ axes[1])]) / image.sum()


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 20), (96, 160)])
@given(st.floats(-6, 6), st.floats(-5, 5))
def test_a_place_in_millimetres_maps_to_itself_and_back(keep_aspect, size, row_mm, column_mm):
    spacing = (0.5, 0.9)
    rows = (np.arange(80)[:, None] - 39.5) * spacing[0]
    columns = (np.arange(36)[None, :] - 17.5) * spacing[1]
    blob = np.exp(-((rows - row_mm) ** 2 + (columns - column_mm) ** 2) / (2 * 2.0**2))
    grid = InPlaneGrid(blob.shape, spacing, size, keep_aspect)
    model = grid.to_model(blob[None])
    native = grid.to_native(model)
    # Blobs near the border lose a tail there: compared with what the very blob has, within a tenth of a pixel.
    there = centroid_mm(model[0], grid.model_spacing_mm) - centroid_mm(blob, spacing)
    back = centroid_mm(native[0], spacing) - centroid_mm(blob, spacing)
    assert np.all(np.abs(there) < 0.1 * np.array(grid.model_spacing_mm))
    assert np.all(np.abs(back) < 0.1 * np.array(grid.model_spacing_mm))


def test_the_same_grid_changes_nothing():
    image = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    grid = InPlaneGrid((8, 5), (0.7, 0.7), (8, 5))
    assert np.array_equal(grid.to_model(image), image) and np.array_equal(grid.to_native(image), image)


def test_a_checkerboard_too_fine_to_show_turns_grey():
    board = np.indices((64, 48)).sum(axis=0) % 2
    image = InPlaneGrid((64, 48), (1.0, 1.0), (16, 12)).to_model(board[None].astype(float))
    np.testing.assert_allclose(image, 0.5, atol=0.02)


@given(grids)
def test_the_few_taps_equal_the_whole_matrices(grid):
    image = np.random.default_rng(0).normal(size=(2, *grid.native_shape))
    steps = [model / native for model, native in zip(grid.model_spacing_mm, grid.native_spacing_mm, strict=True)]
    rows, columns = (axis_weights(*axis) for axis in zip(grid.native_shape, grid.size, steps, strict=True))
    np.testing.assert_allclose(grid.to_model(image), rows @ image @ columns.T, atol=1e-5)
    there = grid.to_model(image)
    rows, columns = (axis_weights(m, n, 1 / s) for m, n, s in zip(grid.size, grid.native_shape, steps, strict=True))
    np.testing.assert_allclose(grid.to_native(there), rows @ there @ columns.T, atol=1e-5)


# --- labels and probabilities -----------------------------------------------------------------------------------------


def test_no_canal_appears_between_bone_and_disc():
    # Averaged, 1 and 3 would give 2.
    labels = np.ones((1, 40, 20), np.uint8)
    labels[:, 17:, :] = 3
    labels[:, :, 13:] = 4 - labels[:, :, 13:]
    assert set(np.unique(STRETCHED.labels_to_model(labels))) == {1, 3}
    model = np.ones((1, 32, 24), np.uint8)
    model[:, 13:, :] = 3
    assert set(np.unique(GRID.labels_to_native(model))) == {1, 3}


@given(grids, st.data())
def test_classes_come_from_the_labels_alone(grid, data):
    labels = data.draw(arrays.arrays(np.uint8, (1, *grid.native_shape), elements=st.integers(0, 3), fill=st.just(1)))
    model = grid.labels_to_model(labels)
    padding = {0} if grid.to_model(np.ones(labels.shape)).min() == 0 else set()
    assert model.dtype == np.uint8 and model.shape == (1, *grid.size)
    assert set(np.unique(model)) <= set(np.unique(labels)) | padding
    native = grid.labels_to_native(model)
    assert native.dtype == np.uint8 and native.shape == labels.shape
    assert set(np.unique(native)) <= set(np.unique(model))


def test_labels_by_hand():
    # 4 columns to 2: shares of column 0 are 3/7, 3/7, 1/7, 0 (see above).
    grid = InPlaneGrid((1, 4), (1.0, 1.0), (1, 2), keep_aspect=False)
    assert grid.labels_to_model(np.array([[[0, 3, 3, 1]]], np.uint8)).tolist() == [[[3, 3]]]  # 4/7 disc, both times
    assert grid.labels_to_model(np.array([[[3, 1, 1, 0]]], np.uint8)).tolist() == [[[1, 1]]]
    # A tie goes to the lower class.
    assert grid.labels_to_model(np.array([[[3, 2, 0, 0]]], np.uint8))[0, 0, 0] == 2


def test_padding_is_background():
    model = GRID.labels_to_model(np.full((1, 40, 20), 2, np.uint8))
    assert np.all(model[0, [0, -1]] == 0) and np.all(model[0, 1:-1] == 2)


def test_a_shape_survives_there_and_back():
    # 10 x 12 mm of canal within 20 x 16 mm: what moves is the border alone.
    labels = np.zeros((1, 40, 20), np.uint8)
    labels[0, 10:30, 3:18] = 2
    again = GRID.labels_to_native(GRID.labels_to_model(labels))
    assert np.all(again[0, 12:28, 4:17] == 2)
    again[0, 9:31, 2:19] = 0
    assert not again.any()


@given(grids)
def test_probabilities_sum_to_one_on_the_native_grid(grid):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, *grid.size)).astype(np.float32)
    native = grid.probabilities_to_native(probabilities)
    assert native.shape == (2, *grid.native_shape, 4) and native.dtype == np.float32
    np.testing.assert_allclose(native.sum(axis=-1), 1, rtol=1e-5)
    assert np.array_equal(native[..., 2], grid.to_native(probabilities[..., 2]))


@pytest.mark.parametrize("method", ["to_model", "labels_to_model"])
def test_slices_of_another_shape_are_an_error(method):
    for shape in ((1, 20, 40), (40, 20)):
        with pytest.raises(ValueError, match=r"takes slices of shape \(n, 40, 20\), not \(.*\)"):
            getattr(GRID, method)(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("method", ["to_native", "labels_to_native"])
def test_model_slices_of_another_shape_are_an_error(method):
    with pytest.raises(ValueError, match=r"takes slices of shape \(n, 32, 24\), not \(1, 24, 32\)"):
        getattr(GRID, method)(np.zeros((1, 24, 32), np.uint8))


def test_labels_there_and_back_are_decided_once():
    # Round structures: their borders lie between the model's pixels, and one decision keeps more of them than two.
    rows, columns = np.mgrid[:48, :40]
    labels = np.zeros((1, 48, 40), np.uint8)
    labels[0][np.hypot(rows - 15.3, columns - 12.7) < 8.4] = 1
    labels[0][np.hypot(rows - 33.6, columns - 25.1) < 9.2] = 2
    same = InPlaneGrid((48, 40), (1.0, 1.0), (48, 40))
    np.testing.assert_array_equal(same.labels_there_and_back(labels), labels)
    third = InPlaneGrid((48, 40), (1.0, 1.0), (16, 16))
    once = third.labels_there_and_back(labels)
    twice = third.labels_to_native(third.labels_to_model(labels))
    assert (once.shape, once.dtype) == (labels.shape, np.uint8)
    assert np.mean(twice == labels) < np.mean(once == labels) < 1
    assert set(np.unique(once)) == {0, 1, 2}


@given(
    seed=st.integers(0, 99),
    native=st.tuples(st.integers(5, 30), st.integers(5, 30)),
    size=st.sampled_from([(12, 16), (20, 9), (7, 7)]),
    keep_aspect=st.booleans(),
)
def test_the_foregrounds_part_is_the_whole_there_and_background_elsewhere(seed, native, size, keep_aspect):
    grid = InPlaneGrid(native, (0.7, 1.1), size, keep_aspect)
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([0.3] * 4, size).astype(np.float32)
    # A patch of anything, in a surround that is background beyond doubt, or just so.
    outside = np.ones(size, bool)
    outside[rng.integers(size[0]) :, rng.integers(size[1]) :] = False
    probabilities[outside] = rng.choice([1.0, 0.52]) * np.eye(4, dtype=np.float32)[0]
    probabilities[outside, 1] = 1 - probabilities[outside, 0]
    whole = grid.probabilities_to_native(probabilities[None])[0]
    rows, columns, part = grid.foreground_to_native(probabilities)
    np.testing.assert_array_equal(part, whole[rows, columns])
    decided = np.zeros(native, np.intp)
    decided[rows, columns] = part.argmax(axis=-1)
    np.testing.assert_array_equal(decided, whole.argmax(axis=-1))


def test_no_foreground_has_no_part():
    grid = InPlaneGrid((9, 7), (1.0, 1.0), (12, 16))
    probabilities = np.tile(np.float32([0.6, 0.4, 0, 0]), (12, 16, 1))
    rows, columns, part = grid.foreground_to_native(probabilities)
    assert part.shape == (0, 0, 4) and rows.stop == columns.stop == 0
    # One pixel of it reaches its neighbours on the finer grid, and no farther.
    fine = InPlaneGrid((24, 32), (1.0, 1.0), (12, 16), keep_aspect=False)
    probabilities[5, 3] = [0.1, 0.9, 0, 0]
    rows, columns, part = fine.foreground_to_native(probabilities)
    # Native sample i lies at net coordinate i / 2 - 1/4: 5 is within one net pixel of i = 9 .. 12, 3 of i = 5 .. 8.
    assert (rows, columns) == (slice(9, 13), slice(5, 9))
