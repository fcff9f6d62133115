"""The way back from a promotion."""

from __future__ import annotations

from typing import Any

from lumbarflow import registry


def put_former_champion_back(settings: dict[str, Any]) -> dict[str, Any]:
    """Give the alias back to the version that held it before."""
    return registry.rollback(settings)
