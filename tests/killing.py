"""Commands that are killed, at a moment or at one of their calls that write: what the tests of interrupted runs share."""

import contextlib
import multiprocessing
import os
import threading
import time

from tqdm import tqdm

from saisa_hf.cli import main


# a server that has loaded everything and begun nothing: a run of it takes a second, all of which is the run's own
FORKS = multiprocessing.get_context("forkserver")


def take_locks_of_its_own(kind=tqdm):
    """Gives progress bars of every class locks of this process: the usual ones are shared by processes, and whoever is
    killed with one stops all others."""
    kind.set_lock(threading.RLock())
    for one in kind.__subclasses__():
        take_locks_of_its_own(one)


def run_command(command, calls, last, counted):
    """Runs `saisa` with the arguments `command` and ends the process; kills it at number `last` of its calls of the functions
    `counted` of `os`, which are counted in `calls`."""
    take_locks_of_its_own()
    for name in counted:
        setattr(os, name, _counting(getattr(os, name), calls, last))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        status = main(command)
    os._exit(status)


def _counting(call, calls, last):
    def counting(*arguments, **options):
        calls.value += 1
        if calls.value == last:
            os.kill(os.getpid(), 9)
        return call(*arguments, **options)

    return counting


def run_forked(work, *arguments, after=None, last=0, limit=120):
    """Calls `work(*arguments, calls, last)`, which ends in `run_command`, in a process of its own, and kills that `after` so
    many seconds. Returns (status, seconds, calls)."""
    calls = FORKS.Value("i", 0, lock=False)
    process = FORKS.Process(target=work, args=(*arguments, calls, last))
    begun = time.perf_counter()
    process.start()
    process.join(limit if after is None else after)
    if after is not None:
        process.kill()
        process.join()
    assert process.exitcode is not None, "hangs"
    return process.exitcode, time.perf_counter() - begun, calls.value
