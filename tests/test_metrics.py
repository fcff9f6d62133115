from __future__ import annotations

from dataclasses import fields
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow.labels import CLASSES
from lumbarflow.metrics import (
    COMPONENTS,
    COUNTS,
    HISTOGRAM_MM,
    SCORES,
    CaseScores,
    Pooled,
    class_scores,
    confusion_matrix,
    count_components,
    figure_columns,
    mean_foreground_dice,
    nsd_columns,
    score_case,
    soft_overlap,
    table_by_case,
    table_by_class,
    table_by_slice,
)
from lumbarflow.surfaces import surface_distances, weighted_percentile

REFERENCE = np.array([[0, 0, 1, 1, 1], [2, 2, 3, 3, 3]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 1, 0], [2, 3, 3, 3, 3]], np.uint8)
CONFUSION = [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 3]]

SPACING_MM = (3.0, 1.0, 2.0)  # slice, row, column: a voxel of 6 mm3
EVERYTHING = {"minimum_component_mm3": 0}
FIGURES = figure_columns([1.0, 2.0])

labels = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))


def volume(shape=(3, 6, 7), **boxes) -> np.ndarray:
    """Classes in boxes: v (vertebrae), c (canal), d (IVD), each a tuple of (first, last) along slice, row, column."""
    array = np.zeros(shape, np.uint8)
    for name, box in boxes.items():
        array[tuple(slice(first, last + 1) for first, last in box)] = "0vcd".index(name)
    return array


