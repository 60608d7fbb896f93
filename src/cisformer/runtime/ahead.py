"""Work done ahead of its use, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], n_threads: int, *, waiting: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` of each item, in order, while threads work on the next ones.

    Parameters
    ----------
    function
        Called in a thread; numpy and torch let several run at once.
    items
        Taken one by one in the caller's thread, no earlier than they are worked on.
    n_threads
        Number of threads; 0 to work in the caller's.
    waiting
        Most results that wait for their use; twice the threads by default.
    """
    if n_threads == 0:
        yield from map(function, items)
        return
    most = 2 * n_threads if waiting is None else waiting
    with ThreadPoolExecutor(n_threads) as pool:
        futures: deque[Future[Result]] = deque()
        try:
            for item in items:
                futures.append(pool.submit(function, item))
                if len(futures) > most:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:  # after an error, or where the caller stops, what waits is not begun
            for future in futures:
                future.cancel()
