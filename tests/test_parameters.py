from __future__ import annotations

import pytest

from lumbarflow.parameters import check_lists, check_names


def test_a_misspelt_setting_is_named_with_those_allowed():
    check_names({"seed": 1}, ("seed", "method"), "split")
    with pytest.raises(ValueError, match=r"unknown setting split.metod; expected some of \['seed', 'method'\]"):
        check_names({"seed": 1, "metod": "slice"}, ("seed", "method"), "split")


def test_a_single_value_is_no_list():
    defaults = {"preprocess": {"size": [128, 128], "keep_aspect": True}, "tune": {"space": {"x": {"low": 0.1}}}}
    check_lists({"preprocess": {"size": [96, 64], "new": 1}, "seed": 1}, defaults)
    check_lists({"preprocess": {"size": None, "keep_aspect": [1]}, "tune": {"space": {"x": None}}}, defaults)
    for value in (96, "96"):
        expected = rf"preprocess.size is {value!r}; expected a list such as \[128, 128\]. --params takes none"
        with pytest.raises(ValueError, match=expected):
            check_lists({"preprocess": {"size": value}}, defaults)
