"""Independent jobs in several processes, with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from tqdm import tqdm

J = TypeVar("J")
R = TypeVar("R")


def in_parallel(
    function: Callable[[J], R], jobs: Iterable[J], *, total: int, workers: int, what: str
) -> Iterator[tuple[int, R]]:
    """Number and result of each job, as they are finished; the first error ends it.

    Args:
        function: of a module, as other processes have to find it.
        jobs: arguments; drawn a few at a time, so that they need not all be in memory.
        total: number of jobs.
        workers: processes; 0 runs all of them in this one, in order.
        what: is done, for the progress bar.
    """
    with tqdm(total=total, desc=what, unit="image") as progress:
        for item in _run(function, jobs, workers):
            progress.update()
            yield item


def _run(function: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[tuple[int, R]]:
    todo = enumerate(jobs)
    if workers == 0:
        yield from ((number, function(job)) for number, job in todo)
        return
    with ProcessPoolExecutor(workers, _context(function), initializer=_one_thread) as pool:
        waiting: dict[Future[Any], int] = {}
        try:
            while True:
                while len(waiting) < 2 * workers and (item := next(todo, None)) is not None:
                    waiting[pool.submit(function, item[1])] = item[0]
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _context(function: Callable[..., Any]) -> BaseContext:
    """Not plain forks, which OpenCV's and torch's threads do not survive: forks of a process that
    has imported the function's module and done nothing else, where there is such a thing."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    return context


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)  # a process for each core is enough
