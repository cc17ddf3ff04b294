"""One run of a part: how long it may take, what it remembers of earlier runs, what it writes."""

import datetime
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import report, stages
from benchmarks.gpu import trees
from benchmarks.speed import machine

DONE, UNFINISHED = 0, 3  # exit codes
MARGIN = 15.0  # seconds before the end at which nothing new begins: the last save takes some
SAVE_EVERY = 90.0  # seconds: a save of VGG16's ring takes two or three


class TimeUpError(Exception):
    """The time box is used up; what is done is kept for the next run."""


class Job:
    """A part at work.

    Attributes:
      part: its name.
      out: where its JSON and pictures go, small enough to be kept under git.
      work: where it keeps what the next run resumes from, of any size.
      data: folder of the data, or None.
      tiny: whether this is a rehearsal at a size that a CPU does in seconds.
      epochs: how many to train, or None: as many of the full schedule as fit.
      seed: of all that is random.
      stage: see ``benchmarks.stages.open_stages``: a computation whose JSON is remembered.
      save_every: seconds from one checkpoint of a training to the next.
    """

    def __init__(
        self,
        part: str,
        out: Path,
        work: Path,
        *,
        data: Path | None = None,
        seconds: float = 480.0,
        tiny: bool = False,
        epochs: int | None = None,
        seed: int = 0,
        fresh: bool = False,
        begun: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.part, self.out, self.work = part, out, work / part
        self.data, self.tiny, self.epochs, self.seed = data, tiny, epochs, seed
        self.save_every = 0.0 if tiny else SAVE_EVERY
        self._seconds, self._clock = seconds, clock
        self._begun = clock() if begun is None else begun
        self._last_said = -1e9
        # What fits the box was chosen by the first run, and is among what is remembered.
        options = {"tiny": tiny, "epochs": epochs, "seed": seed}
        self.stage = stages.open_stages(self.work, options, resume=not fresh)
        self._content = {
            "part": part,
            "complete": False,
            "size": "tiny" if tiny else "full",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": _device(),
            "versions": report.versions(),
            "options": options | {"seconds": seconds},
        }
        self.note()

    def left(self) -> float:
        """Seconds of the time box that are left."""
        return self._seconds - self.spent()

    def spent(self) -> float:
        """Seconds since this run began."""
        return self._clock() - self._begun

    def check_time(self) -> None:
        """Raise ``TimeUpError`` if too little is left to begin anything."""
        if self.left() < min(MARGIN, 0.1 * self._seconds):
            raise TimeUpError(f"{self.part}: the {self._seconds:g} s are used up")

    def note(self, **fields: Any) -> None:
        """Add to the part's JSON, and write it at once."""
        self._content |= fields | {"seconds": round(self.spent(), 1)}
        path = self.out / f"{self.part}.json"
        unfinished = path.with_suffix(".tmp")
        report.write_json(unfinished, self._content)
        unfinished.rename(path)

    def finish(self, **fields: Any) -> None:
        """Add the last fields: the part is complete."""
        self.note(**fields, complete=True)

    def say(self, text: str, every: float = 0.0) -> None:
        """Print how far it is, at most once in so many seconds."""
        if self.spent() - self._last_said >= every:
            self._last_said = self.spent()
            print(f"[{self.spent():6.1f} s] {self.part}: {text}", flush=True)

    def picture(self, figure: Any, name: str = "") -> None:
        """Write a matplotlib figure beside the JSON."""
        figure.savefig(self.out / f"{self.part}{name}.png", dpi=110)

    def array(self, name: str, compute: Callable[[], Any]) -> np.ndarray:
        """An array that is computed once, and remembered."""
        path = self.work / f"{name}.npy"
        if not path.exists():
            self.check_time()
            unfinished = path.with_suffix(".tmp")
            with unfinished.open("wb") as file:
                np.save(file, np.asarray(compute()))
            unfinished.rename(path)
        return np.asarray(np.load(path))

    def saved(self, name: str, like: Any) -> tuple[Any, np.ndarray] | None:
        """A tree that an earlier run saved, on the device, with the array about it."""
        path = self.work / f"{name}.npz"
        if not path.exists():
            return None
        tree, about = trees.load(path, like)
        return jax.device_put(tree), about

    def save(self, name: str, tree: Any, about: np.ndarray) -> None:
        """Save a tree, and an array about it, for a run that resumes this one."""
        trees.save(self.work / f"{name}.npz", tree, about)

    def watch(self) -> threading.Timer:
        """End the process when the time box ends, whatever it is at.

        What is left then is what was saved: the JSON says that it is not complete.
        """
        timer = threading.Timer(max(0.0, self.left()), os._exit, (UNFINISHED,))
        timer.daemon = True
        timer.start()
        return timer


def _device() -> dict[str, Any]:
    about = machine.describe()
    stats = jax.devices()[0].memory_stats() or {}
    return about | {"device_memory_bytes": stats.get("bytes_limit")}
