"""Shapes drawn by hand and synthetic scans, of which every length is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lumbarflow import phantom
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, to_sagittal
from lumbarflow.measurements import class_name, measure, measurement_table

SIZE, SPACING_MM = (7, 110, 100), (4.0, 0.9, 1.1)  # slice, row, column
MIDDLE = (12.0, 40.0, -50.0)  # x, y (posterior) and z (superior) from the first voxel, in mm
BODY, DISC = {"structure": "vertebra", "number": 1}, {"structure": "disc", "number": 1}


def sagittal(array: np.ndarray, spacing_mm=SPACING_MM) -> LabelMap:
    direction = SAGITTAL_AXES[::-1].T  # columns: the directions of index x (column), y (row), z (slice)
    return LabelMap(array, spacing_mm[::-1], (20.0, -60.0, 30.0), direction)


def drawn(shapes: dict, size=SIZE, spacing_mm=SPACING_MM) -> LabelMap:
    """Labels of the voxels whose centres lie in a shape: label -> function of (x, y, z) in mm from MIDDLE."""
    slices, rows, columns = np.meshgrid(*map(np.arange, size), indexing="ij")
    x, y, z = slices * spacing_mm[0], columns * spacing_mm[2], -rows * spacing_mm[1]
    array = np.zeros(size, np.uint8)
    for label, shape in shapes.items():
        array[shape(x - MIDDLE[0], y - MIDDLE[1], z - MIDDLE[2])] = label
    return sagittal(array, spacing_mm)


def turned(y, z, degrees: float, above_mm: float = 0.0):
    """(u, w) of a frame above the middle whose posterior end is lifted by an angle."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    z = z - above_mm
    return cosine * y + sine * z, cosine * z - sine * y


def block(depth_mm: float, height_mm: float, degrees: float = 0.0, above_mm: float = 0.0, lean: float = 0.0):
    """Each endplate leans by this slope towards the other at the back."""

    def inside(x, y, z):
        u, w = turned(y, z, degrees, above_mm)
        return (np.abs(u) < depth_mm / 2) & (np.abs(w) < height_mm / 2 - lean * u) & (np.abs(x) < 22)

    return inside


def tube(front_mm: float, ap_mm: float, degrees: float = 0.0, half_width_mm: float = 11.0, length_mm: float = 40.0):
    """An elliptic canal whose front runs, across the turned frame, `front_mm` behind the middle."""

    def inside(x, y, z):
        u, w = turned(y, z, degrees)
        offset = u - front_mm - ap_mm / 2
        return (np.square(offset / (ap_mm / 2)) + np.square(x / half_width_mm) < 1) & (np.abs(w) < length_mm)

    return inside


def value(measurements, quantity: str, structure: str = "vertebra", number: int | None = 1) -> float:
    (found,) = [
        one for one in measurements
        if (one.structure, one.number, one.quantity) == (structure, number, quantity)
    ]  # fmt: skip
    return found.value


def values(measurements, structure: str, number: int) -> dict[str, float]:
    return {one.quantity: one.value for one in measurements if (one.structure, one.number) == (structure, number)}


# --- Shapes drawn by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [-24.0, -9.0, 6.0, 17.0])
def test_a_turned_block_before_a_canal_has_its_own_size(degrees):
    found = measure(drawn({1: block(34, 26, degrees), 100: tube(21, 15, degrees)}))
    assert values(found, "vertebra", 1) == pytest.approx(
        {
            "body_height_anterior": 26, "body_height_middle": 26, "body_height_posterior": 26,
            "body_depth": 34, "canal_ap": 15,
        }, abs=0.35,
    )  # fmt: skip
    assert {one.note for one in found[:-1]} == {""}
    assert {one.unit for one in found[:-1]} == {"mm"}


