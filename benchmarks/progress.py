"""How far a long run has come."""

import contextlib
from collections.abc import Callable, Iterator

Show = Callable[[str, int], None]  # what is done now, and how much is done


@contextlib.contextmanager
def bar(label: str, total: int, unit: str) -> Iterator[Show]:
    """A bar on stderr, shown where that is a terminal; one at a time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    text = TextColumn("{task.description:<40}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TextColumn(unit), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(label, total=total)
        yield lambda text, done: shown.update(task, description=text, completed=done)
        shown.update(task, completed=total)
