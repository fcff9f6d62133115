from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow.selection import (
    IMBALANCE_RULES,
    compare_rules,
    highest_over_lowest,
    index_slices,
    largest_share,
    lowest_over_highest,
)

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


def test_the_preprints_ratio_is_infinite_where_a_class_is_missing():
    counts = np.array([[99, 50, 5, 20], [1, 0, 3, 6], [7, 0, 0, 0], [0, 4, 4, 4]])
    np.testing.assert_allclose(highest_over_lowest(counts), [10.0, np.inf, np.inf, 1.0])


def test_the_largest_share_is_of_the_foreground_and_has_no_value_without_one():
    counts = np.array([[99, 50, 5, 20], [1, 0, 3, 6], [7, 0, 0, 0], [0, 4, 4, 4]])
    np.testing.assert_allclose(largest_share(counts), [50 / 75, 6 / 9, np.nan, 1 / 3])


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(4)), elements=st.integers(0, 10**6)))
def test_the_three_readings_stay_in_their_ranges_and_look_at_the_foreground_alone(counts):
    journal, preprint, share = (measure(counts) for measure in IMBALANCE_RULES.values())
    foreground = counts[:, 1:].any(axis=1)
    assert np.all((journal >= 0) & (journal <= 1)) and np.all(preprint >= 1)
    np.testing.assert_array_equal(np.isnan(share), ~foreground)
    assert np.all((share[foreground] >= 1 / 3) & (share[foreground] <= 1))
    np.testing.assert_allclose(journal[journal > 0] * preprint[journal > 0], 1.0)
    more = counts + [7, 0, 0, 0]
    for measure in IMBALANCE_RULES.values():
        np.testing.assert_array_equal(measure(more), measure(counts))


def test_slices_with_fewer_classes_are_left_out_and_stay_in_the_table():
    index = index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS)
    assert index["kept"].tolist() == [True, False, True, True]
    assert index["reason"].tolist() == ["", "fewer than 4 classes", "", ""]
    assert index["classes_present"].tolist() == [4, 3, 4, 4]
    assert index["pixels_canal"].tolist() == [5, 0, 6, 8]


def test_the_55_percent_rule_drops_what_lies_above():
    index = index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "lowest_over_highest"})
    assert index["reason"].tolist() == ["", "fewer than 4 classes", "lowest_over_highest above 0.55", ""]


def test_the_chosen_reading_stands_in_the_table_and_decides():
    # Shares of the largest class: 50 / 75, 30 / 40, 10 / 24 and 40 / 68.
    index = index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "largest_share"})
    np.testing.assert_allclose(index["imbalance"], [50 / 75, 30 / 40, 10 / 24, 40 / 68])
    above = "largest_share above 0.55"
    assert index["reason"].tolist() == [above, "fewer than 4 classes", "", above]


def test_the_preprints_ratio_leaves_nothing_below_a_limit_of_55_percent():
    with pytest.raises(ValueError, match=r"leaves train empty .*'highest_over_lowest above 0.55': 3"):
        index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "highest_over_lowest"})


@pytest.mark.parametrize("rule", ["lowest_over_highest", "largest_share"])
def test_a_slice_without_foreground_is_left_to_the_filter_of_classes(rule):
    counts = np.array([[100, 0, 0, 0], [10, 10, 5, 5]])
    split = table(("s", 0, "train"), ("s", 1, "train"))
    index = index_slices(split, {"s": counts}, SETTINGS | {"minimum_classes": 1, "imbalance_rule": rule})
    assert index["kept"].tolist() == [True, True]


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


# Five slices that all pass the other filters; the first three stand on two sides, as under split.validation_is_test.
TWO_SIDES = table(
    *[("s", i, side) for i in range(3) for side in ("test", "validation")], ("s", 3, "train"), ("s", 4, "train")
)
ALIKE = {"s": np.array([[10, 50, 5, 20]] * 5)}


@pytest.mark.parametrize("seed", range(6))
def test_the_cap_counts_slices_over_all_filtered_sides_and_each_once(seed):
    settings = SETTINGS | {"sides": ["train", "validation", "test"], "slices_per_sequence": 4, "seed": seed}
    index = index_slices(TWO_SIDES, ALIKE, settings)
    kept = index[index["kept"]]
    assert kept["slice"].nunique() == 4
    assert (index.groupby("slice")["kept"].nunique() == 1).all()
    assert set(index.loc[~index["kept"], "reason"]) == {"beyond 4 slices of its sequence"}