def row(table: pd.DataFrame, **wanted) -> pd.Series:
    for column, value in wanted.items():
        table = table[table[column.rstrip("_")] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_rows_of_the_confusion_matrix_are_the_reference():
    assert confusion_matrix(REFERENCE, PREDICTION).tolist() == CONFUSION


def test_scores_by_hand():
    scores = class_scores(np.array(CONFUSION))
    np.testing.assert_allclose(scores["dice"], [2 / 4, 4 / 6, 2 / 3, 6 / 7])
    np.testing.assert_allclose(scores["iou"], [1 / 3, 2 / 4, 1 / 2, 3 / 4])
    np.testing.assert_allclose(scores["precision"], [1 / 2, 2 / 3, 1, 3 / 4])
    np.testing.assert_allclose(scores["recall"], [1 / 2, 2 / 3, 1 / 2, 1])
    np.testing.assert_allclose(scores["f1"], scores["dice"])
    assert mean_foreground_dice(np.array(CONFUSION)) == pytest.approx((4 / 6 + 2 / 3 + 6 / 7) / 3)


def test_a_structure_missing_on_one_side_scores_0_and_on_both_has_no_figure():
    reference = np.array([0, 1, 1, 0], np.uint8)
    prediction = np.array([0, 0, 0, 2], np.uint8)
    scores = class_scores(confusion_matrix(reference, prediction))
    for name in SCORES:
        assert scores[name][1] == 0, "missed"
        assert scores[name][2] == 0, "imagined"
        assert np.isnan(scores[name][3]), "on neither side"
    assert np.isnan(mean_foreground_dice(confusion_matrix(reference, prediction)))


@given(labels, labels)
def test_dice_is_symmetric_and_precision_is_recall_with_the_sides_swapped(one, other):
    scores = class_scores(confusion_matrix(one, other))
    swapped = class_scores(confusion_matrix(other, one))
    np.testing.assert_array_equal(scores["dice"], swapped["dice"])
    np.testing.assert_array_equal(scores["iou"], swapped["iou"])
    np.testing.assert_array_equal(scores["precision"], swapped["recall"])


@given(labels)
def test_a_perfect_prediction_scores_1_wherever_there_is_something(reference):
    scores = class_scores(confusion_matrix(reference, reference))
    present = np.isin(range(4), reference)
    for name in SCORES:
        np.testing.assert_array_equal(scores[name], np.where(present, 1.0, np.nan))


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction of shape \(2,\); expected the reference's \(3,\)"):
        confusion_matrix(np.zeros(3, np.uint8), np.zeros(2, np.uint8))


def test_soft_overlap_by_hand():
    reference = np.array([[[1, 1, 0]], [[3, 0, 0]]], np.uint8)
    p = np.zeros((2, 1, 3, 4), np.float32)
    p[0, 0] = [[0.25, 0.75, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]]
    p[1, 0] = [[0.5, 0, 0, 0.5], [1, 0, 0, 0], [0.75, 0, 0, 0.25]]
    sums = soft_overlap(reference, p)
    assert sums.dtype == np.float64
    assert sums[0].tolist() == [[0.5, 1.25, 1], [1.25, 1.5, 2], [0, 0.25, 0], [0, 0, 0]]
    assert sums[1].tolist() == [[1.75, 2.25, 2], [0, 0, 0], [0, 0, 0], [0.5, 0.75, 1]]


def test_soft_dice_is_of_the_probabilities_and_nan_without_them():
    reference, prediction = volume(v=((0, 2), (1, 4), (1, 4))), volume(v=((0, 2), (1, 4), (2, 4)))
    p = np.moveaxis([0.4 + 0.2 * (prediction == 0), 0.6 - 0.2 * (prediction == 0), *[0 * prediction] * 2], 0, -1)
    scores = score_case(reference, prediction, SPACING_MM, soft=soft_overlap(reference, p))
    # Of 3 x 42 voxels, 48 are vertebra; 36 have the probability 0.6, all of them rightly, the others 0.4.
    expected = 2 * (36 * 0.6 + 12 * 0.4) / (36 * 0.6 + 90 * 0.4 + 48)
    assert row(scores.by_case, class_="vertebrae")["soft_dice"] == pytest.approx(expected)
    assert row(scores.by_slice, class_="vertebrae", slice=1)["soft_dice"] == pytest.approx(expected)
    assert score_case(reference, prediction, SPACING_MM).by_case["soft_dice"].isna().all()
    without = score_case(reference * 0, prediction, SPACING_MM)
    assert without.by_case["soft_dice"].isna().all(), "not 0, which the convention has for probabilities only"


def test_pooled_soft_dice_is_of_the_cases_with_probabilities():
    reference = volume(v=((0, 2), (1, 2), (1, 2)))
    sure, unsure = (soft_overlap(reference, np.full((*reference.shape, 4), p)) for p in (0.5, 0.25))
    summands = [score_case(reference, reference, SPACING_MM, soft=soft).pooled for soft in (sure, unsure, None)]
    # Twice 12 voxels of vertebra among 126, with 0.5 and with 0.25; the third case has no probabilities.
    expected = 2 * 12 * 0.75 / (126 * 0.75 + 24)
    assert row(sum(summands[1:], summands[0]).table(), class_="vertebrae")["soft_dice"] == pytest.approx(expected)


@given(labels, labels)
def test_soft_dice_of_certain_probabilities_is_dice(reference, prediction):
    scores = score_case(reference, prediction, SPACING_MM, soft=soft_overlap(reference, np.eye(4)[prediction]))
    for table in (scores.by_slice, scores.by_case):
        np.testing.assert_allclose(table["soft_dice"], table["dice"])


def test_a_case_by_hand():
    # A vertebra of 2 x 3 x 2 voxels that is predicted one slice further right, and half of a canal of 1 x 4 x 1.
    reference = volume((4, 6, 7), v=((0, 1), (1, 3), (1, 2)), c=((2, 2), (1, 4), (5, 5)))
    prediction = volume((4, 6, 7), v=((1, 2), (1, 3), (1, 2)), c=((2, 2), (1, 2), (5, 5)))
    by_case = score_case(reference, prediction, SPACING_MM, EVERYTHING).by_case
    vertebra, canal = row(by_case, class_="vertebrae"), row(by_case, class_="canal")
    assert (vertebra["dice"], vertebra["iou"]) == (0.5, pytest.approx(1 / 3))
    assert vertebra[["reference_voxels", "predicted_voxels", "missing", "whole"]].tolist() == [12, 12, "", True]
    assert vertebra[["volume_error_ml", "relative_volume_error"]].tolist() == [0, 0]
    # Every element of one end of the box lies 3 mm, one slice, from the other box; the rest is on or beside both.
    assert vertebra["hd95_mm"] == 3
    truth = surface_distances(reference == 1, prediction == 1, SPACING_MM)
    assert vertebra["asd_mm"] == truth.asd_mm
    assert vertebra["nsd_1mm"] == pytest.approx(truth.nsd(1))
    assert 0 < vertebra["nsd_2mm"] < 1
    assert vertebra[[*COMPONENTS, "detection_rate"]].tolist() == [1, 1, 1, 0, 0, 1]
    assert canal[["dice", "precision", "recall"]].tolist() == [pytest.approx(2 / 3), 1, 0.5]
    assert canal["volume_error_ml"] == pytest.approx(-2 * 6 / 1000)
    assert canal["relative_volume_error"] == -0.5
    assert canal["hd95_mm"] == 2, "two rows of 1 mm"
    assert canal[[*COMPONENTS, "detection_rate"]].isna().all()
    assert by_case["class"].tolist() == list(CLASSES)
    assert by_case.columns.tolist() == [
        "class", *FIGURES, "reference_voxels", "predicted_voxels", "missing", *COMPONENTS, "detection_rate", "whole",
    ]  # fmt: skip


def test_slices_are_measured_in_their_plane():
    reference = volume(v=((0, 1), (1, 2), (1, 2)), d=((1, 1), (4, 4), (1, 3)))
    prediction = volume(v=((0, 2), (1, 2), (2, 3)), d=((1, 1), (4, 4), (2, 4)))
    by_slice = score_case(reference, prediction, SPACING_MM).by_slice
    assert by_slice["slice"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert by_slice.columns.tolist() == [
        "slice", "class", *FIGURES, "reference_voxels", "predicted_voxels", "missing",
    ]  # fmt: skip
    for i, name in ((0, "vertebrae"), (1, "vertebrae"), (1, "IVD")):
        index = CLASSES.index(name)
        contours = surface_distances(reference[i] == index, prediction[i] == index, SPACING_MM[1:])
        found = row(by_slice, slice=i, class_=name)
        assert found[["asd_mm", "hd95_mm"]].tolist() == [contours.asd_mm, 2.0], "one column"
        assert found[["nsd_1mm", "nsd_2mm"]].tolist() == [contours.nsd(1), 1.0]
    imagined = row(by_slice, slice=2, class_="vertebrae")
    assert imagined["missing"] == "reference"
    assert imagined["volume_error_ml"] == pytest.approx(4 * 6 / 1000)
    assert row(by_slice, slice=0, class_="IVD")["missing"] == "both"


# What stands in the table of the module, for a structure of 8 voxels where there is one. None is NaN.
MISSING = {
    "reference": dict.fromkeys((*SCORES, "soft_dice", "nsd_1mm", "nsd_2mm"), 0.0)
    | {"asd_mm": None, "hd95_mm": None, "volume_error_ml": 0.048, "relative_volume_error": None},
    "prediction": dict.fromkeys((*SCORES, "nsd_1mm", "nsd_2mm"), 0.0)
    | {"asd_mm": None, "hd95_mm": None, "volume_error_ml": -0.048, "relative_volume_error": -1.0}
    | {"soft_dice": 2 * 8 * 0.25 / ((8 + 118) * 0.25 + 8)},
    "both": dict.fromkeys(FIGURES),
}


@pytest.mark.parametrize(("side", "expected"), MISSING.items())
@pytest.mark.parametrize("name", CLASSES[1:])
def test_the_convention_for_a_missing_structure(side, expected, name):
    structure = volume(**{"0vcd"[CLASSES.index(name)]: ((1, 1), (1, 2), (1, 4))})
    reference = structure * (side == "prediction")
    prediction = structure * (side == "reference")
    soft = soft_overlap(reference, np.full((*reference.shape, 4), 0.25))
    scores = score_case(reference, prediction, SPACING_MM, EVERYTHING, soft=soft)
    case = row(scores.by_case, class_=name)
    assert case["missing"] == side
    assert {figure: None if np.isnan(case[figure]) else case[figure] for figure in FIGURES} == pytest.approx(expected)
    pooled = row(scores.pooled.table(), class_=name)
    pd.testing.assert_series_equal(pooled, case.drop("whole"), check_names=False)
    if name != "canal":
        assert case["detection_rate"] == pytest.approx({"prediction": 0.0}.get(side, np.nan), nan_ok=True)
    else:
        assert np.isnan(case["detection_rate"])
    # The same holds in the slice that has it; the two slices beside it lack it on both sides.
    expected = expected | ({"soft_dice": 2 * 8 * 0.25 / (42 * 0.25 + 8)} if side == "prediction" else {})
    at_slice = row(scores.by_slice, slice=1, class_=name)
    found = {figure: None if np.isnan(at_slice[figure]) else at_slice[figure] for figure in FIGURES}
    assert found == pytest.approx(expected)
    beside = row(scores.by_slice, slice=0, class_=name)
    assert beside["missing"] == "both" and beside[FIGURES].isna().all()


def test_background_has_overlap_figures_only():
    scores = score_case(volume(v=((0, 1), (1, 2), (1, 2))), volume(v=((0, 1), (1, 2), (1, 3))), SPACING_MM)
    for table in (scores.by_slice, scores.by_case, scores.pooled.table()):
        background = table[table["class"] == "background"]
        assert background[list(SCORES)].notna().all(axis=None)
        assert background.loc[:, "asd_mm":"relative_volume_error"].isna().all(axis=None)


def test_of_a_case_with_untested_slices_only_the_overlap_is_scored():
    reference, prediction = volume(v=((0, 2), (1, 2), (1, 2))), volume(v=((0, 2), (1, 2), (1, 3)))
    prediction[1] = 0  # so that the untested slice would be noticed
    scores = score_case(reference, prediction, SPACING_MM, EVERYTHING, tested=[2, 0])
    assert scores.by_slice["slice"].unique().tolist() == [0, 2]
    vertebra = row(scores.by_case, class_="vertebrae")
    assert not vertebra["whole"]
    assert vertebra[["reference_voxels", "predicted_voxels"]].tolist() == [8, 12]
    assert vertebra["dice"] == 16 / 20
    assert vertebra["asd_mm":"relative_volume_error"].isna().all()
    assert vertebra[[*COMPONENTS, "detection_rate"]].isna().all()
    at_slice = row(scores.by_slice, slice=2, class_="vertebrae")
    assert at_slice[["asd_mm", "volume_error_ml"]].notna().all()
    pooled = row(scores.pooled.table(), class_="vertebrae")
    assert pooled["dice"] == 16 / 20 and np.isnan(pooled["asd_mm"]) and np.isnan(pooled["nsd_1mm"])


@given(labels, labels)
def test_swapped_sides_swap_what_has_a_side_and_leave_the_rest(reference, prediction):
    case = score_case(reference, prediction, SPACING_MM, EVERYTHING).by_case
    swapped = score_case(prediction, reference, SPACING_MM, EVERYTHING).by_case
    for figure in ("dice", "asd_mm", "hd95_mm", "nsd_1mm", "detected_components"):
        np.testing.assert_allclose(case[figure], swapped[figure])
    np.testing.assert_array_equal(case["precision"], swapped["recall"])
    np.testing.assert_array_equal(case["reference_components"], swapped["predicted_components"])
    np.testing.assert_allclose(case["volume_error_ml"], -swapped["volume_error_ml"])


def test_hd95_of_a_case_is_exact_and_the_pooled_one_to_half_a_bin():
    reference, prediction = volume(v=((0, 2), (1, 2), (1, 2))), volume(v=((0, 2), (1, 2), (2, 3)))
    scores = score_case(reference, prediction, (3.0, 1.0, 0.12345))
    assert row(scores.by_case, class_="vertebrae")["hd95_mm"] == 0.12345
    assert row(scores.pooled.table(), class_="vertebrae")["hd95_mm"] == pytest.approx(0.12)


def test_tolerances_are_columns():
    assert nsd_columns([0.5, 1.0, 2]) == ["nsd_0.5mm", "nsd_1mm", "nsd_2mm"]
    reference, prediction = volume(v=((0, 2), (1, 2), (1, 2))), volume(v=((0, 2), (1, 2), (2, 3)))
    by_case = score_case(reference, prediction, SPACING_MM, {"nsd_tolerances_mm": [0.5, 2.5]}).by_case
    vertebra = row(by_case, class_="vertebrae")
    assert vertebra["nsd_0.5mm"] < vertebra["nsd_2.5mm"] == 1 and "nsd_1mm" not in by_case


# Components along one row: letters are components of the reference above and of the prediction below.
@pytest.mark.parametrize(
    ("reference", "prediction", "found"),
    [
        ("aaaa bbb", "aaaa bbb", (2, 2, 2)),
        ("aaaa bbb", "aaaaaaaa", (2, 1, 1)),  # two run together are found once
        ("aaaaaaaa", "aaaa bbb", (1, 2, 1)),
        ("aaaaaaaaaa", "a         ", (1, 1, 1)),  # an IoU of 1 / 10
        ("aaaaaaaaaaa", "a          ", (1, 1, 0)),  # an IoU of 1 / 11
        ("aaa     ", "     aaa", (1, 1, 0)),
        ("   ", "aa ", (0, 1, 0)),
        ("aa ", "   ", (1, 0, 0)),
        ("   ", "   ", (0, 0, 0)),
        # a meets A (8 of 13) and B (1 of 10), b only A (2 of 11): the best pair, aA, would leave b and B alone.
        ("aaaaaaaaaa bb", "B AAAAAAAAAAA", (2, 2, 2)),
    ],
)
def test_detection_by_hand(reference, prediction, found):
    sides = [np.array([[[letter != " " for letter in side]]]) for side in (reference, prediction)]
    assert count_components(*sides, 0.1) == (*found, 0, 0)


def test_components_hang_together_by_faces_in_all_three_axes():
    by_edge = np.zeros((2, 2, 2), bool)
    by_edge[0, 0, 0] = by_edge[0, 1, 1] = True
    assert count_components(by_edge, by_edge, 0.1)[:3] == (2, 2, 2)
    for axis in range(3):
        by_face = np.zeros((2, 2, 2), bool)
        by_face[(slice(None), *[0] * 2)] = True
        assert count_components(np.moveaxis(by_face, 0, axis), by_edge & False, 0.1)[0] == 1


def test_specks_are_counted_and_left_out_on_both_sides():
    reference = volume(d=((0, 2), (0, 1), (0, 1)))  # 12 voxels, 72 mm3
    prediction = reference.copy()
    reference[2, 5, 5] = prediction[0, 4, 6] = prediction[2, 5, 3] = 3  # 6 mm3 each
    settings = {"minimum_component_mm3": 6.5}
    disc = row(score_case(reference, prediction, SPACING_MM, settings).by_case, class_="IVD")
    assert disc[[*COMPONENTS, "detection_rate"]].tolist() == [1, 1, 1, 1, 2, 1]
    disc = row(score_case(reference, prediction, SPACING_MM, {"minimum_component_mm3": 6}).by_case, class_="IVD")
    assert disc[[*COMPONENTS, "detection_rate"]].tolist() == [2, 3, 1, 0, 0, 0.5]


@given(hnp.arrays(bool, (2, 3, 4), elements=st.booleans()), hnp.arrays(bool, (2, 3, 4), elements=st.booleans()))
def test_detection_is_the_largest_matching(reference, prediction):
    from scipy import ndimage

    found = count_components(reference, prediction, 0.1)
    sides = [[labelled == i for i in range(1, n + 1)] for labelled, n in map(ndimage.label, (reference, prediction))]
    few, many = sorted(sides, key=len)
    possible = [[(one & other).sum() / (one | other).sum() >= 0.1 for other in many] for one in few]
    assume(len(many) <= 6)
    largest = max(
        sum(possible[i][j] for i, j in enumerate(order)) for order in permutations(range(len(many)), len(few))
    )
    assert found == (len(sides[0]), len(sides[1]), largest, 0, 0)


def two_cases() -> dict[str, tuple[str, CaseScores]]:
    """Case a lacks the disc on both sides, and its canal is missed; b has all."""
    a = volume(v=((0, 2), (0, 2), (0, 2)), c=((0, 2), (0, 5), (5, 5)))
    a_found = volume(v=((0, 2), (0, 2), (1, 2)))
    b = volume((2, 8, 9), v=((0, 1), (0, 2), (0, 3)), d=((0, 1), (4, 5), (0, 3)), c=((0, 1), (0, 7), (6, 7)))
    b_found = volume((2, 8, 9), v=((0, 1), (0, 2), (0, 1)), d=((0, 1), (4, 6), (0, 3)), c=((0, 1), (0, 6), (6, 7)))
    return {
        "b_t2": ("b", score_case(b, b_found, (4.0, 0.5, 0.7), EVERYTHING)),
        "a_t2": ("a", score_case(a, a_found, SPACING_MM, EVERYTHING)),
    }


def pooled_of(cases: dict[str, tuple[str, CaseScores]]) -> Pooled:
    return sum((scores.pooled for _, scores in cases.values()), Pooled.of_nothing([1.0, 2.0]))


def test_pooled_figures_are_those_of_all_voxels_and_all_surface_together():
    cases = two_cases()
    pooled = pooled_of(cases).table()
    a, b = (cases[name][1].by_case for name in ("a_t2", "b_t2"))
    vertebra = row(pooled, class_="vertebrae")
    assert vertebra["dice"] == pytest.approx(2 * (18 + 12) / (27 + 18 + 24 + 12))
    assert vertebra["volume_error_ml"] == pytest.approx(-(9 * 6 + 12 * 1.4) / 1000)
    assert vertebra["relative_volume_error"] == pytest.approx(-(9 * 6 + 12 * 1.4) / (27 * 6 + 24 * 1.4))
    assert vertebra[[*COMPONENTS, "detection_rate"]].tolist() == [2, 2, 2, 0, 0, 1]

    both = [
        surface_distances(volume(v=((0, 2), (0, 2), (0, 2))) == 1, volume(v=((0, 2), (0, 2), (1, 2))) == 1, SPACING_MM),
        surface_distances(
            volume((2, 8, 9), v=((0, 1), (0, 2), (0, 3))) == 1,
            volume((2, 8, 9), v=((0, 1), (0, 2), (0, 1))) == 1,
            (4.0, 0.5, 0.7),
        ),
    ]
    together = [np.concatenate([getattr(s, field.name) for s in both]) for field in fields(both[0])]
    there, back, areas_there, areas_back = together
    assert vertebra["asd_mm"] == pytest.approx(
        (there @ areas_there + back @ areas_back) / (areas_there.sum() + areas_back.sum())
    )
    exact = max(weighted_percentile(there, areas_there, 95), weighted_percentile(back, areas_back, 95))
    assert vertebra["hd95_mm"] == pytest.approx(exact, abs=HISTOGRAM_MM / 2 + 1e-9)
    assert vertebra["nsd_1mm"] == pytest.approx(
        (areas_there[there <= 1].sum() + areas_back[back <= 1].sum()) / (areas_there.sum() + areas_back.sum())
    )
    # The missed canal of a has no distance, and all its surface is too far away.
    canal = row(pooled, class_="canal")
    assert canal["asd_mm"] == pytest.approx(row(b, class_="canal")["asd_mm"])
    missed, _, area, _ = (
        getattr(surface_distances(volume(c=((0, 2), (0, 5), (5, 5))) > 0, volume() > 0, SPACING_MM), field.name)
        for field in fields(both[0])
    )
    assert np.isinf(missed).all() and row(a, class_="canal")["nsd_2mm"] == 0
    b_areas = cases["b_t2"][1].pooled.areas[2]
    assert canal["nsd_2mm"] == pytest.approx(row(b, class_="canal")["nsd_2mm"] * b_areas / (b_areas + area.sum()))


@settings(max_examples=10)
@given(st.lists(st.tuples(labels, labels), min_size=2, max_size=3))
def test_the_order_of_the_cases_does_not_matter(pairs):
    summands = [score_case(*pair, SPACING_MM, EVERYTHING).pooled for pair in pairs]
    forwards, backwards = sum(summands[1:], summands[0]).table(), sum(summands[-2::-1], summands[-1]).table()
    pd.testing.assert_frame_equal(forwards, backwards)


@given(labels, labels)
def test_a_case_pooled_with_itself_has_its_own_figures(reference, prediction):
    scores = score_case(reference, prediction, SPACING_MM, EVERYTHING)
    twice = (scores.pooled + scores.pooled).table()
    figures = [figure for figure in FIGURES if figure not in ("hd95_mm", "volume_error_ml")]
    pd.testing.assert_frame_equal(twice[figures], scores.by_case[figures])
    np.testing.assert_allclose(twice["hd95_mm"], scores.by_case["hd95_mm"], atol=HISTOGRAM_MM / 2 + 1e-9)
    np.testing.assert_allclose(twice["volume_error_ml"], 2 * scores.by_case["volume_error_ml"])


def test_a_sum_of_many_cases_is_as_small_as_one():
    def size(pooled):
        return sum(getattr(pooled, field.name).nbytes for field in fields(pooled)[1:])

    one = two_cases()["b_t2"][1].pooled
    assert size(sum([one] * 20, one)) == size(one)


def test_the_tables_by_hand():
    cases = two_cases()
    by_slice, by_case = table_by_slice(cases), table_by_case(cases)
    assert by_case.columns.tolist()[:4] == ["series", "patient", "class", "dice"]
    assert by_case["series"].tolist() == ["a_t2"] * 4 + ["b_t2"] * 4
    assert by_slice.columns.tolist()[:4] == ["series", "patient", "slice", "class"]
    assert by_slice["slice"].tolist() == np.repeat([0, 1, 2, 0, 1], 4).tolist()
    disc = row(by_case, series="b_t2", class_="IVD")
    assert disc[["patient", "reference_voxels", "predicted_voxels"]].tolist() == ["b", 16, 24]

    ceiling = np.diag([9, 9, 9, 9])
    by_class = table_by_class(by_slice, by_case, pooled_of(cases), ceiling)
    units = ["n_undefined", "n_missing_reference", "n_missing_prediction", "n_missing_both", *COUNTS]
    assert by_class.columns.tolist() == ["class", "scope", *FIGURES, "detection_rate", "n_cases", "n_slices", *units]
    scopes = ["pooled", "case mean", "slice mean", "ceiling"]
    assert by_class["scope"].tolist() == np.repeat(scopes, 5).tolist()
    assert by_class["class"].tolist() == [*CLASSES, "mean foreground"] * 4
    assert by_class["n_cases"].eq(2).all() and by_class["n_slices"].eq(5).all()

    def counts(name, scope):
        return row(by_class, class_=name, scope=scope)[units].tolist()

    # Undefined; missing in the reference, the prediction, both; overlap, soft, surface, NSD, two of volume, detection.
    assert counts("canal", "case mean") == [0, 0, 1, 0, 2, 0, 1, 2, 2, 2, 0]
    assert counts("canal", "pooled") == counts("canal", "case mean")
    assert counts("canal", "slice mean") == [0, 0, 3, 0, 5, 0, 2, 5, 5, 5, 0]
    assert counts("IVD", "case mean") == [1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1]
    assert counts("IVD", "ceiling") == [1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert counts("canal", "ceiling") == [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert counts("mean foreground", "case mean") == [1, 0, 1, 1, 5, 0, 4, 5, 5, 5, 3]

    canal = row(by_class, class_="canal", scope="case mean")
    b = row(by_case, series="b_t2", class_="canal")
    assert canal["dice"] == pytest.approx(b["dice"] / 2), "the missed one counts 0"
    assert canal["asd_mm"] == b["asd_mm"], "the missed one has no distance, which the count tells"
    dice = row(by_class, class_="vertebrae", scope="slice mean")["dice"]
    assert dice == pytest.approx((3 * (2 * 6 / 15) + 2 * (2 * 6 / 18)) / 5)
    assert np.isnan(row(by_class, class_="vertebrae", scope="slice mean")["detection_rate"]), (
        "components are of volumes"
    )
    last = row(by_class, class_="mean foreground", scope="pooled")
    pooled = pooled_of(cases).table()
    assert last["dice"] == pytest.approx(pooled["dice"][1:].mean())
    assert last["detection_rate"] == pytest.approx(pooled.loc[[1, 3], "detection_rate"].mean()) == 1
    assert row(by_class, class_="mean foreground", scope="ceiling")["dice"] == 1


def test_the_ceiling_has_no_figure_where_the_reference_lacks_a_structure():
    imagined = {"a_t2": ("a", score_case(volume(), volume(d=((0, 1), (1, 2), (1, 2))), SPACING_MM))}
    by_class = table_by_class(table_by_slice(imagined), table_by_case(imagined), pooled_of(imagined), np.diag([9] * 4))
    columns = ["n_undefined", "n_missing_reference", "n_missing_both", "n_overlap"]
    assert row(by_class, class_="IVD", scope="pooled")[columns].tolist() == [0, 1, 0, 1]
    assert row(by_class, class_="IVD", scope="ceiling")[columns].tolist() == [1, 0, 1, 0]


def test_a_class_that_no_case_has_leaves_the_mean_undefined_rather_than_better():
    cases = {"a_t2": two_cases()["a_t2"]}
    tables = table_by_slice(cases), table_by_case(cases), pooled_of(cases)
    by_class = table_by_class(*tables, np.diag([5, 5, 5, 0]))
    last = by_class[by_class["class"] == "mean foreground"]
    assert last[["dice", "nsd_1mm", "volume_error_ml", "detection_rate"]].isna().all(axis=None)
    assert "ceiling" not in table_by_class(*tables)["scope"].tolist()


def test_volumes_on_different_grids_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 6, 7\) and prediction of shape \(2, 6, 7\).*one shape.*grid"):
        score_case(volume(), volume((2, 6, 7)), SPACING_MM)
    with pytest.raises(ValueError, match=r"shape \(6, 7\) and .* expected two volumes"):
        score_case(volume()[0], volume()[0], SPACING_MM)


def test_probabilities_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"probabilities of shape \(3, 6, 7\); expected \(3, 6, 7, 4\)"):
        soft_overlap(volume(), np.zeros((3, 6, 7)))
    with pytest.raises(ValueError, match=r"soft overlap of shape \(2, 4, 3\); expected \(3, 4, 3\). Compute it of all"):
        score_case(volume(), volume(), SPACING_MM, soft=np.zeros((2, 4, 3)))


@pytest.mark.parametrize("tested", [[], [3], [-1, 0]])
def test_slices_that_are_not_there_are_refused(tested):
    with pytest.raises(ValueError, match="of a series of 3; expected some of 0 to 2. Make the split again"):
        score_case(volume(), volume(), SPACING_MM, tested=tested)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nsd_tolerance_mm": [1]}, "unknown setting metrics.nsd_tolerance_mm; expected some of"),
        ({"nsd_tolerances_mm": []}, "expected different lengths in mm, 0 or more"),
        ({"nsd_tolerances_mm": [-1]}, "expected different lengths in mm, 0 or more"),
        ({"nsd_tolerances_mm": [1, 1.0]}, "expected different lengths in mm, 0 or more"),
        ({"detection_iou": 0}, "metrics.detection_iou 0; expected above 0 and up to 1"),
        ({"detection_iou": 1.1}, "metrics.detection_iou 1.1; expected above 0 and up to 1"),
        ({"minimum_component_mm3": -1}, "metrics.minimum_component_mm3 -1; expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        score_case(volume(), volume(), SPACING_MM, settings)


def test_cases_of_other_tolerances_are_not_pooled():
    with pytest.raises(ValueError, match=r"at \(1.0,\) and at \(2.0,\) mm; expected equal tolerances. Score all cases"):
        Pooled.of_nothing([1.0]) + Pooled.of_nothing([2.0])
