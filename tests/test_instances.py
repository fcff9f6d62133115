"""Numbered vertebrae and discs: a spine of boxes, each voxel's number known by hand, and the synthetic scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from lumbarflow import phantom
from lumbarflow.imaging import to_sagittal
from lumbarflow.instances import count_instances, label_instances
from lumbarflow.labels import CANAL_ID, DISC_OFFSET, PARTIAL_OFFSET, LabelTable

CONF = Path(__file__).parents[1] / "conf/base"
TABLE = LabelTable(yaml.safe_load((CONF / "parameters_ingest.yml").read_text())["labels"]["table"])

# A spine of boxes, straight up. A body is 16 rows of 1.5 mm high, a gap 6 rows; the disc fills it but for a row of
# endplate on either side. From the front: 24 columns of 1.4 mm of body, 2 of nothing, 10 of canal, 3 of nothing, and
# 16 of spinous process, 10 rows high, which begins 10 rows below the top of its body and ends with the gap below it.
SPACING = (4.0, 1.5, 1.4)
PERIOD, BODY = 22, 16
COLUMN, CANAL, PROCESS = slice(8, 32), slice(34, 44), slice(47, 63)


def boxes(levels: int = 4, *, above: int = 0, below: int = 12) -> np.ndarray:
    """Ids (7, rows, 70) of so many whole levels, `above` rows of the next body, `below` rows under the lowest disc."""
    ids = np.zeros((7, above + levels * PERIOD + below, 70), np.uint8)
    ids[2:5, :, CANAL] = CANAL_ID
    for number in range(1, levels + 1):
        top = above + (levels - number) * PERIOD
        ids[1:6, top : top + BODY, COLUMN] = number
        ids[1:6, top + BODY + 1 : top + PERIOD - 1, COLUMN] = DISC_OFFSET + number
        ids[3, top + 10 : top + 20, PROCESS] = number
    # Of the next one above, the lower end of its body shows, and the disc below it.
    if above > PERIOD - BODY:
        ids[1:6, : above - (PERIOD - BODY), COLUMN] = levels + 1
        ids[1:6, above - (PERIOD - BODY) + 1 : above - 1, COLUMN] = DISC_OFFSET + levels + 1
    return ids


def check(ids: np.ndarray, classes: np.ndarray | None = None, spacing=SPACING) -> None:
    """The instances of `classes` (those of `ids`) are `ids`."""
    classes = TABLE.classes(ids) if classes is None else classes
    found = label_instances(classes, spacing)
    assert np.array_equal(TABLE.classes(found), classes)
    different = np.argwhere((found != ids) & (ids > 0) & (classes > 0))
    assert len(different) == 0, [(tuple(i), ids[tuple(i)], found[tuple(i)]) for i in different[:5].tolist()]


@pytest.mark.parametrize("levels", [1, 2, 5, 9])
def test_boxes_are_numbered_from_the_lowest_up(levels):
    ids = boxes(levels)
    check(ids)
    assert count_instances(label_instances(TABLE.classes(ids), SPACING)) == (levels, levels)


def test_a_body_cut_by_the_upper_edge_is_the_next_one():
    ids = boxes(4, above=12)
    assert np.any(ids == 5) and np.any(ids == 205)
    check(ids)


def test_a_disc_at_the_upper_edge_needs_no_vertebra():
    ids = boxes(4, above=6)
    ids[1:6, :5, COLUMN] = 205
    check(ids)


def test_where_the_lower_edge_cuts_the_spine_there_is_no_disc_201():
    # Vertebra 1 loses its disc and its lower half: the disc above it keeps the number 202.
    ids = boxes(4, below=0)[:, : -(PERIOD - 8)]
    assert not np.any(ids == 201)
    check(ids)


def test_a_scrap_below_the_lowest_disc_is_no_vertebra():
    # Part of the sacrum taken for a vertebra: it joins vertebra 1, and L5/S1 stays 201.
    ids = boxes(4, below=40)
    classes = TABLE.classes(ids)
    classes[2:5, 4 * PERIOD + 6 : 4 * PERIOD + 12, 12:22] = 1
    found = label_instances(classes, SPACING)
    assert np.array_equal(found[ids > 0], ids[ids > 0])
    assert set(found[classes != TABLE.classes(ids)]) == {1}


def test_a_remnant_of_a_sacral_disc_is_no_level():
    ids = boxes(4, below=40)
    classes = TABLE.classes(ids)
    classes[1:6, 4 * PERIOD + 16 : 4 * PERIOD + 19, 12:30] = 3
    found = label_instances(classes, SPACING)
    assert np.array_equal(found[ids > 0], ids[ids > 0])
    assert set(found[classes != TABLE.classes(ids)]) == {201}


def test_a_missing_disc_or_body_keeps_its_number():
    ids = boxes(5)
    classes = TABLE.classes(ids)
    check(ids, np.where(ids == 203, 0, classes))
    check(ids, np.where(ids == 3, 0, classes))
    # The bodies touch where the disc was: they are cut halfway between its neighbours, in the middle of the gap.
    ids[ids == 203] = 0
    bridged = TABLE.classes(ids)
    top = 2 * PERIOD + BODY
    bridged[2:5, top : top + 6, 12:20] = 1
    check(ids, bridged)
    found = label_instances(bridged, SPACING)
    assert np.all(found[2:5, top : top + 3, 12:20] == 3) and np.all(found[2:5, top + 3 : top + 6, 12:20] == 2)


def test_bodies_that_touch_are_cut_at_the_level_of_the_disc():
    # In front of every disc, an osteophyte two columns deep joins the bodies.
    ids = boxes(4)
    classes = TABLE.classes(ids)
    classes[2:5, : 4 * PERIOD - 6, 6:8] = 1
    check(ids, classes)
    found = label_instances(classes, SPACING)
    # Between vertebrae 4 and 3 the gap is rows 16 to 21: half of it goes to either.
    assert found[3, 14:24, 6].tolist() == [4] * 5 + [3] * 5


def test_discs_that_touch_are_cut_within_the_body():
    ids = boxes(4)
    classes = TABLE.classes(ids)
    classes[3, PERIOD : PERIOD + BODY + 2, 32:34] = 3
    check(ids, classes)
    found = label_instances(classes, SPACING)
    # The bridge's 18 rows and the discs' half heights: the middle between the discs is row 30, 2 x 11 rows apart.
    assert found[3, PERIOD : PERIOD + BODY + 2, 32].tolist() == [204] * 8 + [203] * 10


def test_pieces_of_a_disc_are_one_disc():
    ids = boxes(4)
    ids[ids == 202] *= np.broadcast_to(np.abs(np.arange(70) - 20) > 3, ids.shape)[ids == 202]
    check(ids)
    # The front one lies 6 mm higher, and has pressed the body in.
    ids = boxes(4)
    top = 2 * PERIOD + BODY
    ids[1:6, top - 3 : top + 5, COLUMN] = 0
    ids[1:6, top - 2 : top, 8:20], ids[1:6, top + 3 : top + 5, 20:32] = 202, 202
    check(ids)


def test_processes_that_touch_are_cut_between_the_vertebrae():
    # Kissing spines: the gap of 12 rows between the processes 3 and 2 is bridged by two columns.
    ids = boxes(4)
    classes = TABLE.classes(ids)
    low, high = PERIOD + 20, 2 * PERIOD + 10
    classes[3, low:high, 53:55] = 1
    check(ids, classes)
    found = label_instances(classes, SPACING)
    assert found[3, low : low + 3, 53].tolist() == [3] * 3 and found[3, high - 3 : high, 53].tolist() == [2] * 3


def test_a_process_that_crosses_the_border_stays_whole():
    # Beside the midline it has a tip that reaches up to the process above.
    ids = boxes(4)
    ids[4, 2 * PERIOD + 10 : 2 * PERIOD + 20, 55:60] = 2
    ids[5, PERIOD + 20 : 2 * PERIOD + 20, 55:60] = 2
    check(ids)


def test_an_arch_follows_its_pedicle():
    # In a lateral slice the process hangs on its body only; it reaches down to the next vertebra's level.
    ids = boxes(3)
    for number, top in ((3, 0), (2, PERIOD), (1, 2 * PERIOD)):
        ids[1, top + 2 : top + 7, 32:50] = number
        ids[1, top + 7 : top + 21, 46:50] = number
    check(ids)


def test_specks_join_and_nothing_is_lost():
    ids = boxes(4)
    classes = TABLE.classes(ids)
    rng = np.random.default_rng(3)
    free = np.argwhere(ndimage.distance_transform_cdt(classes == 0) > 2)
    for value in (1, 2, 3):
        classes[tuple(rng.permutation(free)[:25].T)] = value
    found = label_instances(classes, SPACING)
    assert np.array_equal(TABLE.classes(found), classes)
    assert np.array_equal(found[ids > 0], ids[ids > 0])
    assert count_instances(found) == (4, 4)


def test_specks_above_are_no_vertebra_in_view():
    # Together they are more than a speck (125 mm3; a voxel has 8.4), but none of them is; a piece of 20 voxels is.
    ids = boxes(3, above=40)
    ids[:, :40][ids[:, :40] != CANAL_ID] = 0
    classes = TABLE.classes(ids)
    classes[1::2, 0:18:2, 10:30:4] = 1
    assert count_instances(label_instances(classes, SPACING)) == (3, 3)
    classes[3, 26:30, 50:55] = 1
    assert count_instances(label_instances(classes, SPACING)) == (4, 3)


def test_without_discs_there_is_nothing_to_count_by():
    classes = TABLE.classes(boxes(3))
    classes[classes == 3] = 0
    assert set(np.unique(label_instances(classes, SPACING))) == {0, 1, CANAL_ID}
    assert not label_instances(np.zeros((2, 3, 4), np.uint8), SPACING).any()


def test_without_a_canal_the_discs_alone_show_the_way():
    ids = boxes(5)
    ids[ids == CANAL_ID] = 0
    check(ids)


def test_count_instances_by_hand():
    assert count_instances(np.array([[0, 1, 2, 2], [100, 201, 203, 25]], np.uint8)) == (3, 2)
    assert count_instances(np.zeros((1, 2, 3), np.uint8)) == (0, 0)


@pytest.mark.parametrize(
    ("classes", "spacing", "message"),
    [
        (np.zeros((3, 4), np.uint8), SPACING, r"2 axes.*expected \(slice, row, column\)"),
        (np.full((2, 3, 4), 201, np.uint8), SPACING, r"values up to 201; expected.*classes 0\.\.3"),
        (np.zeros((2, 3, 4), np.float32), SPACING, "dtype float32"),
        (np.zeros((2, 3, 4), np.uint8), (1.0, 0.0, 1.0), r"spacing_mm \(1.0, 0.0, 1.0\); expected three"),
        (np.zeros((2, 3, 4), np.uint8), (1.0, 1.0), "expected three distances above 0"),
    ],
)
def test_what_is_no_class_volume_is_named(classes, spacing, message):
    with pytest.raises(ValueError, match=message):
        label_instances(classes, spacing)


# --- The synthetic scans --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans():
    """Ids as `label_instances` gives them, and spacing (slice, row, column): thick and thin slices, coarse pixels."""
    settings = yaml.safe_load((CONF / "parameters_synthesize.yml").read_text())["synthesize"]
    settings |= {"patients": 3, "sequences": {"t2": 1.0, "t2_SPACE": 1.0}}
    settings["matrix"] |= {"rows": [140, 160]}
    settings["acquisition"]["thick"]["samples"] = 1  # the labels do not depend on it
    found = []
    for plan in phantom.plan_cohort(settings):
        mask = to_sagittal(phantom.render(plan, settings)[1])[0]
        ids = mask.array
        partial = (ids > PARTIAL_OFFSET) & (ids < DISC_OFFSET)
        found.append((np.where(partial, ids - PARTIAL_OFFSET, ids).astype(np.uint8), mask.spacing_mm[::-1]))
    return found


# Of the topmost vertebra, the upper edge may leave the tip of a process: less than a tenth of a vertebra.
SCRAP_MM3 = 2000


def dice(ids: np.ndarray, found: np.ndarray) -> dict[int, float]:
    wanted = [i for i in np.unique(ids).tolist() if i not in (0, CANAL_ID)]
    return {i: 2 * np.sum((ids == i) & (found == i)) / (np.sum(ids == i) + np.sum(found == i)) for i in wanted}


def test_synthetic_scans_are_numbered_as_they_were_made(scans):
    for ids, spacing in scans:
        found = label_instances(TABLE.classes(ids), spacing)
        assert np.array_equal(TABLE.classes(found), TABLE.classes(ids))
        scores = dice(ids, found)
        assert all(score == 1 for i, score in scores.items() if i > DISC_OFFSET)
        volumes = np.bincount(ids.ravel(), minlength=256) * np.prod(spacing)
        assert min(score for i, score in scores.items() if volumes[i] > SCRAP_MM3) > 0.97
        # A speck of the topmost process is no vertebra in view.
        top = max(i for i in scores if i < CANAL_ID)
        assert count_instances(found)[0] == top - (volumes[top] < 125)


def in_plane(mask: np.ndarray, operation) -> np.ndarray:
    return operation(mask, np.ones((1, 3, 3)))


@pytest.mark.parametrize("change", ["eroded", "dilated", "arches deleted", "rows deleted", "bridged"])
def test_a_poor_prediction_keeps_its_numbers(scans, change):
    rng = np.random.default_rng(5)
    for ids, spacing in scans:
        classes = TABLE.classes(ids)
        changed = classes.copy()
        if change == "eroded":
            for value in (1, 3):
                changed[(classes == value) & ~in_plane(classes == value, ndimage.binary_erosion)] = 0
        elif change == "dilated":
            for value in (3, 1):
                changed[(changed == 0) & in_plane(classes == value, ndimage.binary_dilation)] = value
        elif change == "arches deleted":
            # All that lies behind the canal's middle, in every other slice.
            canal = np.argwhere(classes == 2)[:, 2].mean()
            behind = (classes == 1) & (np.arange(classes.shape[2]) > canal)
            behind[::2] = False
            changed[behind] = 0
        elif change == "rows deleted":
            changed[:, rng.permutation(classes.shape[1])[: classes.shape[1] // 20]] = 0
        else:
            # One voxel in twenty of those beside a bone is taken for bone, and likewise discs.
            for value in (1, 3):
                beside = in_plane(classes == value, ndimage.binary_dilation) & (classes == 0)
                changed[beside & (rng.random(classes.shape) < 0.05)] = value
        found = label_instances(changed, spacing)
        assert np.array_equal(TABLE.classes(found), changed)
        same = changed == classes
        kept = np.where(same, ids, 0)
        volumes = np.bincount(kept.ravel(), minlength=256) * np.prod(spacing)
        scores = dice(kept, np.where(same, found, 0))
        assert min(score for i, score in scores.items() if volumes[i] > SCRAP_MM3) > 0.93, (change, scores)


# --- Properties -----------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 14), st.integers(1, 9))
volumes = hnp.arrays(np.uint8, shapes, elements=st.integers(0, 3))
spacings = st.tuples(*[st.floats(0.3, 9.0)] * 3)


@given(volumes, spacings)
def test_whatever_comes_in_keeps_its_classes(classes, spacing):
    found = label_instances(classes, spacing)
    assert found.dtype == np.uint8 and found.shape == classes.shape
    assert np.array_equal(TABLE.classes(found), classes)
    assert np.array_equal(found, label_instances(classes, spacing))


@st.composite
def spines(draw):
    """Boxes with some levels, cut above at any row, bent, and with a random tenth of voxels deleted."""
    ids = boxes(draw(st.integers(2, 6)), above=draw(st.integers(0, 21)))
    bend = draw(st.floats(-0.25, 0.25))
    for row in range(ids.shape[1]):
        ids[:, row] = np.roll(ids[:, row], round(bend * (row - ids.shape[1] / 2) / 4), axis=1)
    deleted = np.random.default_rng(draw(st.integers(0, 99))).random(ids.shape) < 0.1
    return np.where(deleted, 0, ids).astype(np.uint8)


@given(spines())
def test_ids_are_contiguous_and_discs_lie_below_their_vertebrae(ids):
    found = label_instances(TABLE.classes(ids), SPACING)
    vertebrae, discs = count_instances(found)
    assert set(np.unique(found)) == {0, CANAL_ID, *range(1, vertebrae + 1), *range(201, 201 + discs)}
    assert discs - vertebrae in (0, 1)
    for number in range(1, vertebrae + 1):
        body = np.isin(np.arange(70), np.r_[0:36]) & (found == number)
        if number < vertebrae:
            assert np.argwhere(body)[:, 1].mean() > np.argwhere(found == 201 + number)[:, 1].mean()
        assert np.argwhere(body)[:, 1].mean() < np.argwhere(found == 200 + number)[:, 1].mean()


@given(spines())
def test_left_and_right_dtype_and_strides_do_not_matter(ids):
    classes = TABLE.classes(ids)
    found = label_instances(classes, SPACING)
    assert np.array_equal(label_instances(classes[::-1], SPACING)[::-1], found)
    turned = np.asfortranarray(classes.astype(np.int64))
    assert np.array_equal(label_instances(turned, list(SPACING)), found)
    padded = np.pad(classes, ((2, 1), (0, 0), (3, 4)))
    assert np.array_equal(label_instances(padded, SPACING)[2:-1, :, 3:-4], found)
