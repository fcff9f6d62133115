"""Raw label ids to classes in one pass; whatever the table does not name is told."""

from __future__ import annotations

import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.labels import CLASSES, FOREGROUND, MISSED, PALETTE, LabelTable, UnknownLabelError, class_counts

SPIDER = {"vertebrae": ["1-25", "101-125"], "canal": [100], "IVD": ["201-225"]}


def test_the_table_of_spider():
    ids = np.array([[0, 1, 25], [100, 101, 125], [201, 225, 0]], np.int16)
    classes = LabelTable(SPIDER).classes(ids)
    assert classes.tolist() == [[0, 1, 1], [2, 1, 1], [3, 3, 0]]
    assert classes.dtype == np.uint8


def test_no_id_is_mapped_twice():
    # Chaining 201 -> 3, then 3 -> 1, turns a disc into a vertebra.
    table = LabelTable({"vertebrae": [3], "canal": [1, 2], "IVD": [201]})
    assert table.classes(np.array([201, 3, 2, 1, 0])).tolist() == [3, 1, 2, 2, 0]


@given(st.permutations(range(1, 30)), st.integers(1, 10), st.integers(11, 20))
def test_every_id_becomes_its_own_class_whatever_the_ids(ids, first, second):
    parts = {"vertebrae": ids[:first], "canal": ids[first:second], "IVD": ids[second:]}
    expected = {i: CLASSES.index(name) for name, part in parts.items() for i in part} | {0: 0}
    raw = np.arange(30)
    assert LabelTable(parts).classes(raw).tolist() == [expected[i] for i in raw]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_any_integers_will_do(dtype):
    assert LabelTable(SPIDER).classes(np.array([0, 25, 100, 225], dtype)).tolist() == [0, 1, 2, 3]


def test_unknown_ids_are_all_listed():
    ids = np.array([[26, 0, 300], [-4, 26, 100], [1, 200, 99]])
    with pytest.raises(UnknownLabelError, match=r"unknown label ids \[-4, 26, 99, 200, 300\]") as caught:
        LabelTable(SPIDER).classes(ids)
    assert caught.value.ids == [-4, 26, 99, 200, 300]
    assert pickle.loads(pickle.dumps(caught.value)).ids == caught.value.ids
    # Alone, too: within the table's reach, below it (an index from the end!) and beyond.
    for unknown in (26, -1, 226):
        with pytest.raises(UnknownLabelError, match=rf"\[{unknown}\]"):
            LabelTable(SPIDER).classes(np.array([unknown, 0]))


def test_an_empty_array_has_no_unknown_ids():
    assert LabelTable(SPIDER).classes(np.zeros((0, 3), np.int16)).shape == (0, 3)


def test_the_table_written_out():
    table = LabelTable({"IVD": ["7-8", 3, "3"], "background": [9]})
    assert table.to_dict() == {"background": [0, 9], "vertebrae": [], "canal": [], "IVD": [3, 7, 8]}


@pytest.mark.parametrize("twice", [{"vertebrae": ["1-25"], "IVD": [20]}, {"vertebrae": [20], "IVD": ["1-25"]}])
def test_an_id_of_two_classes_is_an_error(twice):
    with pytest.raises(ValueError, match="gives id 20 to both 'vertebrae' and 'IVD'; expected one class per id"):
        LabelTable(twice)


def test_zero_is_background():
    with pytest.raises(ValueError, match="gives id 0 to both 'background' and 'canal'"):
        LabelTable({"canal": [0]})


def test_unknown_classes_are_an_error():
    with pytest.raises(
        ValueError, match=r"names the classes \['disc'\]; expected names from \['background', .*'IVD'\]"
    ):
        LabelTable({"disc": [201]})


@pytest.mark.parametrize("entry", ["25-1", "-1", -1, "1-", "a", "1-2-3", 65536, "1-70000", 1.5, None])
def test_entries_that_are_no_ids_are_an_error(entry):
    with pytest.raises(ValueError, match=r"holds .*; expected an id from 0 to 65535 or a range like '101-125'"):
        LabelTable({"canal": [entry]})


def test_class_counts_by_hand():
    classes = np.array([[[0, 1], [1, 3]], [[0, 0], [0, 0]], [[2, 2], [3, 2]]], np.uint8)
    counts = class_counts(classes)
    assert counts.tolist() == [[1, 2, 0, 1], [4, 0, 0, 0], [0, 0, 3, 1]]
    assert counts.dtype == np.int64


# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency"
# (doi 10.1109/TVCG.2009.113): linear RGB as seen with a severity of 1.
MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# From linear sRGB to CIE XYZ (IEC 61966-2-1).
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour: str, vision: str) -> np.ndarray:
    """CIE L*a*b* of "#RRGGBB" as it is seen."""
    encoded = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(MACHADO[vision]) @ linear, 0, 1)
    share = (XYZ @ seen) / XYZ.sum(axis=1)
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_lightness_and_hue_of_known_colours():
    # Published values of sRGB's white, mid grey and red; who lacks the red cones sees red as dark.
    np.testing.assert_allclose(lab("#FFFFFF", "normal"), [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab("#808080", "normal"), [53.59, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab("#FF0000", "normal"), [53.24, 80.09, 67.20], atol=0.01)
    assert lab("#FF0000", "protanopia")[0] < 45


@pytest.mark.parametrize("vision", MACHADO)
def test_colours_are_told_apart_with_every_colour_blindness(vision):
    # A distance of 2.3 is just noticed. The closest are canal and green for tritanopia (16.1), orange and pink for the
    # same (17.2); and against grey, green and pink for deuteranopia (9.6 and 11.8).
    colours = {name: PALETTE[name] for name in CLASSES[1:]} | {"missed": MISSED}
    assert len(colours) == len(FOREGROUND) + 1
    places = {name: lab(colour, vision) for name, colour in colours.items()}
    for one, other in combinations(places, 2):
        assert np.linalg.norm(places[one] - places[other]) > 15, (one, other)
    for name, place in places.items():
        assert np.linalg.norm(place - lab("#808080", vision)) > 9, name
