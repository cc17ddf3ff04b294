"""Other Python processes that answer requests: peers in environments of their own, and our own.

A process is started with a command, says hello on its first line, and then answers every line of
JSON on its standard input by a line of JSON on its standard output: see adapters/serve.py.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Ask = Callable[..., dict[str, Any]]

ROOT = Path(__file__).parents[2]
ADAPTERS = Path(__file__).parent / "adapters"
OURS = (sys.executable, ADAPTERS / "ours.py")


class ChildError(Exception):
    """A child did not start, ended, or answered that a request failed."""


@contextlib.contextmanager
def running(
    command: tuple[Any, ...], threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[Ask]:
    """Start a process; yield a function that sends it a request and returns its answer.

    Raises:
      ChildError: where it does not start, or from that function where a request fails.
    """
    try:
        process = subprocess.Popen(
            [*map(str, command), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
        )
    except OSError as error:
        raise ChildError(f"{command[0]}: {error.strerror}") from error

    def answer() -> dict[str, Any]:
        line = process.stdout.readline()
        content = json.loads(line) if line else {"error": f"ended with code {process.wait()}"}
        if "error" in content:
            raise ChildError(f"{Path(command[1]).name}: {content['error']}")
        return content

    def ask(operation: str, **arguments: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # why it ended is what answer() tells
            process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            process.stdin.flush()
        return answer()

    try:
        answer()  # hello
        yield ask
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
