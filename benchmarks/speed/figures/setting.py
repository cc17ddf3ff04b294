"""What every figure is given."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.speed import measure
from benchmarks.speed.child import Ask, ChildError
from benchmarks.speed.workloads import Workload


class Setting(NamedTuple):
    """A workload, the sizes of the posterior, and whom to compare with.

    Attributes:
      name: of the workload.
      rank: K.
      samples: S, where many are drawn.
      images: how many are predicted at once.
      refresh: over how many training images BatchNorm statistics are recomputed.
      rounds: how often every action is timed.
      threads: of each peer.
      peers: for each its running process, with the workload prepared by ``with_peers``.
      commands: for each the command that starts a fresh one.
    """

    name: str
    workload: Workload
    rank: int
    samples: int
    images: int
    refresh: int
    rounds: int
    threads: int
    peers: Mapping[str, Ask]
    commands: Mapping[str, tuple[Any, ...]]


def peer_actions(setting: Setting, of: str, **arguments: Any) -> dict[str, measure.Action]:
    """For each peer an action that asks it for the seconds of ``of(**arguments)``.

    A peer that cannot do the workload, or not that, is left out.
    """

    def action(ask: Ask) -> measure.Action:
        return lambda: ask("seconds", of=of, **arguments)["seconds"]

    return {name: action(ask) for name, ask in setting.peers.items() if _can(ask, of, arguments)}


def _can(ask: Ask, of: str, arguments: dict[str, Any]) -> bool:
    try:
        ask("seconds", of=of, **arguments)  # also warms up
    except ChildError:
        return False
    return True
