"""What the machine is, and what it allows: the floors of the figures, measured where they run."""

import functools
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import measure
from swagjax import prng

FLOAT = 4  # bytes
_EVEN = 1024
_MOST = 1 << 26  # numbers in an array that a floor is measured on; for more it is scaled up


def describe() -> dict[str, Any]:
    """Name of the processor and of the device, cores, bytes of memory, operating system."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.system(),
        "architecture": platform.machine(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be had without swapping: of the device, or of the machine on a CPU."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def moving(floats: float) -> measure.Action:
    """Seconds to move so many float32 numbers: an array read and written in place.

    Half of them are read and half are written, by one donated multiply-add.
    """
    size = min(_MOST, _whole(floats / 2))
    step = functools.partial(jax.jit, donate_argnums=0)(lambda x: 0.5 * x + 0.5)
    return measure.scaled(measure.carried(step, jnp.zeros(size)), floats / (2 * size))


def writing(floats: float) -> measure.Action:
    """Seconds to write so many float32 numbers to new memory, as results are written.

    New memory is slower than old: the system hands it out page by page.
    """
    size = min(_MOST, _whole(floats))
    write = jax.jit(lambda x: jnp.full(size, x))
    return measure.scaled(measure.timed(write, 1.0), floats / size)


def drawing(normals: float) -> measure.Action:
    """Seconds to draw so many standard normals with the generator that ``sample`` uses."""
    size = max(1, min(_MOST, round(normals)))
    draw = jax.jit(lambda key: prng.normal(key, (size,), jnp.float32))
    return measure.scaled(measure.timed(draw, jax.random.key(0)), normals / size)


def rates(rounds: int) -> dict[str, Any]:
    """Bytes per second in place and to new memory, normals per second, on arrays beyond caches."""
    amounts = {
        "in_place_bytes_per_second": (moving(2 * _MOST), 2 * _MOST * FLOAT),
        "new_bytes_per_second": (writing(_MOST), _MOST * FLOAT),
        "normals_per_second": (drawing(_MOST), _MOST),
    }
    actions = {name: action for name, (action, _) in amounts.items()}
    return {
        name: measure.summary([amounts[name][1] / s for s in seconds])
        for name, seconds in measure.interleave(actions, rounds).items()
    }


def _whole(floats: float) -> int:
    """A size that threads share evenly: of an odd one XLA:CPU moved half as many bytes a second."""
    return _EVEN * max(1, round(floats / _EVEN))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
