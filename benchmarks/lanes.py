"""The processes of a run, one a lane: a case that ends its process fails, and its lane goes on with another process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue

from benchmarks.run_folder import Row, RunError
from benchmarks.worker import Settings, begin, lost, row_of_death, work

Task = tuple[str, str, str]
"""Method, kind and id of a case."""
MOST_DEATHS = 3
"""Cases in a row that may end a lane's process: more are no failures of the method."""


class Lane:
    """A process with the model on a device, begun when first used, and again when it is gone or the device lost to it.

    Not for two threads at once.
    """

    def __init__(self, settings: Settings, device: str, fingerprint: str) -> None:
        self.settings, self.device, self.fingerprint = settings, device, fingerprint
        self.pool: ProcessPoolExecutor | None = None
        self.deaths = 0

    def row(self, task: Task) -> Row:
        """The row of a case, in the process. Raises `RunError` where none can be begun, and where one dies time after time."""
        row = None
        running = self._submitted(task)
        try:
            row = running.result()
            if "error" not in row or not self.pool.submit(lost, self.device).result():
                self.deaths = 0
                return row
        except BrokenProcessPool:
            # Of a pool of one process this case alone was being run.
            row = row or row_of_death(self.settings, self.device, self.fingerprint, *task)
        self.close()
        self.deaths += 1
        if self.deaths == MOST_DEATHS:
            raise RunError(
                f"processes on {self.device} died in {MOST_DEATHS} cases in a row (out of memory? try fewer --processes); "
                "what is done is kept, the same command goes on, with --retry over the cases that died"
            )
        return row

    def close(self) -> None:
        """End the process, after what it is doing."""
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None

    def _submitted(self, task: Task) -> Future[Row]:
        if self.pool is not None:
            try:
                return self.pool.submit(work, *task)
            except BrokenProcessPool:
                # It died between two cases, which is no fault of this one.
                self.close()
        self.pool = self._begun()
        return self.pool.submit(work, *task)

    def _begun(self) -> ProcessPoolExecutor:
        spawning = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, spawning, begin, (self.settings, self.device))
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            pool.shutdown()
            raise RunError(
                f"a process of the run on {self.device} died before its first case (out of memory? try fewer --processes); "
                "what is done is kept, the same command goes on"
            ) from error
        return pool


def in_lanes(
    settings: Settings, tasks: Sequence[Task], devices: Sequence[str], processes: int, fingerprint: str
) -> Iterator[Row]:
    """Rows of the tasks as they are done, by `processes` processes on each device; `fingerprint` is the model's."""
    lanes = [Lane(settings, device, fingerprint) for device in devices for _ in range(processes)]
    idle: SimpleQueue[Lane] = SimpleQueue()
    for lane in lanes:
        idle.put(lane)

    failures: list[Exception] = []

    def row(task: Task) -> Row | None:
        # What the other lanes are at when one ends the run is kept; nothing more is begun.
        if failures:
            return None
        lane = idle.get()
        try:
            return lane.row(task)
        except Exception as error:
            failures.append(error)
            return None
        finally:
            idle.put(lane)

    threads = ThreadPoolExecutor(len(lanes))
    try:
        for done in as_completed([threads.submit(row, task) for task in tasks]):
            if (found := done.result()) is not None:
                yield found
        if failures:
            raise failures[0]
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for lane in lanes:
            lane.close()
