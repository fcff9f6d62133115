from __future__ import annotations

import pandas as pd
import pytest

from lumbarflow.provenance import (
    check_cohort,
    check_evaluation,
    check_ingested,
    check_labels,
    check_training,
    mark_table,
    unmarked_if_of,
)
from lumbarflow.store import SeriesStore, Work

MANIFEST = {"content_hash": "abcdef0123"}


def test_steps_that_belong_together_pass():
    check_training({"weights": "w", "content_hash": "abcdef0123"}, "w", MANIFEST)
    check_evaluation({"weights": "w", "content_hash": "abcdef0123"}, "w", MANIFEST)


def test_a_net_of_another_split_is_not_evaluated():
    with pytest.raises(ValueError, match=r"trained on the model input 99887766, and the one at hand is abcdef01"):
        check_training({"weights": "w", "content_hash": "9988776655"}, "w", MANIFEST)


def test_a_net_that_is_not_the_recorded_one_is_not_evaluated():
    with pytest.raises(ValueError, match=r"weights are not those that training_record describes"):
        check_training({"weights": "other", "content_hash": "abcdef0123"}, "w", MANIFEST)


@pytest.mark.parametrize(
    "summary", [{"weights": "x", "content_hash": "abcdef0123"}, {"weights": "w", "content_hash": "y"}]
)
def test_figures_of_another_net_or_other_data_are_not_registered(summary):
    with pytest.raises(ValueError, match=r"figures are of another model or other model input"):
        check_evaluation(summary, "w", MANIFEST)


def test_scans_or_a_split_of_something_else_are_not_reported():
    manifest = {"data_hash": "d1", "split_hash": "s1"}
    check_cohort("d1", "s1", manifest)
    with pytest.raises(ValueError, match=r"the scans at hand \(d2\) are not those of the model input \(d1\)"):
        check_cohort("d2", "s1", manifest)
    with pytest.raises(ValueError, match=r"the split at hand \(s2\) are not those"):
        check_cohort("d1", "s2", manifest)


def test_a_table_of_other_data_is_known_by_its_marks():
    table = pd.DataFrame({"class": ["canal", "IVD"], "dice": [0.9, 0.8]})
    marked = mark_table(table, data_hash="d", content_hash="s")
    pd.testing.assert_frame_equal(unmarked_if_of(marked, {"data_hash": "d", "content_hash": "s"}), table)
    assert unmarked_if_of(marked, {"data_hash": "other", "content_hash": "s"}) is None
    assert unmarked_if_of(marked, {"data_hash": "d", "content_hash": "other"}) is None
    assert unmarked_if_of(table, {"data_hash": "d", "content_hash": "s"}) is None, "it does not say"
    # A table need not carry all marks, and one that nobody has made yet is none of other data.
    half = unmarked_if_of(mark_table(table, data_hash="d"), {"data_hash": "d", "content_hash": "x"})
    pd.testing.assert_frame_equal(half, table)
    assert unmarked_if_of(pd.DataFrame(), {"data_hash": "d"}).empty


def test_series_that_were_ingested_with_other_labels_are_named():
    index = pd.DataFrame({"series": ["1_t1", "2_t1", "3_t1"], "labels_digest": ["d", "e", "e"]})
    check_labels(index.iloc[:1], "d")
    with pytest.raises(ValueError, match=r"2_t1 and 1 more series were ingested with another labels.table"):
        check_labels(index, "d")
    with pytest.raises(ValueError, match=r"1_t1 and 2 more series .* Run ingest, and what comes after it"):
        check_labels(index.drop(columns="labels_digest"), "d")


def test_series_that_were_ingested_anew_are_named(tmp_path):
    series = SeriesStore(tmp_path)
    series.update({name: Work(f"key of {name}", lambda: {"record.json": {}}) for name in ("1_t1", "2_t1")})
    check_ingested({"1_t1": "key of 1_t1"}, series, "the model input")
    with pytest.raises(ValueError, match=r"2_t1: the model input was made from another scan of this name, or from"):
        check_ingested({"1_t1": "key of 1_t1", "2_t1": "former"}, series, "the model input")
    with pytest.raises(ValueError, match="3_t1: the model input was made from"):
        check_ingested({"3_t1": "gone"}, series, "the model input")