def test_an_upright_block_is_measured_to_the_steps_of_the_grid():
    # Walls along the grid stand halfway between two centres: 30 columns of 1.1 mm and 28 rows of 0.9 mm.
    array = np.zeros(SIZE, np.uint8)
    array[:, 40:68, 20:50] = 1
    found = values(measure(sagittal(array)), "vertebra", 1)
    assert found["body_depth"] == pytest.approx(30 * 1.1)
    assert found["body_height_middle"] == pytest.approx(28 * 0.9)
    assert found["body_height_anterior"] == pytest.approx(28 * 0.9)


def test_chords_end_where_the_body_does_in_the_scanners_space():
    found = measure(drawn({1: block(34, 26, 17), 100: tube(21, 15, 17)}))
    cosine, sine = math.cos(math.radians(17)), math.sin(math.radians(17))
    # LPS: x falls from slice to slice, y grows with the columns, z falls with the rows.
    middle = np.array([20.0 - MIDDLE[0], -60.0 + MIDDLE[1], 30.0 + MIDDLE[2]])
    u, w = np.array([0, cosine, sine]), np.array([0, -sine, cosine])
    by_name = {one.quantity: one for one in found}
    expected = {
        "body_height_anterior": (-0.35 * 34 * u - 13 * w, -0.35 * 34 * u + 13 * w),
        "body_depth": (-17 * u, 17 * u),
        "canal_ap": (21 * u, 36 * u),
    }
    for name, ends in expected.items():
        np.testing.assert_allclose(by_name[name].ends_mm, middle + np.array(ends), atol=0.5)
        assert math.dist(*by_name[name].ends_mm) == pytest.approx(by_name[name].value)


def test_a_wedged_disc_is_higher_in_front():
    # 36 mm deep, so that heights are taken 12.6 mm from the middle.
    found = values(measure(drawn({201: block(36, 12, 12, lean=0.08), 100: tube(23, 14, 12)})), "disc", 1)
    slope = 2 * 0.08 * 12.6
    assert found == pytest.approx(
        {"height_anterior": 12 + slope, "height_middle": 12, "height_posterior": 12 - slope, "depth": 36,
         "canal_ap": 14}, abs=0.45,
    )  # fmt: skip


def test_the_canal_is_measured_along_the_bodys_axis_not_across_the_canal():
    # The body stands upright before a canal that leans by 25 degrees: 15 / cos 25 degrees.
    found = measure(drawn({1: block(34, 26, 1), 100: tube(24, 15, -25)}))
    assert value(found, "canal_ap") == pytest.approx(15 / math.cos(math.radians(26)), abs=0.5)


def test_posterior_elements_joined_to_the_body_do_not_count():
    def with_arch(x, y, z):
        pedicles = (np.abs(x) > 11) & (y > 10) & (y < 40) & (np.abs(z) < 6)
        process = (np.abs(x) < 22) & (y > 38) & (y < 68) & (np.abs(z + 8) < 17)  # larger than the body
        return block(34, 26, 5)(x, y, z) | pedicles | process

    shapes = {1: with_arch, 100: tube(21, 15, 5)}
    found = values(measure(drawn(shapes)), "vertebra", 1)
    alone = values(measure(drawn(shapes | {1: block(34, 26, 5)})), "vertebra", 1)
    assert found == pytest.approx(alone)


def test_holes_and_specks_change_nothing():
    shapes = {1: block(34, 26, 5), 100: tube(21, 15, 5)}
    flawed = drawn(shapes)
    before = values(measure(flawed), "vertebra", 1)
    row, column = round(-MIDDLE[2] / SPACING_MM[1]), round(MIDDLE[1] / SPACING_MM[2])
    flawed.array[2:5, row - 4 : row + 3, column - 2 : column + 5] = 0  # a hole
    flawed.array[3, 20:22, 30:33] = 1  # specks, one of them of canal in front of the body
    flawed.array[3, row, column - 22] = 100
    assert values(measure(flawed), "vertebra", 1) == pytest.approx(before)


