"""Several images in work at once, and their rows in order, without torch."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 4
"""Threads, however many cores there are: each may hold a large image."""


def in_order(
    work: Callable[[Item], Result],
    take: Callable[[Result], object],
    items: Iterable[Item],
    threads: int | None = None,
) -> None:
    """Works on several items at once, and takes each result as soon as it and all before it are there.

    What decodes, resizes or runs a graph holds no lock of Python's, so that threads are enough. At most twice as many
    items are begun as threads work, and no further one where an error comes; those begun are ended first.

    Args:
        work: on an item; several threads call it at once.
        take: takes a result; one thread calls it, in the order of the items.
        items: the calling thread may wait for the next one while results are taken.
        threads: that work; by default one per core, and at most `MOST`.

    Raises:
        Exception: what `work`, `take` or `items` raise first, in the order of the items; no later result is taken.

    Example:
        >>> in_order(abs, print, [-1, 2])
        1
        2
    """
    count = min(MOST, threads or os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as workers, ThreadPoolExecutor(1) as taker:
        begun: deque[Future[None]] = deque()

        def hand_on(before: Future[None] | None, result: Future[Result]) -> None:
            """Takes a result when it is there, unless taking the one before ended in an error."""
            if before is not None:
                before.result()
            take(result.result())

        for item in items:
            begun.append(taker.submit(hand_on, begun[-1] if begun else None, workers.submit(work, item)))
            while begun and (len(begun) == 2 * count or begun[0].done()):
                begun.popleft().result()
        for future in begun:
            future.result()
