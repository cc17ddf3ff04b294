"""``python -m benchmarks <experiment>``: one subcommand an experiment."""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.experiments.classify import Classify, classify
from benchmarks.experiments.constant_sgd import ConstantSgd, constant_sgd
from benchmarks.experiments.curves import Curves, curves
from benchmarks.experiments.gains import Gains, gains
from benchmarks.experiments.gap import Gap, gap
from benchmarks.experiments.language import Language, language
from benchmarks.experiments.rotation import Rotation, rotation
from benchmarks.experiments.shift import Shift, shift
from benchmarks.experiments.subspace import Subspace, subspace
from benchmarks.experiments.surface import Surface, surface
from benchmarks.experiments.uci import Uci, uci
from benchmarks.options import UsageError
from benchmarks.speed.command import Speed, speed


@dataclasses.dataclass(frozen=True)
class Publish:
    """Copy the JSON and PNG files of an experiment to benchmarks/results/, which is under git.

    README's table of it, where it has one, is made anew from the JSON.
    """

    name: tyro.conf.Positional[str]
    """Folder under the results, such as classify/digits."""
    results: Path = Path("results")
    """Folder under which experiments write."""


def publish(options: Publish) -> None:
    """Copy what README shows, and write its table anew."""
    from benchmarks import report

    for path in report.publish(options.results, options.name):
        print(path.relative_to(Path(__file__).parent.parent))
    content = json.loads((options.results / options.name / "results.json").read_text())
    report.README.write_text(report.with_table(report.README.read_text(), options.name, content))


COMMANDS = {
    Classify: classify,
    Curves: curves,
    Shift: shift,
    Rotation: rotation,
    Language: language,
    Uci: uci,
    Gains: gains,
    Gap: gap,
    Subspace: subspace,
    ConstantSgd: constant_sgd,
    Surface: surface,
    Speed: speed,
    Publish: publish,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one experiment; return the exit code, 2 for whatever the user can put right."""
    options = None
    try:
        options = _parse(args)
        COMMANDS[type(options)](options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        way_on = ": --resume continues from where it was" if hasattr(options, "resume") else ""
        print(f"interrupted{way_on}", file=sys.stderr)
        return 130
    return 0


def _parse(args: Sequence[str] | None) -> Any:
    """The options of one experiment; an error is the first paragraph of what tyro says of it."""
    subcommands = {function.__name__: options for options, function in COMMANDS.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                subcommands, prog="python -m benchmarks", args=args, description=__doc__
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        lines = (line.strip(" │─╭╮╰╯") for line in said.getvalue().splitlines()[1:])
        raise UsageError(" ".join(itertools.takewhile(bool, lines))) from None


if __name__ == "__main__":
    sys.exit(main())
