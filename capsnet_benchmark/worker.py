"""The process of one row: it does what it is told by lines of JSON, and reads the clock.

It is run by its path and imports no framework by itself, so that both are timed by the same code, and neither is loaded
beside the other. What is timed comes from the class `Work` of the module that the first line names.
"""

import importlib
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WARM_UP = 3  # calls that are not counted, after the first, which compiles
SHORTEST = 0.05  # seconds of a sample, against the resolution of clocks; of short calls it takes several


class Stopwatch:
    """Seconds of a call.

    Args:
        call: starts the work and returns what shows that it is done.
        block: waits for that.
        host_only: the clock stops when the call comes back, before the work is done.
    """

    def __init__(self, call: Callable[[], Any], block: Callable[[Any], None], *, host_only: bool = False):
        self._call, self._block, self._host_only = call, block, host_only
        self._repeats = 1

    def seconds(self) -> float:
        """How long the call takes; the mean over several, if it is short."""
        result = None
        start = time.perf_counter()
        for _ in range(self._repeats):
            result = self._call()
        if not self._host_only:
            self._block(result)
        stop = time.perf_counter()
        if self._host_only:
            self._block(result)
        return (stop - start) / self._repeats

    def warm_up(self) -> float:
        """Makes the calls that are not counted; returns the seconds of the first."""
        first = self.seconds()
        seconds = [self.seconds() for _ in range(WARM_UP)]
        if not self._host_only:  # many calls at once would fill the queue, and then the host waits, too
            self._repeats = max(1, math.ceil(SHORTEST / max(min(seconds), 1e-9)))
        return first


def serve(work: Any, commands: Iterable[dict[str, str]], reply: Callable[[dict[str, Any]], None]) -> None:
    """Answers each command, until there are no more.

    Commands are {"prepare": name of a measurement}, answered by the seconds of the first call; {"sample": the same
    name}, by the seconds of one more; {"peak_memory": ""}, by bytes; and {"tell": name of a method}, by what it
    returns.
    """
    stopwatches: list[tuple[Stopwatch, float]] = []
    for command in commands:
        ((verb, name),) = command.items()
        if verb == "prepare":
            stopwatches = []  # what was measured before is let go of
            calls = work.prepare(name)
            stopwatches = [(Stopwatch(call, work.block, host_only=name == "dispatch"), times) for call, times in calls]
            first = sum(stopwatch.warm_up() for stopwatch, _ in stopwatches)
            work.warmed_up()
            reply({"seconds": first})
        elif verb == "sample":
            reply({"seconds": sum(times * stopwatch.seconds() for stopwatch, times in stopwatches)})
        elif verb == "tell":
            reply({"told": getattr(work, name)()})
        else:
            reply({"bytes": work.peak_device_memory() or peak_memory_of_process()})


def peak_memory_of_process() -> int | None:
    """The most bytes that this process had in memory so far; None if that is not known.

    The same as in `capsnet_jax.train.memory`, which cannot be imported here without JAX.
    """
    status = Path("/proc/self/status")
    # What `getrusage` tells on Linux is at least what the process had that started this one.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Serves the process that started this one, through standard input and output."""
    # Whatever a framework prints must not come between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=replies)

    try:
        job = json.loads(sys.stdin.readline())
        sys.path[:] = job["path"]
        work = importlib.import_module(job["module"]).Work(**job["arguments"])
        reply({"platform": work.platform, "device": work.device})
        serve(work, map(json.loads, sys.stdin), reply)
    except Exception as error:  # anything that a framework may raise
        traceback.print_exc()
        kind = type(error).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reply({"error": ": ".join([kind, *lines[:1]] if kind != "UsageError" else lines)})


if __name__ == "__main__":
    main()
