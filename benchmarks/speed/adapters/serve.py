"""The side of an adapter: requests in JSON on standard input, answers on standard output.

An adapter calls ``serve(build, versions)`` (``**operations`` are requests of its own, functions of
their arguments). ``build(workload, rank)`` makes a network or tree,
collects ``rank + 1`` iterates and returns a dictionary of functions that wait for their results:

``collect()``                                    one collection
``sample(samples)``                              that many draws of all weights
``predict(samples, images, refresh, batch)``     average probabilities of that many random images
                                                 over samples, with BatchNorm statistics over
                                                 ``refresh`` images; only where there is a model

and ``parameters``, how many numbers the tree holds. Standard library alone: every peer runs it.
"""

import contextlib
import json
import os
import sys
import time

BLOCK = 0.05  # seconds that a timing lasts at the least, as in measure.py


def serve(build, versions, **operations):
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    handlers = _handlers(build) | {"versions": lambda: {"versions": versions}} | operations

    def answer(content):
        print(json.dumps(content), file=answers, flush=True)

    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(handlers[request.pop("operation")](**request))
        except Exception as error:  # whatever it is, the suite reports it and goes on
            answer({"error": f"{type(error).__name__}: {error}"[:500]})


def threads():
    """How many threads the suite allows: the last argument of the command."""
    return int(sys.argv[-1])


def peak_bytes():
    """Highest resident memory since the last ``reset_peak``, None where no system tells."""
    return _status("VmHWM")


def reset_peak():
    """Let ``peak_bytes`` start from the memory that is resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _handlers(build):
    built, calls = {}, {}

    def prepare(workload, rank):
        built.clear()
        calls.clear()
        built.update(build(workload, rank))
        return {"parameters": built["parameters"]}

    def seconds(of, **arguments):
        def call():
            built[of](**arguments)

        asked = (of, *arguments.values())
        if asked not in calls:
            first = _seconds(call, 1)  # compiles, fills caches
            typical = first if first > 1 else _seconds(call, 1)
            calls[asked] = max(1, round(BLOCK / typical))
        return {"seconds": _seconds(call, calls[asked]) / calls[asked]}

    def memory(workload, rank, steps):
        """Peak above idle while building, then in each of ``steps``: pairs of name, arguments."""
        idle = _status("VmRSS")
        peaks = {}
        reset_peak()
        prepare(workload, rank)
        peaks["collect"] = peak_bytes() - idle
        for name, arguments in steps:
            reset_peak()
            built[name](**arguments)
            peaks[name] = peak_bytes() - idle
        return {"idle": idle, "peaks": peaks}

    return {"prepare": prepare, "seconds": seconds, "memory": memory}


def _seconds(call, calls):
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _status(field):
    try:
        with open("/proc/self/status") as file:
            (line,) = [line for line in file if line.startswith(field + ":")]
    except (OSError, ValueError):
        return None
    return int(line.split()[1]) * 1024