def test_the_middle_is_found_where_thin_slices_cover_one_side_of_the_canal():
    # Slices of 1 mm from 2 mm left of the middle to 16 mm right of it; the area alone would put it 4 mm off.
    size, spacing_mm = (19, 110, 100), (1.0, 0.9, 1.1)

    def moved(shape):
        return lambda x, y, z: shape(x + MIDDLE[0] - 2, y, z)

    shapes = {1: moved(block(34, 26, 8)), 100: moved(tube(21, 15, 8))}
    found = measure(drawn(shapes, size, spacing_mm))
    assert value(found, "canal_ap") == pytest.approx(15, abs=0.35)
    assert found[0].ends_mm[0][0] == pytest.approx(20 - 2, abs=0.3)


def test_the_lordosis_is_between_the_outer_endplates_and_says_which():
    # The lowest is a wedge: its endplates are tilted by 11 degrees plus and minus 4.
    lean = math.tan(math.radians(4))
    bodies = {1: block(34, 20, 11, -32, lean), 2: block(34, 20, 2, 0), 3: block(34, 20, -11, 32)}
    *_, found = measure(drawn(bodies | {100: tube(26, 12, length_mm=48)}))
    assert (found.structure, found.number, found.unit) == ("spine", None, "degrees")
    assert found.value == pytest.approx(15 + 11, abs=1.0)
    assert found.note == ("upper endplate of vertebra 3 to lower endplate of vertebra 1: L3 to L5, if vertebra 1 is L5")
    upper, lower = np.array(found.ends_mm)
    for (anterior, posterior), degrees in ((upper, -11), (lower, 15)):
        across = posterior - anterior
        assert math.degrees(math.atan2(across[2], across[1])) == pytest.approx(degrees, abs=1.0)
    assert upper[:, 2].mean() - lower[:, 2].mean() == pytest.approx(84, abs=1.5)


# --- What cannot be measured ----------------------------------------------------------------------------------------


def notes(shapes: dict) -> dict:
    found = measure(drawn(shapes))
    return {(one.structure, one.number): one.note for one in found if math.isnan(one.value)}


def test_what_the_edge_cuts_is_not_measured():
    low, whole, high = block(34, 20, 5, -45), block(34, 20, 5), block(34, 20, 5, 45)
    found = notes({201: low, 1: whole, 102: high, 100: tube(21, 15, 5, length_mm=80)})
    cut = "cut by the image's edge"
    assert found == {
        ("disc", 1): cut, ("vertebra", 2): cut, ("spine", None): "fewer than two whole lumbar bodies",
    }  # fmt: skip


def test_a_partial_vertebra_is_not_measured_wherever_it_lies():
    assert notes({101: block(34, 26), 100: tube(21, 15)})["vertebra", 1] == "cut by the image's edge"


def test_without_a_canal_the_structures_own_middle_serves():
    found = measure(drawn({1: block(34, 26, 7)}))
    assert value(found, "body_depth") == pytest.approx(34, abs=0.35)
    assert {one.note for one in found if one.quantity.startswith("body")} == {
        "no canal at this level: taken in the structure's own middle"
    }
    assert [one.note for one in found if one.quantity == "canal_ap"] == ["no canal at this level"]


def test_a_canal_that_ends_above_is_not_measured_below():
    bodies = {1: block(34, 20, 4, -28), 2: block(34, 20, 4, 28)}

    def upper_half(x, y, z):
        return tube(21, 15, 4)(x, y, z) & (z > 5)

    found = measure(drawn(bodies | {100: upper_half}))
    assert math.isnan(value(found, "canal_ap", number=1))
    assert value(found, "canal_ap", number=2) == pytest.approx(15, abs=0.35)
    assert value(found, "body_depth", number=1) == pytest.approx(34, abs=0.35)


def test_a_chord_that_ends_off_the_outline_is_doubtful():
    # A bay of 9 mm in the middle of the upper endplate, which no smooth curve follows.
    def bitten(x, y, z):
        return block(34, 26, 5)(x, y, z) & ~((np.abs(y) < 4.5) & (z > 0))

    found = {one.quantity: one.note for one in measure(drawn({1: bitten, 100: tube(21, 15, 5)}))[:-1]}
    assert found["body_height_middle"] == "doubtful: an end lies off the outline"
    assert found["body_depth"] == found["canal_ap"] == ""


