"""APTA against a reference that walks pixel by pixel, and against slices followed by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow.apta import (
    apta,
    audit,
    classes_from_greys,
    neighbourhood_passes,
    normalised_greys,
    summarise_audit,
)

AROUND = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]  # (x, y)
BESIDE = [(1, 0), (-1, 0), (0, 1), (0, -1)]


def walk(rule, picture: dict, steps: list) -> dict:
    """One pass over {(x, y): class}; `rule` sees a pixel's class and its neighbours' in the order of the ties."""
    return {
        (x, y): rule(own, [picture[x + right, y + down] for right, down in steps if (x + right, y + down) in picture])
        for (x, y), own in picture.items()
    }


def most_frequent(neighbours: list) -> int:
    return max(dict.fromkeys(neighbours), key=neighbours.count)  # max and dict both keep to the first one met


def four_passes_pixel_by_pixel(plane: np.ndarray) -> np.ndarray:
    picture = {(x, y): int(value) for (y, x), value in np.ndenumerate(plane)}
    picture = walk(lambda own, around: own if own in around else 0, picture, AROUND)
    picture = walk(lambda own, beside: most_frequent(beside) if beside else own, picture, BESIDE)
    picture = walk(lambda own, around: most_frequent(around) if len(set(around)) > 1 else own, picture, AROUND)
    picture = walk(lambda own, around: most_frequent(around) if around and own not in around else own, picture, AROUND)
    if 1 not in picture.values():
        picture = {at: 1 if own else 0 for at, own in picture.items()}
    result = np.zeros(plane.shape, np.uint8)
    for (x, y), own in picture.items():
        result[y, x] = own
    return result


def apta_pixel_by_pixel(plane: np.ndarray) -> np.ndarray:
    low, high = int(plane.min()), int(plane.max())
    classes = np.zeros(plane.shape, np.uint8)
    for (y, x), value in np.ndenumerate(plane):
        grey = int((int(value) - low) / (high - low) * 255) if high > low else 0
        if 1 <= grey <= 10:
            classes[y, x] = 1
        elif 90 <= grey <= 180:
            classes[y, x] = 2
        elif grey > 180:
            classes[y, x] = 3
    return four_passes_pixel_by_pixel(classes)


def passes(*rows: list[int]) -> list[list[int]]:
    return neighbourhood_passes(np.array([rows], np.uint8))[0].tolist()


def stacks(elements, most: int = 9):
    return hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=most), elements=elements)


@given(stacks(st.integers(0, 3)))
def test_the_passes_equal_the_walk_on_any_classes(classes):
    before = classes.copy()
    expected = np.array([four_passes_pixel_by_pixel(plane) for plane in classes])
    np.testing.assert_array_equal(neighbourhood_passes(classes), expected)
    np.testing.assert_array_equal(classes, before)


@given(stacks(st.sampled_from([0, 0, 1, 4, 9, 25, 100, 105, 125, 201, 209, 225])))
def test_the_whole_equals_the_walk_on_any_label_ids(ids):
    result = apta(ids)
    np.testing.assert_array_equal(result, [apta_pixel_by_pixel(plane) for plane in ids])
    assert result.dtype == np.uint8


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 17), (19, 1), (2, 7), (23, 13)])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_passes_equal_the_walk_on_noise_and_on_blocks_of_every_shape(shape, block):
    # Blocks have quiet insides, which the implementation skips; noise has none.
    rng = np.random.default_rng([*shape, block])
    classes = rng.integers(0, 4, (3, *shape), np.uint8).repeat(block, axis=1).repeat(block, axis=2)
    expected = np.array([four_passes_pixel_by_pixel(plane) for plane in classes])
    np.testing.assert_array_equal(neighbourhood_passes(classes), expected)


def test_the_order_of_the_array_in_memory_does_not_matter():
    # Slices of a reoriented series are views with their axes swapped.
    ids = np.random.default_rng(3).choice([0, 3, 100, 201], (2, 5, 7)).repeat(2, axis=1)
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        view = np.ascontiguousarray(ids.transpose(order)).transpose(np.argsort(order))
        np.testing.assert_array_equal(apta(view), apta(ids))
        np.testing.assert_array_equal(neighbourhood_passes(view % 4), neighbourhood_passes(ids % 4))


def test_greys_are_cut_off_and_not_rounded():
    # Vertebra 9 beside disc 209: 9 / 209 * 255 = 10.98, the last grey of a vertebra; canal 100 is 122.01.
    ids = np.array([[[0, 9, 100, 209]], [[2, 7, 12, 2]], [[100, 100, 100, 100]]], np.int16)
    greys = normalised_greys(ids)
    assert greys.tolist() == [[[0, 10, 122, 255]], [[0, 127, 255, 0]], [[0, 0, 0, 0]]]
    assert greys.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_greys_are_the_same_whatever_the_integers(dtype):
    ids = np.array([[[0, 50], [101, 120]]])
    assert normalised_greys(ids.astype(dtype)).tolist() == [[[0, 106], [214, 255]]]


def test_negative_ids_are_stretched_without_overflow():
    assert normalised_greys(np.array([[[-100, 0, 100]]], np.int8)).tolist() == [[[0, 127, 255]]]


def test_both_ends_of_a_grey_range_belong_to_its_class():
    greys = np.array([0, 1, 10, 11, 89, 90, 180, 181, 255], np.uint8)
    assert classes_from_greys(greys).tolist() == [0, 1, 1, 0, 0, 2, 2, 3, 3]


def test_beside_others_ties_take_right_before_left_and_around_left_before_right():
    # (b): the second pixel has 2 to its right and 1 to its left, and takes 2: 1 2 2 2. (c): it has them still, and
    # takes the left one: 1 1 2 2. Left first in (b) would give 1 1 1 2 and end in 1 1 1 1.
    assert passes([1, 1, 2, 2]) == [[1, 1, 2, 2]]


def test_beside_others_ties_take_below_before_above_and_around_above_before_below():
    assert passes([1], [1], [2], [2]) == [[1], [1], [2], [2]]


def test_around_a_pixel_ties_take_a_whole_column_before_the_next():
    # (b) 0 1      1 0   (c) on the left: above 1, below 2, then the right column 0 0 2, so 2 and 0 are    0 1   (d) 1 1
    #     0 1  ->  1 0   level and 2 was met first (row by row it would be 0).                        ->   2 1  ->   1 1
    #     2 2      2 2                                                                                     1 1       1 1
    assert passes([0, 1], [0, 1], [2, 2]) == [[1, 1], [1, 1], [1, 1]]


def test_a_straight_border_stays_and_a_hole_and_a_stray_pixel_go():
    expected = np.zeros((6, 9), np.uint8)
    expected[:, :5] = 1
    classes = expected.copy()
    classes[2, 2], classes[3, 7] = 0, 3  # amid the vertebra, amid the background
    assert neighbourhood_passes(classes[None])[0].tolist() == expected.tolist()
    assert neighbourhood_passes(expected[None])[0].tolist() == expected.tolist()


def test_only_a_slice_without_a_vertebra_turns_its_foreground_into_one():
    vertebra = [[0] * 4 + [1] * 4] * 4
    canal_and_disc = [[0] * 2 + [2] * 3 + [3] * 3] * 4
    both = [[1] * 3 + [3] * 5] * 4
    result = neighbourhood_passes(np.array([vertebra, canal_and_disc, both], np.uint8))
    assert result.tolist() == [vertebra, [[0] * 2 + [1] * 6] * 4, both]


def test_a_single_pixel_has_no_neighbour():
    assert neighbourhood_passes(np.array([[[2]], [[0]]], np.uint8)).tolist() == [[[0]], [[0]]]
    assert neighbourhood_passes(np.zeros((0, 3, 4), np.uint8)).shape == (0, 3, 4)


def test_without_a_disc_vertebrae_are_lost_and_the_canal_becomes_one():
    # The canal, 100, is the highest id there and turns to 255, a disc; vertebra 5 to 12, background. No vertebra is
    # left, so the disc that was the canal becomes one. Beside disc 203 (next slice) all keep their classes.
    without = np.array([[5] * 3 + [0] * 6 + [100] * 3] * 4)
    beside = np.array([[5] * 3 + [0] * 3 + [203] * 3 + [100] * 3] * 4)
    result = apta(np.stack([without, beside]))
    assert result[0].tolist() == [[0] * 9 + [1] * 3] * 4
    assert result[1].tolist() == [[1] * 3 + [0] * 3 + [3] * 3 + [2] * 3] * 4


@pytest.mark.parametrize("ids", [np.zeros((2, 3, 4), np.float32), np.zeros((3, 4), np.int16)])
def test_what_is_no_stack_of_label_ids_is_refused(ids):
    with pytest.raises(ValueError, match=r"label ids of dtype \w+ and shape .*; expected integers \(slice, row, col"):
        apta(ids)


def test_the_audit_by_hand():
    direct = np.array([[[0, 0, 1, 1, 1], [0, 2, 2, 0, 0]], [[0, 0, 0, 0, 0], [3, 3, 0, 0, 0]]], np.uint8)
    changed = np.array([[[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0], [3, 3, 3, 0, 0]]], np.uint8)
    columns = ["slice", "class", "direct_pixels", "apta_pixels", "both_pixels", "gained", "lost", "dice", "vanished"]
    expected = [
        [0, "background", 5, 7, 4, 3, 1, 8 / 12, False],
        [0, "vertebrae", 3, 3, 2, 1, 1, 4 / 6, False],
        [0, "canal", 2, 0, 0, 0, 2, 0.0, True],
        [0, "IVD", 0, 0, 0, 0, 0, math.nan, False],
        [1, "background", 8, 7, 7, 0, 1, 14 / 15, False],
        [1, "vertebrae", 0, 0, 0, 0, 0, math.nan, False],
        [1, "canal", 0, 0, 0, 0, 0, math.nan, False],
        [1, "IVD", 2, 3, 2, 1, 0, 4 / 5, False],
    ]
    rows = audit(direct, changed)
    assert [list(row) for row in rows] == [columns] * 8
    for row, values in zip(rows, expected, strict=True):
        assert row == pytest.approx(dict(zip(columns, values, strict=True)), nan_ok=True)


def test_the_audit_tells_two_shapes():
    with pytest.raises(
        ValueError, match=r"APTA's classes have shape \(1, 4, 3\); expected the direct map's \(1, 3, 4\)"
    ):
        audit(np.zeros((1, 3, 4), np.uint8), np.zeros((1, 4, 3), np.uint8))


def test_the_summary_pools_pixels_and_counts_slices():
    # The canal: kept, halved, vanished, appeared, absent.
    direct, changed = np.zeros((5, 2, 2), np.uint8), np.zeros((5, 2, 2), np.uint8)
    direct[0, 0], changed[0, 0] = 2, 2
    direct[1, 0], changed[1, 0, 0] = 2, 2
    direct[2, 0, 0] = 2
    changed[3, 1, 1] = 2
    summary = summarise_audit(pd.DataFrame(audit(direct, changed))).set_index("class")
    canal = summary.loc["canal"]
    assert canal[["direct_pixels", "apta_pixels", "both_pixels", "gained", "lost"]].tolist() == [5, 4, 3, 1, 2]
    assert canal["dice"] == pytest.approx(2 * 3 / 9)
    assert canal["dice_slice_mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert canal["dice_lower_quarter"] == pytest.approx(1 / 3)  # half way from 0 to 2/3
    assert canal[["slices", "vanished_slices", "appeared_slices"]].tolist() == [3, 1, 1]
    assert np.isnan(summary.loc["IVD", "dice"]) and summary.loc["IVD", "slices"] == 0
