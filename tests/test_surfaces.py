from __future__ import annotations

import math

import numpy as np
import pytest
import surface_distance
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow import surfaces
from lumbarflow.surfaces import SurfaceDistances, bounding_box, surface_distances, weighted_percentile

masks = st.sampled_from([(3, 5, 4), (4, 6)]).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans())] * 2)
)
spacings = st.permutations([0.7, 1.3, 3.9])


def voxels(shape: tuple[int, ...], *places: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(np.transpose(places))] = True
    return mask


def test_contours_by_hand():
    # Pixels of 3 x 4 mm. Each corner of a lone pixel stands for half a diagonal, 2.5 mm; of two pixels side by side,
    # the corners between them stand for 4 mm of horizontal line.
    #
    #     reference        prediction
    #     0---8            0---8---12 mm
    #     | # |            | # | # |
    #     0---8            0---8---12
    distances = surface_distances(voxels((3, 5), (1, 1)), voxels((3, 5), (1, 1), (1, 2)), (3, 4))
    assert sorted(distances.reference_areas) == [2.5] * 4
    assert sorted(distances.prediction_areas) == [2.5] * 4 + [4.0] * 2
    assert distances.reference_to_prediction_mm.tolist() == [0.0] * 4
    assert sorted(distances.prediction_to_reference_mm) == [0.0] * 4 + [4.0] * 2
    assert distances.asd_mm == pytest.approx((2 * 2.5 * 4) / 28)
    assert distances.nsd(3.9) == pytest.approx((10 + 13) / 28)
    assert distances.nsd(4) == 1
    assert distances.hausdorff_mm(95) == 4
    assert distances.hausdorff_mm(72) == 0  # 13 of 18 mm are 72.2 %
    assert distances.hausdorff_mm(73) == 4


@pytest.mark.parametrize(("axis", "step_mm"), [(0, 3.0), (1, 1.0), (2, 2.0)])
def test_a_voxel_one_step_away_along_each_axis(axis, step_mm):
    # Each corner of a voxel of 3 x 1 x 2 mm stands for an eighth of the vector (2, 6, 3), 7/8 mm2. Half of the corners
    # lie on both surfaces, the others one step away.
    other = np.roll(voxels((4, 5, 6), (1, 2, 3)), 1, axis)
    distances = surface_distances(voxels((4, 5, 6), (1, 2, 3)), other, (3, 1, 2))
    np.testing.assert_allclose(distances.reference_areas, [0.875] * 8)
    assert sorted(distances.reference_to_prediction_mm) == [0.0] * 4 + [step_mm] * 4
    assert distances.asd_mm == pytest.approx(step_mm / 2)
    assert distances.hausdorff_mm(95) == step_mm
    assert distances.nsd(1.5) == pytest.approx(1.0 if step_mm == 1 else 0.5)


def test_the_directed_distances_are_not_mixed_up():
    near, far = voxels((3, 9), (1, 1)), voxels((3, 9), (1, 1), (1, 7))
    distances = surface_distances(near, far, (1, 1))
    assert max(distances.reference_to_prediction_mm) == 0
    assert max(distances.prediction_to_reference_mm) == 6
    assert distances.hausdorff_mm(95) == surface_distances(far, near, (1, 1)).hausdorff_mm(95) == 6


@given(masks, spacings)
def test_the_same_as_surface_distance_whichever_way_distances_are_found(pair, spacing):
    reference, prediction = pair
    assume(reference.any() and prediction.any())  # with NumPy 2 the library stops there
    spacing = spacing[: reference.ndim]
    oracle = surface_distance.compute_surface_distances(reference, prediction, spacing)
    names = ("distances_gt_to_pred", "distances_pred_to_gt", "surfel_areas_gt", "surfel_areas_pred")
    theirs = SurfaceDistances(*(oracle[name] for name in names))
    for dense in (0, 2):  # a distance transform always, a k-d tree always
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surfaces, "DENSE", dense)
            ours = surface_distances(reference, prediction, spacing)
        for distances, areas in (
            ("reference_to_prediction_mm", "reference_areas"),
            ("prediction_to_reference_mm", "prediction_areas"),
        ):
            np.testing.assert_allclose(np.sort(getattr(ours, distances)), getattr(theirs, distances), atol=1e-12)
            order = np.lexsort((getattr(ours, areas), np.round(getattr(ours, distances), 9)))
            same = np.lexsort((getattr(theirs, areas), np.round(getattr(theirs, distances), 9)))
            np.testing.assert_array_equal(getattr(ours, areas)[order], getattr(theirs, areas)[same])
        average = surface_distance.compute_average_surface_distance(oracle)
        areas = oracle["surfel_areas_gt"].sum(), oracle["surfel_areas_pred"].sum()
        assert ours.asd_mm == pytest.approx(np.average(average, weights=areas))
        for tolerance in (0.0, 0.7, 1.0, 2.0):
            expected = surface_distance.compute_surface_dice_at_tolerance(oracle, tolerance)
            assert ours.nsd(tolerance) == pytest.approx(expected)
        # Round percents are left out: where a share of the area is just that, the last bit of a sum decides.
        for percent in (49.99, 94.99, 100):
            expected = surface_distance.compute_robust_hausdorff(oracle, percent)
            assert ours.hausdorff_mm(percent) == pytest.approx(expected, abs=1e-12)


