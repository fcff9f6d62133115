"""Checks of settings that come from configuration files and command lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
