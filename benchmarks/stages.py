"""Results of the stages of a long run on disk, so that an interrupted one need not start anew."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import progress
from benchmarks.errors import UsageError

Stage = Callable[[str, Callable[[], Any]], Any]  # name and computation, to its result


def open_stages(folder: Path, identity: dict[str, Any], resume: bool) -> Stage:
    """A function that computes a stage, or remembers it from the run that is resumed.

    Args:
      folder: where they are kept, in ``stages.json``, replaced unless the run is resumed.
      identity: options that determine the numbers, to be the same in the run that resumes.
      resume: whether to remember.

    Raises:
      UsageError: to resume a run of other options.
    """
    path = folder / "stages.json"
    content = _read(path) if resume and path.exists() else {"options": identity, "stages": {}}
    identity = json.loads(json.dumps(identity))  # tuples are lists in what was read
    for name, wanted in identity.items():
        found = json.loads(json.dumps(content["options"])).get(name)
        if found != wanted:
            raise UsageError(
                f"--resume: the stages in {path} were made with {name} = {found}, not {wanted}; "
                "give the same options, or start anew without --resume"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        path.unlink(missing_ok=True)

    def stage(name: str, compute: Callable[[], Any]) -> Any:
        if name not in content["stages"]:
            content["stages"][name] = compute()
            unfinished = path.with_suffix(".tmp")  # whole or not at all, whenever it is killed
            unfinished.write_text(json.dumps(content))
            unfinished.rename(path)
        return content["stages"][name]

    return stage


@contextlib.contextmanager
def with_bar(stage: Stage, total: int) -> Iterator[Stage]:
    """The same, with a bar over the stages that says which is at work."""
    with progress.bar("compiling", total, "runs") as show:
        done = itertools.count()

        def shown(name: str, compute: Callable[[], Any]) -> Any:
            show(name, next(done))
            return stage(name, compute)

        yield shown


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
        return {"options": dict(content["options"]), "stages": dict(content["stages"])}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--resume: {path} is damaged; start anew without --resume") from None
