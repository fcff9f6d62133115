from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lumbarflow.selection import index_slices, lowest_over_highest

SETTINGS = {
    "sides": ["train"],
    "minimum_classes": 4,
    "imbalance_rule": None,
    "imbalance_limit": 0.55,
    "slices_per_sequence": None,
    "seed": 0,
}
# Background, vertebrae, canal, IVD; the ratios of the foreground are 0.1, none, 0.6 and 0.2.
COUNTS = np.array([[10, 50, 5, 20], [60, 30, 0, 10], [10, 10, 6, 8], [5, 40, 8, 20]])


def table(*rows: tuple[str, int, str]) -> pd.DataFrame:
    columns = ["series", "slice", "side"]
    return pd.DataFrame(rows, columns=columns).assign(patient="p", sequence="t2")


ONE_SERIES = table(*[("s", i, "train") for i in range(4)])


def test_the_ratio_is_of_the_foreground_classes():
    counts = np.array([[99, 50, 5, 20], [1, 0, 3, 6], [7, 0, 0, 0], [0, 4, 4, 4]])
    np.testing.assert_allclose(lowest_over_highest(counts), [0.1, 0.0, 0.0, 1.0])


def test_slices_with_fewer_classes_are_left_out_and_stay_in_the_table():
    index = index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS)
    assert index["kept"].tolist() == [True, False, True, True]
    assert index["reason"].tolist() == ["", "fewer than 4 classes", "", ""]
    assert index["classes_present"].tolist() == [4, 3, 4, 4]
    assert index["pixels_canal"].tolist() == [5, 0, 6, 8]


def test_the_55_percent_rule_drops_what_lies_above():
    index = index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "lowest_over_highest"})
    assert index["reason"].tolist() == ["", "fewer than 4 classes", "lowest_over_highest above 0.55", ""]


def test_only_the_named_sides_are_filtered():
    split = table(("s", 0, "train"), ("s", 1, "test"), ("s", 2, "validation"))
    index = index_slices(split, {"s": COUNTS}, SETTINGS)
    assert index["kept"].all()
    with pytest.raises(ValueError, match=r"leaves test empty \(\{'fewer than 4 classes': 1\}\)"):
        index_slices(split, {"s": COUNTS}, SETTINGS | {"sides": ["train", "test"]})


def test_the_cap_counts_what_the_other_filters_left_in_each_sequence():
    split = pd.concat([ONE_SERIES, table(*[("u", i, "train") for i in range(4)]).assign(sequence="t1")])
    split = split.reset_index(drop=True)
    settings = SETTINGS | {"slices_per_sequence": 2}
    index = index_slices(split, {"s": COUNTS, "u": COUNTS}, settings)
    assert index[index["kept"]].groupby("sequence").size().to_dict() == {"t1": 2, "t2": 2}
    assert (index["reason"] == "beyond 2 slices of its sequence").sum() == 2
    again = index_slices(split, {"s": COUNTS, "u": COUNTS}, settings)
    pd.testing.assert_frame_equal(index, again)


def test_a_filter_that_empties_a_side_stops_the_run():
    with pytest.raises(ValueError, match=r"the slice filter leaves train empty .*Loosen filter.minimum_classes"):
        index_slices(table(("s", 1, "train")), {"s": COUNTS}, SETTINGS)


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"filter.imbalance_rule is 'share'; expected null or one of lowest_over"):
        index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "share"})
