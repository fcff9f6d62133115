from __future__ import annotations

import logging

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.split import check_split, split_slices

SETTINGS = {
    "method": "patient",
    "seed": 3,
    "validation_fraction": 0.2,
    "test_fraction": 0.2,
    "validation_is_test": False,
}


def cohort(*series: tuple[str, str, int], subset: dict[str, str] | None = None) -> pd.DataFrame:
    """(patient, sequence, number of slices), ... -> series index."""
    return pd.DataFrame(
        {
            "series": [f"{patient}_{sequence}" for patient, sequence, _ in series],
            "patient": [patient for patient, _, _ in series],
            "sequence": [sequence for _, sequence, _ in series],
            "subset": [(subset or {}).get(patient, "") for patient, _, _ in series],
            "n_slices": [n for _, _, n in series],
        }
    )


def patients_of(split: pd.DataFrame, side: str) -> set[str]:
    return set(split.loc[split["side"] == side, "patient"])


def test_every_slice_of_every_series_is_on_exactly_one_side():
    index = cohort(("a", "t1", 2), ("a", "t2", 3), ("b", "t1", 1), ("c", "t2", 4), ("d", "t2", 2), ("e", "t1", 5))
    split = split_slices(index, SETTINGS)
    expected = [(row.series, i) for row in index.itertuples() for i in range(row.n_slices)]
    assert sorted(zip(split["series"], split["slice"], strict=True)) == sorted(expected)


@given(
    st.lists(st.sampled_from(["t1", "t2", "t1+t2", "t2_SPACE"]), min_size=5, max_size=40),
    st.integers(0, 2**16),
    st.floats(0.05, 0.35),
    st.floats(0.05, 0.35),
)
def test_patients_stay_whole_and_sides_have_their_size(kinds, seed, validation, test):
    series = [(f"p{i}", sequence, 2) for i, kind in enumerate(kinds) for sequence in kind.split("+")]
    settings = SETTINGS | {"seed": seed, "validation_fraction": validation, "test_fraction": test}
    split = split_slices(cohort(*series), settings)
    sides = {side: patients_of(split, side) for side in ("train", "validation", "test")}
    assert sum(map(len, sides.values())) == len(kinds) == len(set.union(*sides.values()))
    assert len(sides["validation"]) == max(1, round(validation * len(kinds)))
    assert len(sides["test"]) == max(1, round(test * len(kinds)))


def test_sequences_are_balanced_over_the_sides():
    # 10 patients with T1 only and 10 with T2 only; a fifth of each belongs on the test side.
    index = cohort(*[(f"{i:02}", "t1" if i < 10 else "t2", 1) for i in range(20)])
    for seed in range(5):
        split = split_slices(index, SETTINGS | {"seed": seed})
        counts = split[split["side"] == "test"]["sequence"].value_counts()
        assert counts.to_dict() == {"t1": 2, "t2": 2}


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_rows():
    index = cohort(*[(str(i), "t2", 2) for i in range(12)])
    first = split_slices(index, SETTINGS)
    shuffled = split_slices(index.sample(frac=1, random_state=1), SETTINGS)
    other = split_slices(index, SETTINGS | {"seed": 4})
    pd.testing.assert_frame_equal(first, shuffled)
    assert patients_of(first, "test") != patients_of(other, "test")


def test_the_official_validation_patients_are_the_test_patients():
    subset = dict.fromkeys("abcdefgh", "training") | {"x": "validation", "y": "validation"}
    index = cohort(*[(patient, "t2", 2) for patient in subset], subset=subset)
    split = split_slices(index, SETTINGS | {"method": "official", "validation_fraction": 0.25})
    assert patients_of(split, "test") == {"x", "y"}
    assert len(patients_of(split, "validation")) == 2
    assert len(patients_of(split, "train")) == 6


def test_a_series_without_a_row_follows_its_patient():
    subset = dict.fromkeys("abcd", "training") | {"x": "validation"}
    index = cohort(*[(patient, "t2", 1) for patient in subset], ("x", "t1", 1), ("new", "t1", 1), subset=subset)
    index.loc[index["series"] == "x_t1", "subset"] = ""
    split = split_slices(index, SETTINGS | {"method": "official"})
    assert set(split.loc[split["patient"] == "x", "side"]) == {"test"}
    assert not set(split.loc[split["patient"] == "new", "side"]) & {"test"}


def test_an_empty_official_test_side_says_so():
    index = cohort(*[(patient, "t2", 1) for patient in "abcde"], subset=dict.fromkeys("abcde", "training"))
    with pytest.raises(ValueError, match=r"leaves test empty.*subset is 'validation'.*split.method=patient"):
        split_slices(index, SETTINGS | {"method": "official"})


def test_a_patient_in_both_subsets_is_an_error():
    index = cohort(("a", "t1", 1), ("a", "t2", 1), ("b", "t1", 1))
    index["subset"] = ["training", "validation", "training"]
    with pytest.raises(ValueError, match=r"puts 1 patients into both"):
        split_slices(index, SETTINGS | {"method": "official"})


def test_too_few_patients_leave_a_side_empty():
    with pytest.raises(ValueError, match=r"leaves train empty"):
        split_slices(cohort(("a", "t1", 3), ("b", "t1", 3)), SETTINGS)


def test_the_slice_split_warns_and_takes_a_share_of_slices(caplog):
    index = cohort(("a", "t1", 10), ("b", "t1", 10))
    with caplog.at_level(logging.WARNING):
        split = split_slices(index, SETTINGS | {"method": "slice", "test_fraction": 0.1})
    assert "split by slice" in caplog.text
    assert split["side"].value_counts().to_dict() == {"train": 14, "validation": 4, "test": 2}


def test_the_papers_slice_split_validates_on_its_test_slices():
    settings = SETTINGS | {"method": "slice", "test_fraction": 0.1, "validation_is_test": True}
    split = split_slices(cohort(("a", "t1", 10), ("b", "t1", 10)), settings)
    sides = {side: set(zip(rows["series"], rows["slice"], strict=True)) for side, rows in split.groupby("side")}
    assert sides["validation"] == sides["test"]
    assert len(sides["test"]) == 2
    assert len(sides["train"]) == 18
    assert not sides["train"] & sides["test"]


def test_validation_on_test_slices_is_refused_when_splitting_by_patient():
    with pytest.raises(ValueError, match=r"validation_is_test goes with split.method 'slice' only, not 'patient'"):
        split_slices(cohort(("a", "t1", 1)), SETTINGS | {"validation_is_test": True})


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"split.method is 'random'; expected one of patient, official, slice"):
        split_slices(cohort(("a", "t1", 1)), SETTINGS | {"method": "random"})


def test_a_leaked_patient_stops_the_run_without_being_named():
    split = pd.DataFrame({"patient": ["Doe", "Doe", "b", "c"], "side": ["train", "test", "validation", "test"]})
    with pytest.raises(ValueError, match=r"1 patients stand on more than one side") as caught:
        check_split(split, leaky=False)
    assert "Doe" not in str(caught.value)
    check_split(split, leaky=True)
