"""The paper's measures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lumbarflow.labels import CLASS_COUNT
from lumbarflow.paper_protocol import paper_scores

SETTINGS = {"dice": "soft", "nsd_tolerance_pixels": 1.0, "stacked": True, "stack_seed": 0}


def certain(labels: np.ndarray) -> np.ndarray:
    return np.eye(CLASS_COUNT)[labels]


def row(table, name):
    return table.set_index("class").loc[name]


def test_a_perfect_net_has_perfect_figures():
    labels = np.random.default_rng(0).integers(0, 4, (3, 6, 5)).astype(np.uint8)
    table = paper_scores([(labels[:2], certain(labels[:2])), (labels[2:], certain(labels[2:]))], SETTINGS)
    for column in ("iou", "dice", "nsd", "precision", "recall", "f1"):
        np.testing.assert_allclose(table[column], 1)
    np.testing.assert_allclose(table["asd_pixels"], 0)
    assert table["n_slices"].tolist() == [3] * 4


def test_dice_is_of_probabilities_and_the_mean_of_slices():
    reference = np.zeros((2, 1, 4), np.uint8)
    reference[0, 0, :2], reference[1, 0, 0] = 1, 1
    probabilities = np.zeros((2, 1, 4, CLASS_COUNT))
    probabilities[0, 0, :, 1] = [0.8, 0.6, 0.2, 0.0]
    probabilities[1, 0, :, 1] = [0.3, 0.0, 0.0, 0.1]
    probabilities[..., 0] = 1 - probabilities[..., 1]
    found = row(paper_scores([(reference, probabilities)], SETTINGS), "vertebrae")
    # 2 * 1.4 / (1.6 + 2) and 2 * 0.3 / (0.4 + 1)
    assert found["dice"] == pytest.approx((2.8 / 3.6 + 0.6 / 1.4) / 2)
    hard = row(paper_scores([(reference, probabilities)], SETTINGS | {"dice": "hard"}), "vertebrae")
    assert hard["dice"] == pytest.approx((1 + 0) / 2)  # the second slice's only pixel has 0.3
    # Pooled over pixels: 2 found of 3, none too many.
    assert (found["iou"], found["recall"], found["precision"]) == pytest.approx((2 / 3, 2 / 3, 1))


def test_hard_dice_counts_the_slices_where_nobody_has_the_class():
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0, 0, 0] = 3
    found = row(paper_scores([(labels, certain(labels))], SETTINGS | {"dice": "hard"}), "IVD")
    assert (found["dice"], found["n_undefined"]) == (1, 1)


def shifted():
    """One pixel of class 1 in each of two slices; the second prediction lies 3 columns beside it."""
    reference, prediction = np.zeros((2, 2, 5, 7), np.uint8)
    reference[:, 2, 1] = 1
    prediction[0, 2, 1], prediction[1, 2, 4] = 1, 1
    return reference, prediction


def test_a_stack_takes_other_slices_for_neighbours():
    reference, prediction = shifted()
    batches = [(reference, certain(prediction))]
    # Slice by slice: distances 0, 0, 3, 3.
    alone = row(paper_scores(batches, SETTINGS | {"stacked": False}), "vertebrae")
    assert (alone["asd_pixels"], alone["nsd"]) == pytest.approx((1.5, 0.5))
    # Stacked, the reference pixel of one slice is 1 away from the prediction of the other: 0, 1, 0, 3.
    stacked = row(paper_scores(batches, SETTINGS), "vertebrae")
    assert (stacked["asd_pixels"], stacked["nsd"]) == pytest.approx((1.0, 0.75))
    generous = row(paper_scores(batches, SETTINGS | {"nsd_tolerance_pixels": 3}), "vertebrae")
    assert generous["nsd"] == 1


def test_a_slice_by_itself_has_no_border_through_its_plane():
    # The middle pixel of 3 x 3 has all its neighbours; in a stack of one slice it would have none above and below.
    reference, prediction = np.zeros((2, 1, 5, 7), np.uint8)
    reference[0, 1:4, 1:4], prediction[0, 1:4, 1:5] = 1, 1
    found = row(paper_scores([(reference, certain(prediction))], SETTINGS | {"stacked": False}), "vertebrae")
    # Borders of 8 and 10 pixels share 7; the reference's other one and the three in the last column are 1 away.
    assert (found["asd_pixels"], found["nsd"]) == pytest.approx((4 / 18, 1))


def test_distances_in_a_long_stack_are_those_of_the_whole():
    # 100 slices of 4 x 3: looked at 8 at a time, whatever is farther than 4 slices away through the whole stack.
    rng = np.random.default_rng(5)
    reference, prediction = (rng.random((2, 100, 4, 3)) < 0.3).astype(np.uint8)
    prediction[8:70] = 0
    order = np.random.default_rng(SETTINGS["stack_seed"]).permutation(100)
    batches = [side[np.argsort(order)] for side in (reference, prediction)]
    found = row(paper_scores([(batches[0], certain(batches[1]))], SETTINGS), "vertebrae")
    points = []
    for side in (reference, prediction):
        padded = np.pad(side, 1)
        inside = np.ones(side.shape, bool)
        for axis in range(3):
            for step in (-1, 1):
                inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] == 1
        points.append(np.argwhere((side == 1) & ~inside))
    apart = np.linalg.norm(points[0][:, None] - points[1], axis=2)
    both = np.concatenate([apart.min(axis=1), apart.min(axis=0)])
    assert both.max() > 25  # some look through the whole stack
    assert (found["asd_pixels"], found["nsd"]) == pytest.approx((both.mean(), (both <= 1).mean()))


def test_the_order_of_the_stack_is_the_seeds():
    rng = np.random.default_rng(3)
    reference, prediction = (rng.random((2, 9, 6, 5)) < 0.3).astype(np.uint8)
    batches = [(reference, certain(prediction))]
    first, again, other = (paper_scores(batches, SETTINGS | {"stack_seed": seed}) for seed in (1, 1, 2))
    assert row(first, "vertebrae").equals(row(again, "vertebrae"))
    assert row(first, "vertebrae")["asd_pixels"] != row(other, "vertebrae")["asd_pixels"]
    assert row(first, "vertebrae")["iou"] == row(other, "vertebrae")["iou"]


def test_a_class_that_one_side_lacks_has_no_distance():
    reference, prediction = np.zeros((2, 1, 3, 4), np.uint8)
    reference[0, 1, 1] = 2
    found = row(paper_scores([(reference, certain(prediction))], SETTINGS), "canal")
    assert np.isnan(found["asd_pixels"])
    assert (found["nsd"], found["dice"], found["n_surface"], found["n_volumes"]) == (0, 0, 0, 1)
    nobody = row(paper_scores([(prediction, certain(prediction))], SETTINGS), "canal")
    assert np.isnan(nobody["nsd"])


def test_a_slice_that_misses_a_class_counts_as_too_far_away():
    reference, prediction = np.zeros((2, 2, 3, 4), np.uint8)
    reference[:, 1, 1], prediction[0, 1, 1] = 2, 2
    found = row(paper_scores([(reference, certain(prediction))], SETTINGS | {"stacked": False}), "canal")
    # Two pixels agree in the first slice, one has nothing to agree with in the second.
    assert (found["asd_pixels"], found["nsd"]) == (0, pytest.approx(2 / 3))
    assert (found["n_surface"], found["n_volumes"]) == (1, 2)


def test_what_cannot_be_scored_is_an_error():
    labels = np.zeros((1, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="no slice to score; expected those of the side 'test'"):
        paper_scores([], SETTINGS)
    with pytest.raises(ValueError, match="paper_protocol.dice is 'smooth'; expected one of soft, hard"):
        paper_scores([(labels, certain(labels))], SETTINGS | {"dice": "smooth"})
    with pytest.raises(ValueError, match="unknown setting paper_protocol.tolerance"):
        paper_scores([(labels, certain(labels))], SETTINGS | {"tolerance": 1})