def test_the_cap_leaves_the_sides_alone_that_are_not_filtered():
    settings = SETTINGS | {"sides": ["train", "validation"], "slices_per_sequence": 3}
    index = index_slices(TWO_SIDES, ALIKE, settings)
    assert index.loc[index["side"] == "test", "kept"].all()
    assert index.loc[index["side"] != "test", "kept"].sum() == 3


def test_the_cap_tells_slices_of_the_same_number_in_two_series_apart():
    split = table(*[(name, i, "train") for name in "su" for i in range(3)])
    index = index_slices(split, {"s": COUNTS[[0, 2, 3]], "u": COUNTS[[0, 2, 3]]}, SETTINGS | {"slices_per_sequence": 5})
    assert index["kept"].sum() == 5


def test_the_readings_side_by_side():
    # s is the t2 series of COUNTS, its slice 1 short of a class; u a t1 series of one slice that stands on two sides.
    split = pd.concat([ONE_SERIES, table(("u", 0, "test"), ("u", 0, "validation")).assign(sequence="t1")])
    counts = {"s": COUNTS, "u": np.array([[7, 30, 20, 10]])}
    counted = ["considered", "kept", "dropped", "undefined"]
    columns = ["rule", "sequence", "limit", *counted, "minimum", "median", "maximum"]
    expected = pd.DataFrame(
        [
            ("lowest_over_highest", "t1", 0.55, 1, 1, 0, 0, 1 / 3, 1 / 3, 1 / 3),
            ("lowest_over_highest", "t2", 0.55, 3, 2, 1, 0, 0.1, 0.2, 0.6),
            ("lowest_over_highest", "all", 0.55, 4, 3, 1, 0, 0.1, (0.2 + 1 / 3) / 2, 0.6),
            ("highest_over_lowest", "t1", 0.55, 1, 0, 1, 0, 3.0, 3.0, 3.0),
            ("highest_over_lowest", "t2", 0.55, 3, 0, 3, 0, 10 / 6, 5.0, 10.0),
            ("highest_over_lowest", "all", 0.55, 4, 0, 4, 0, 10 / 6, 4.0, 10.0),
            ("largest_share", "t1", 0.55, 1, 1, 0, 0, 0.5, 0.5, 0.5),
            ("largest_share", "t2", 0.55, 3, 1, 2, 0, 10 / 24, 40 / 68, 50 / 75),
            ("largest_share", "all", 0.55, 4, 2, 2, 0, 10 / 24, (0.5 + 40 / 68) / 2, 50 / 75),
        ],
        columns=columns,
    )
    for rule, cap in [(None, None), ("lowest_over_highest", None), (None, 1)]:
        settings = SETTINGS | {"imbalance_rule": rule, "slices_per_sequence": cap}
        index = index_slices(split.reset_index(drop=True), counts, settings)
        pd.testing.assert_frame_equal(compare_rules(index, settings), expected)


def test_the_readings_count_what_they_cannot_measure_and_name_a_sequence_without_slices():
    split = pd.concat([table(("s", 0, "train"), ("s", 1, "train")), table(("u", 0, "train")).assign(sequence="t1")])
    counts = {"s": np.array([[9, 0, 0, 0], [0, 0, 4, 4]]), "u": np.array([[0, 0, 0, 0]])}
    settings = SETTINGS | {"minimum_classes": 1}
    table_of_rules = compare_rules(index_slices(split.reset_index(drop=True), counts, settings), settings).set_index(
        ["rule", "sequence"]
    )
    numbers = ["considered", "kept", "dropped", "undefined"]
    for rule, (kept, dropped, undefined) in zip(IMBALANCE_RULES, [(2, 0, 0), (0, 2, 0), (2, 0, 1)], strict=True):
        assert table_of_rules.loc[(rule, "t1"), numbers].tolist() == [0, 0, 0, 0]
        assert table_of_rules.loc[(rule, "t2"), numbers].tolist() == [2, kept, dropped, undefined]
        assert np.isnan(table_of_rules.loc[(rule, "t1"), "median"])
    assert table_of_rules.loc[("highest_over_lowest", "all"), "median"] == np.inf
    assert table_of_rules.loc[("largest_share", "all"), "median"] == 0.5


def test_a_filter_that_empties_a_side_stops_the_run():
    with pytest.raises(ValueError, match=r"the slice filter leaves train empty .*Loosen filter.minimum_classes"):
        index_slices(table(("s", 1, "train")), {"s": COUNTS}, SETTINGS)


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"filter.imbalance_rule is 'share'; expected null or one of lowest_over"):
        index_slices(ONE_SERIES, {"s": COUNTS}, SETTINGS | {"imbalance_rule": "share"})
