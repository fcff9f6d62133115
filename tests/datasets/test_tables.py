"""A table that may not be there."""

from __future__ import annotations

import pandas as pd

from lumbarflow.datasets import OptionalCSVDataset


def test_an_absent_table_is_empty(tmp_path):
    dataset = OptionalCSVDataset(filepath=str(tmp_path / "overview.csv"))
    assert dataset.load().empty and not dataset.exists()


def test_a_table_that_is_there_is_loaded_with_its_options(tmp_path):
    path = tmp_path / "overview.csv"
    path.write_text("new_file_name,subset,number\n1_t2,training,007\n2_t2,,\n")
    dataset = OptionalCSVDataset(filepath=str(path), load_args={"dtype": str, "keep_default_na": False})
    assert dataset.load().to_dict("records") == [
        {"new_file_name": "1_t2", "subset": "training", "number": "007"},
        {"new_file_name": "2_t2", "subset": "", "number": ""},
    ]


def test_a_table_that_comes_later_is_seen(tmp_path):
    dataset = OptionalCSVDataset(filepath=str(tmp_path / "overview.csv"), save_args={"index": False})
    assert dataset.load().empty
    dataset.save(pd.DataFrame({"a": [1, 2]}))
    assert dataset.load()["a"].tolist() == [1, 2]
