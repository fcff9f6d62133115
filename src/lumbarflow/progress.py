"""Progress of loops that take long: a bar with rate and time left in a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


def track(items: Collection[Item], description: str, unit: str = "series") -> Iterator[Item]:
    """Iterate over `items`, telling how far it is.

    Args:
        items: anything with a length.
        description: what is being done, in a few words.
        unit: what one item is.
    """
    if not items:
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, unit=unit, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < len(items):
            last = now
            left = (now - start) / done * (len(items) - done)
            logger.info("%s: %d of %d %s, about %.0f s left", description, done, len(items), unit, left)
