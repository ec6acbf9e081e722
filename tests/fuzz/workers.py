"""Processes that run cases, so that one that hangs or dies is a failure like any other; imports are paid once."""

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.cases import Outcome, open_family, run_case, run_valid

PATIENCE = 120  # seconds of waiting for a case, on a machine that others may share
GUARD = 4 << 30  # bytes of address space beyond what a worker starts with


def work(family: str, folder: Path, pipe: Connection) -> None:
    """Runs the cases whose numbers come through the pipe."""
    kinds = open_family(family, folder / "shared")
    run_valid(kinds, folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GUARD, resource.RLIM_INFINITY))
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        pipe.send(run_case(family, kinds, number, folder))


class Worker:
    """A process that runs cases; started anew after one that hangs or ends it."""

    def __init__(self, family: str, folder: Path):
        self._family, self._folder, self._process = family, folder, None

    def run(self, number: int) -> Outcome:
        if self._process is None:
            self._start()
        self._pipe.send(number)
        problem = f"no answer in {PATIENCE} s"
        try:
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
        except EOFError:
            self._process.join(10)
            problem = f"the process ended with code {self._process.exitcode}"
        self.stop()
        return Outcome(number, "", "", problem, PATIENCE, 0)

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=work, args=(self._family, self._folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def stop(self, wait: float = 0.0) -> None:
        """Ends the process, after `wait` seconds to end by itself."""
        if self._process is not None:
            if wait:
                self._pipe.send(None)
                self._process.join(wait)
            self._process.kill()
            self._process.join()
            self._process = None
