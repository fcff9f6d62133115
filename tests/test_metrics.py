from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow.metrics import (
    class_scores,
    confusion_matrix,
    mean_foreground_dice,
    table_by_case,
    table_by_class,
)

REFERENCE = np.array([[0, 0, 1, 1, 1], [2, 2, 3, 3, 3]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 1, 0], [2, 3, 3, 3, 3]], np.uint8)
CONFUSION = [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 3]]

labels = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))


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
    for name in ("dice", "iou", "precision", "recall", "f1"):
        assert scores[name][1] == 0, "missed"
        assert scores[name][2] == 0, "found where there is none"
        assert np.isnan(scores[name][3]), "neither"
    assert np.isnan(mean_foreground_dice(confusion_matrix(reference, prediction)))


@given(labels, labels)
def test_dice_and_iou_are_symmetric_and_precision_mirrors_recall(first, second):
    there, back = class_scores(confusion_matrix(first, second)), class_scores(confusion_matrix(second, first))
    np.testing.assert_array_equal(there["dice"], back["dice"])
    np.testing.assert_array_equal(there["iou"], back["iou"])
    np.testing.assert_array_equal(there["precision"], back["recall"])
    np.testing.assert_allclose(there["dice"], 2 * there["iou"] / (1 + there["iou"]))


@given(labels)
def test_a_perfect_prediction_scores_1_in_every_class_that_is_there(reference):
    scores = class_scores(confusion_matrix(reference, reference))
    present = np.isin(range(4), reference)
    for name in ("dice", "iou", "precision", "recall", "f1"):
        np.testing.assert_array_equal(scores[name], np.where(present, 1.0, np.nan))


def test_the_tables_by_hand():
    nothing = np.diag([10, 0, 0, 0])  # a case without any structure, rightly predicted
    cases = {"b_t2": ("b", np.array(CONFUSION)), "a_t2": ("a", nothing)}
    by_case = table_by_case(cases)
    assert by_case["series"].tolist() == ["a_t2"] * 4 + ["b_t2"] * 4
    disc = by_case[(by_case["series"] == "b_t2") & (by_case["class"] == "IVD")].iloc[0]
    assert (disc["patient"], disc["reference_voxels"], disc["predicted_voxels"]) == ("b", 3, 4)

    by_class = table_by_class(by_case, {"pooled": np.array(CONFUSION) + nothing, "ceiling": np.diag([9, 9, 9, 9])})
    assert by_class["scope"].tolist() == ["pooled"] * 5 + ["case mean"] * 5 + ["ceiling"] * 5
    rows = by_class.set_index(["class", "scope"])
    assert rows.loc[("background", "pooled"), "dice"] == pytest.approx(22 / 24)
    assert rows.loc[("background", "case mean"), "dice"] == pytest.approx((0.5 + 1) / 2)
    # The mean over cases is over the one that has the structure, and says that the other one has none.
    assert rows.loc[("canal", "case mean"), "dice"] == pytest.approx(2 / 3)
    assert rows.loc[("canal", "case mean"), ["n_cases", "n_undefined"]].tolist() == [2, 1]
    mean = rows.loc[("mean foreground", "pooled")]
    assert mean["dice"] == pytest.approx((4 / 6 + 2 / 3 + 6 / 7) / 3)
    assert rows.loc[("mean foreground", "ceiling"), "dice"] == 1


def test_a_class_that_no_case_has_leaves_the_mean_undefined_rather_than_better():
    by_case = table_by_case({"a_t2": ("a", np.diag([5, 5, 5, 0]))})
    by_class = table_by_class(by_case, {"pooled": np.diag([5, 5, 5, 0])})
    assert by_class[by_class["class"] == "mean foreground"]["dice"].isna().all()


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction of shape \(2,\); expected the reference's \(3,\)"):
        confusion_matrix(np.zeros(3, np.uint8), np.zeros(2, np.uint8))