@given(masks, spacings)
def test_the_same_as_all_pairs_of_elements(pair, spacing):
    reference, prediction = pair
    assume(reference.any() and prediction.any())
    spacing = np.array(spacing[: reference.ndim])

    def elements_mm(mask):
        # A window of two voxels along each axis, at every corner of the grid.
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2,) * mask.ndim)
        inside = windows.reshape(*windows.shape[: mask.ndim], -1).mean(axis=-1)
        return np.argwhere((inside > 0) & (inside < 1)) * spacing

    ours = surface_distances(reference, prediction, spacing)
    pairs = np.linalg.norm(elements_mm(reference)[:, None] - elements_mm(prediction), axis=-1)
    # The elements come in the order of the array, as those of the oracle.
    np.testing.assert_allclose(ours.reference_to_prediction_mm, pairs.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(ours.prediction_to_reference_mm, pairs.min(axis=0), atol=1e-12)


@given(masks, spacings)
def test_what_lies_around_the_masks_changes_nothing(pair, spacing):
    # So a mask that touches the border is closed there, and the cut to the box of both masks cannot be seen.
    reference, prediction = pair
    spacing = spacing[: reference.ndim]
    around = [(2, 1), (3, 4), (1, 2)][: reference.ndim]
    tight = surface_distances(reference, prediction, spacing)
    wide = surface_distances(np.pad(reference, around), np.pad(prediction, around), spacing)
    for name in SurfaceDistances.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(tight, name), getattr(wide, name))


@given(masks, spacings)
def test_reference_and_prediction_are_interchangeable(pair, spacing):
    reference, prediction = pair
    one = surface_distances(reference, prediction, spacing[: reference.ndim])
    other = surface_distances(prediction, reference, spacing[: reference.ndim])
    np.testing.assert_array_equal(one.reference_to_prediction_mm, other.prediction_to_reference_mm)
    assert one.asd_mm == pytest.approx(other.asd_mm, nan_ok=True)
    assert one.hausdorff_mm() == pytest.approx(other.hausdorff_mm(), nan_ok=True)
    assert one.nsd(1) == pytest.approx(other.nsd(1), nan_ok=True)


def test_a_full_array_is_a_closed_box():
    full = np.ones((2, 3, 4), bool)
    distances = surface_distances(full, full, (5.0, 1.0, 2.0))
    assert len(distances.reference_areas) == 3 * 4 * 5 - 1 * 2 * 3
    assert (distances.asd_mm, distances.hausdorff_mm(), distances.nsd(0)) == (0, 0, 1)


def test_an_empty_mask_is_infinitely_far():
    mask = voxels((3, 4, 5), (1, 2, 3))
    for distances in (
        surface_distances(mask, ~mask & mask, (1, 2, 3)),
        surface_distances(~mask & mask, mask, (1, 2, 3)),
    ):
        assert (distances.asd_mm, distances.hausdorff_mm(), distances.nsd(100)) == (math.inf, math.inf, 0)


def test_two_empty_masks_have_no_figures():
    empty = np.zeros((3, 4, 5), bool)
    distances = surface_distances(empty, empty, (1, 2, 3))
    assert len(distances.reference_areas) == len(distances.prediction_areas) == 0
    assert np.isnan([distances.asd_mm, distances.hausdorff_mm(), distances.nsd(1)]).all()


def test_rounding_does_not_push_a_distance_over_the_tolerance():
    # 5 * 0.7 - 3 * 0.7 is 1.4000000000000004, two steps of 0.7 are 1.4.
    reference, prediction = voxels((1, 7), (0, 0), (0, 2)), voxels((1, 7), (0, 5))
    assert 5 * 0.7 - 3 * 0.7 > 1.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surfaces, "DENSE", 2)
        assert surface_distances(reference, prediction, (1.0, 0.7)).nsd(1.4) == pytest.approx(4 / 12)


def test_the_weighted_percentile_takes_the_value_that_reaches_it():
    values, weights = np.array([5.0, 1.0, 3.0]), np.array([2.0, 4.0, 2.0])
    wanted = {0: 1, 50: 1, 50.1: 3, 75: 3, 75.1: 5, 100: 5}
    assert {percent: weighted_percentile(values, weights, percent) for percent in wanted} == wanted


def test_the_bounding_box_holds_the_mask_and_no_more():
    mask = voxels((6, 7, 8), (1, 2, 7), (4, 3, 5))
    assert bounding_box(mask) == (slice(1, 5), slice(2, 4), slice(5, 8))
    assert bounding_box(np.zeros((3, 2), bool)) == (slice(0, 0), slice(0, 0))


def test_masks_of_different_grids_are_refused():
    with pytest.raises(ValueError, match=r"prediction of shape \(2, 3\); expected the reference's \(3, 2\).*one grid"):
        surface_distances(np.zeros((3, 2), bool), np.zeros((2, 3), bool), (1, 1))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((3,), (1,)), ((3, 2), (1, 1, 1)), ((3, 2, 2), (1, 1)), ((3, 2), (1, 0)), ((3, 2), (1, math.nan))],
)
def test_a_spacing_that_does_not_fit_is_refused(shape, spacing):
    mask = np.zeros(shape, bool)
    with pytest.raises(ValueError, match="expected two or three dimensions and one positive spacing for each.*order"):
        surface_distances(mask, mask, spacing)