def test_a_speck_is_too_little():
    array = np.zeros(SIZE, np.uint8)
    array[3, 50:52, 40] = 201
    assert {one.note for one in measure(sagittal(array))[:-1]} == {"too few voxels in the middle slices"}


def test_a_middle_outside_the_slices_is_named():
    # The canal's widest place lies 4 mm left of the first slice.
    def aside(shape):
        return lambda x, y, z: shape(x + MIDDLE[0] + 4, y, z)

    shapes = {1: aside(block(34, 26, 8)), 100: aside(tube(21, 15, 8))}
    found = measure(drawn(shapes, size=(19, 110, 100), spacing_mm=(1.0, 0.9, 1.1)))
    assert {one.note for one in found[:-1]} == {"the middle of the canal lies outside the slices"}
    assert all(math.isnan(one.value) and one.ends_mm == () for one in found)


def test_an_empty_map_has_no_lordosis_and_nothing_else():
    (found,) = measure(sagittal(np.zeros(SIZE, np.uint16)))
    assert found.quantity == "lordosis" and math.isnan(found.value) and found.ends_mm == ()


def test_a_label_map_in_another_order_is_refused():
    turned_over = LabelMap(np.zeros((4, 5, 6), np.uint8), (1, 1, 1), (0, 0, 0), np.eye(3))
    with pytest.raises(ValueError, match=r"array axes .*expected a sagittal one. Pass what imaging.to_sagittal"):
        measure(turned_over)


def test_every_row_of_the_table_has_its_unit_and_note():
    found = measure(drawn({1: block(34, 26, 7), 201: block(34, 10, 7, -22), 100: tube(21, 15, 7)}))
    table = measurement_table(found)
    assert list(table.columns) == ["structure", "number", "quantity", "value", "unit", "note"]
    assert table["structure"].tolist() == ["disc"] * 5 + ["vertebra"] * 5 + ["spine"]
    assert table["number"].tolist()[:10] == [1] * 10 and table["number"].isna().iloc[10]
    assert table["quantity"].tolist() == [
        "height_anterior", "height_middle", "height_posterior", "depth", "canal_ap", "body_height_anterior",
        "body_height_middle", "body_height_posterior", "body_depth", "canal_ap", "lordosis",
    ]  # fmt: skip
    assert table["unit"].tolist() == ["mm"] * 10 + ["degrees"]
    assert measurement_table([]).empty


def test_an_instance_has_the_class_of_its_id():
    assert [class_name(label) for label in (1, 99, 100, 101, 125, 201, 210)] == [
        "vertebrae", "vertebrae", "canal", "vertebrae", "vertebrae", "IVD", "IVD",
    ]  # fmt: skip


# --- Properties -----------------------------------------------------------------------------------------------------

SPINE = {
    201: block(34, 9, 12, -31), 1: block(34, 22, 9, -15), 202: block(34, 9, 5), 2: block(34, 22, 0, 16),
    100: tube(22, 14, 3, length_mm=46),
}  # fmt: skip
ANGLES = st.floats(-20, 20)


def lengths(found) -> list[float]:
    return [one.value for one in found]


@given(angles=st.tuples(ANGLES, ANGLES, ANGLES), origin_mm=st.tuples(*[st.floats(-200, 200)] * 3),
       order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))  # fmt: skip
@hypothesis_settings(max_examples=6, deadline=None)
def test_neither_storage_order_nor_the_scanners_axes_change_a_length(angles, origin_mm, order, flips):
    upright = drawn(SPINE)
    rotation = phantom._rotation(np.deg2rad(angles))
    oblique = LabelMap(upright.array, upright.spacing_mm, origin_mm, rotation @ upright.direction)
    # Stored with its axes in another order, some of them the other way round.
    array = np.flip(oblique.array, [axis for axis in range(3) if flips[axis]]).transpose(order)
    first = [size - 1 if flip else 0 for size, flip in zip(oblique.size, flips[::-1], strict=True)]
    direction = oblique.direction * np.where(flips[::-1], -1, 1)
    index = [2 - order[2 - axis] for axis in range(3)]
    stored = LabelMap(
        array, tuple(np.array(oblique.spacing_mm)[index]), tuple(oblique.physical_point(first)), direction[:, index]
    )
    before, after = measure(upright), measure(to_sagittal(stored)[0])
    np.testing.assert_allclose(lengths(after), lengths(before), atol=1e-6)
    for one, other in zip(before, after, strict=True):
        moved = [upright.index_point(end) for end in np.reshape(one.ends_mm, (-1, 3))]
        assert np.allclose(moved, [oblique.index_point(end) for end in np.reshape(other.ends_mm, (-1, 3))], atol=1e-6)


