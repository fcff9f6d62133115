"""Checks of settings that come from configuration files and command lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def check_names(settings: Mapping[str, Any], allowed: Iterable[str], section: str) -> None:
    """Stop at a misspelt setting; ignored, it would leave the default in force without a word.

    Raises:
        ValueError: names the setting, its section and what is allowed there.
    """
    allowed = list(allowed)
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(f"unknown setting {section}.{unknown[0]}; expected some of {allowed}.")


def check_lists(given: Mapping[str, Any], defaults: Mapping[str, Any], section: str = "") -> None:
    """Stop at a single value in the place of a list: the step that reads it could not tell what was meant.

    Args:
        given: of a run, in sections as in the files.
        defaults: of a file; names that it does not have are somebody else's.
        section: in front of the names, with a point.
    Raises:
        ValueError: names the setting and a list that would do.
    """
    for name, value in given.items():
        default = defaults.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            check_lists(value, default, f"{section}{name}.")
        elif (
            isinstance(default, list)
            and value is not None
            and (isinstance(value, str) or not isinstance(value, Sequence))
        ):
            raise ValueError(
                f"{section}{name} is {value!r}; expected a list such as {default}. --params takes none, because Kedro "
                "splits it at commas: write it to a file of the environment, such as conf/local/parameters_mine.yml."
            )
