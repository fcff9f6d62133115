from __future__ import annotations

import pytest

from lumbarflow.parameters import check_names


def test_a_misspelt_setting_is_named_with_those_allowed():
    check_names({"seed": 1}, ("seed", "method"), "split")
    with pytest.raises(ValueError, match=r"unknown setting split.metod; expected some of \['seed', 'method'\]"):
        check_names({"seed": 1, "metod": "slice"}, ("seed", "method"), "split")