@given(scale=st.floats(0.75, 1.3))
@hypothesis_settings(max_examples=6, deadline=None)
def test_lengths_grow_with_the_spacing_and_angles_do_not(scale):
    upright = drawn(SPINE)
    larger = replace(upright, spacing_mm=tuple(scale * mm for mm in upright.spacing_mm))
    for one, other in zip(measure(upright), measure(larger), strict=True):
        # How many slices and how much of the canal take part is said in mm, so that it does not grow.
        factor, slack = (scale, 0.25 * max(SPACING_MM[1:])) if one.unit == "mm" else (1.0, 0.5)
        assert other.value == pytest.approx(factor * one.value, abs=slack)


# --- Synthetic scans ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series():
    """What is measured on the reference labels of four series of unlike kinds, and all that is known of them."""
    path = Path(__file__).parents[1] / "conf/base/parameters_synthesize.yml"
    chosen = yaml.safe_load(path.read_text())["synthesize"]
    for kind in chosen["acquisition"].values():
        kind["samples"] = 1  # of the image, which nobody looks at
    plans = {plan.name: plan for plan in phantom.plan_cohort(chosen | {"sequences": {"t1": 1, "t2": 1, "t2_SPACE": 1}})}
    return [
        (plan, measure(to_sagittal(phantom.render(plan, chosen)[1])[0]), phantom.anatomy(plan, chosen))
        for plan in (plans["1_t1"], plans["9_t2"], plans["3_t2_SPACE"], plans["3_t1"])
    ]


def test_the_series_are_of_unlike_kinds(series):
    plans = [plan for plan, *_ in series]
    assert {plan.sequence for plan in plans} == {"t1", "t2", "t2_SPACE"}
    assert len({plan.storage_order for plan in plans}) > 2
    assert max(plan.spacing_mm[0] for plan in plans) > 4 > 1 > min(plan.spacing_mm[0] for plan in plans)
    assert len({plan.vertebrae for plan in plans}) > 1


def test_lengths_of_synthetic_scans_are_right_to_one_pixel(series):
    checked, errors = 0, []
    for plan, measured, known in series:
        pixel_mm = max(plan.spacing_mm[1:])
        for found in measured[:-1]:
            parts = known["vertebrae" if found.structure == "vertebra" else "discs"]
            if math.isnan(found.value):
                # Only what the upper edge cuts lacks a value.
                assert found.number > plan.whole_vertebrae and found.note == "cut by the image's edge"
                continue
            error = found.value - parts[found.number - 1][found.quantity]["mm"]
            assert abs(error) < pixel_mm, (plan.name, found)
            errors.append(error / pixel_mm)
            checked += 1
    assert checked > 250
    # Not by luck: on average, it is a small part of a pixel.
    assert np.mean(np.abs(errors)) < 0.2
    assert abs(np.mean(errors)) < 0.05


def test_the_lordosis_of_synthetic_scans_is_right_to_two_degrees(series):
    for plan, (*_, found), known in series:
        lowest, highest = known["vertebrae"][0], known["vertebrae"][4]
        assert (lowest["level"], highest["level"]) == ("L5", "L1")
        assert found.value == pytest.approx(lowest["lower_tilt_deg"] - highest["upper_tilt_deg"], abs=2.0), plan.name
        assert found.note.startswith("upper endplate of vertebra 5 to lower endplate of vertebra 1")
