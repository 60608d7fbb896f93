"""Progress of long work: a bar in terminals and notebooks, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
LOG_EVERY_S = 10.0


def progress(
    items: Iterable[T],
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield `items`, showing progress: a bar in a terminal or notebook, elsewhere a log line per 10 %.

    Log lines are at least `LOG_EVERY_S` apart, so that short work logs nothing. `total` is in `unit`; `size`
    returns how many units an item has.
    """
    total = total if total is not None else _length(items)
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=desc, unit=unit, leave=False) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    yield from _logged(items, total, desc, unit, size)


def _length(items: Iterable[Any]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None


def _logged(
    items: Iterable[T], total: int | None, desc: str, unit: str, size: Callable[[T], int]
) -> Iterator[T]:
    tenths = done = 0
    start = said = time.monotonic()
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if total and done * 10 // total > tenths and now - said >= LOG_EVERY_S:
            tenths, said = done * 10 // total, now
            rate = done / (now - start)
            left = (total - done) / rate
            logger.info("%s: %d of %d %s, %.3g a second, %.0f s left", desc, done, total, unit, rate, left)
