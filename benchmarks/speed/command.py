"""``python -m benchmarks speed``: measure, print, write JSON.

Imports nothing heavy: ``--help`` answers at once.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.errors import UsageError

Workload = Literal["lenet5", "preresnet20", "resnet18", "wrn28x10", "transformer", "leaves300"]
Kind = Literal[
    "idle",
    "collect",
    "members",
    "sample",
    "samples",
    "low-rank",
    "predict",
    "generators",
    "averaging",
    "axes",
    "compile",
    "memory",
    "scaling",
    "training",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Time swagjax beside the limits of this machine and, where installed, beside other libraries.

    Prints each figure as a multiple of its floor, what this machine allows, and of what others
    take, all measured in turn; writes everything as JSON to speed/<processor or device>.json.
    """

    figures: tuple[Kind, ...] = ()
    """What to measure; by default everything. idle, collect, members (four side by side), sample
    (one), samples (many), low-rank, predict, generators, averaging and axes (what was chosen beside
    what was not), compile, memory, scaling, training."""
    workloads: tuple[Workload, ...] = ()
    """On which networks; by default on those that each figure is meant for."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    num_samples: int = 30
    """Samples, where many are drawn."""
    images: int = 2000
    """Images that are predicted."""
    refresh: int = 5000
    """Training images over which BatchNorm statistics are recomputed for every sample."""
    repeats: int = 9
    """How often everything is timed; medians and quartiles are shown."""
    threads: int | None = None
    """Threads of each peer; by default as many as there are cores."""
    torch_plain: Path | None = None
    """Python of an environment with torch: compare with SWAG written from the paper in PyTorch."""
    torch_uncertainty: Path | None = None
    """Python of an environment with torch-uncertainty."""
    fortuna: Path | None = None
    """Python of an environment with aws-fortuna."""
    results: Path = Path("results")
    """Folder under which speed/ is written."""


_WIDTH = 120  # characters that the table asks for
BATCH = 250  # images in a pass of a peer and of a refresh
ADAPTERS = {
    "torch_plain": "torch_plain.py",
    "torch_uncertainty": "torch_uncertainty_swag.py",
    "fortuna": "fortuna_swag.py",
}


def speed(chosen: Speed) -> None:
    """Measure figure after figure; the JSON is written anew after each."""
    _check(chosen)
    from rich.console import Console  # here, as all that is heavy

    from benchmarks import report
    from benchmarks.speed import machine, results

    chosen = dataclasses.replace(chosen, threads=chosen.threads or machine.cores())
    about = machine.describe()
    path = chosen.results / "speed" / f"{_file_name(about)}.json"
    content = {
        "experiment": "speed",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": about,
        "versions": report.versions(),
        "options": _options(chosen),
        "peers": _versions(chosen),
        "rates": machine.rates(chosen.repeats),
        "figures": [],
        "skipped": [],
    }
    figures = []
    for result in _measure(chosen):
        if isinstance(result, results.Skipped):
            print(f"skipped: {result.name}, {result.workload}: {result.why}", file=sys.stderr)
            content["skipped"].append(dataclasses.asdict(result))
        else:
            figures.append(result)
            content["figures"].append(results.record(result) | {"load_average": _load()})
        report.write_json(path, content)
    console = Console(width=max(_WIDTH, Console().width))
    console.print(_title(content), results.table(figures), *results.failures(figures), sep="\n")
    print(f"all of it is in {path}")


def _check(chosen: Speed) -> None:
    for name, least in (("rank", 2), ("num_samples", 1), ("images", 1), ("repeats", 1)):
        if getattr(chosen, name) < least:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(chosen, name)}: at least {least}"
            )
    if chosen.refresh < BATCH or chosen.refresh % BATCH:
        raise UsageError(f"--refresh {chosen.refresh}: a multiple of {BATCH}")
    for name in ADAPTERS:
        python = getattr(chosen, name)
        if python is not None and not python.is_file():
            raise UsageError(f"--{name.replace('_', '-')} {python}: no such Python")
    _pairs(chosen)


def _measure(chosen: Speed) -> Iterator[Any]:
    """Every figure on every workload that it is meant for; what cannot be is skipped."""
    from benchmarks.speed import child, figures, results

    for workload, kind in _pairs(chosen):
        print(f"measuring {kind}, {workload}", file=sys.stderr)
        try:
            yield from _figures(_setting(chosen, workload), figures.KINDS[kind])
        except (child.ChildError, MemoryError) as error:
            yield results.Skipped(kind, workload, str(error))


def _pairs(chosen: Speed) -> list[tuple[str, str]]:
    """The workloads and kinds of figures that are wanted and meant for each other."""
    from benchmarks.speed.figures import KINDS

    wanted = chosen.workloads or get_args(Workload)
    kinds = chosen.figures or tuple(KINDS)
    pairs = [(w, k) for w in wanted for k in kinds if w in KINDS[k].workloads]
    if not pairs:
        raise UsageError(f"--figures {' '.join(kinds)}: not measured on {' '.join(wanted)}")
    return pairs


def _figures(setting: Any, kind: Any) -> Iterator[Any]:
    """The figures of a kind, with its peers running meanwhile."""
    from benchmarks.speed import machine, workloads

    size = machine.FLOAT * workloads.parameters(setting.workload)
    needed = size * kind.floats(setting) * (1 + kind.compared * len(setting.commands))
    available = machine.available_bytes()
    if needed > available:
        raise MemoryError(
            f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
            "a smaller --rank needs less"
        )
    with contextlib.ExitStack() as stack:
        peers = _peers(stack, setting) if kind.compared else {}
        yield from kind.measure(setting._replace(peers=peers))


def _peers(stack: contextlib.ExitStack, setting: Any) -> dict[str, Any]:
    """The peers that can do the workload, ready to be asked for times."""
    from benchmarks.speed import child

    ready = {}
    for name, command in setting.commands.items():
        ask = stack.enter_context(child.running(command, setting.threads))
        try:
            ask("prepare", workload=setting.name, rank=setting.rank)
            ready[name] = ask
        except child.ChildError as error:
            print(f"without {name}: {error}", file=sys.stderr)
    return ready


def _setting(chosen: Speed, name: str) -> Any:
    from benchmarks.speed import workloads
    from benchmarks.speed.figures.setting import Setting

    return Setting(
        name=name,
        workload=workloads.build(name),
        rank=chosen.rank,
        samples=chosen.num_samples,
        images=chosen.images,
        refresh=chosen.refresh,
        rounds=chosen.repeats,
        threads=chosen.threads,
        peers={},
        commands=_commands(chosen),
    )


def _commands(chosen: Speed) -> dict[str, tuple[Any, ...]]:
    """How each peer is started."""
    from benchmarks.speed import child

    return {
        name: (getattr(chosen, name), child.ADAPTERS / adapter)
        for name, adapter in ADAPTERS.items()
        if getattr(chosen, name) is not None
    }


def _versions(chosen: Speed) -> dict[str, Any]:
    """What every peer says of itself; one that does not start is the user's to put right."""
    from benchmarks.speed import child

    versions = {}
    for name, command in _commands(chosen).items():
        try:
            with child.running(command, chosen.threads) as ask:
                versions[name] = ask("versions")["versions"]
        except child.ChildError as error:
            raise UsageError(f"--{name.replace('_', '-')}: {error}") from None
    return versions


def _options(chosen: Speed) -> dict[str, Any]:
    """The options that determine the numbers: no folders of this machine."""
    folders = {"results", *ADAPTERS}
    return {k: v for k, v in dataclasses.asdict(chosen).items() if k not in folders}


def _load() -> list[float] | None:
    """How busy the machine has been: the numbers are worth more on a quiet one."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _file_name(about: dict[str, Any]) -> str:
    name = about["processor"] if about["backend"] == "cpu" else about["device"]
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {about['cores']} cores".lower()).strip("-")


def _title(content: dict[str, Any]) -> str:
    about, rates = content["machine"], content["rates"]
    bandwidth = rates["in_place_bytes_per_second"]["median"]
    normals = rates["normals_per_second"]["median"]
    name = about["processor"] if about["backend"] == "cpu" else about["device"]
    return (
        f"{name}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB, "
        f"jax {content['versions']['jax']}: {bandwidth / 1e9:.3g} GB/s in place, "
        f"{normals / 1e6:.3g} M normals/s"
    )
