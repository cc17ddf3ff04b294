"""``python -m benchmarks.gpu PART``: run one part of the job, or show the plan of all."""

import argparse
import os
import sys
import time
from pathlib import Path

REQUIRED = {"jax": "0.10", "optax": "0.2.8", "chex": "0.1.92", "flax": "0.12.8"}


def main(args: list[str] | None = None) -> int:
    """Run; exit code 0 when the part is complete, 3 when its time is up before, 2 for misuse."""
    begun = time.monotonic()
    chosen = _parser().parse_args(args)
    from benchmarks.errors import UsageError

    try:
        check_versions()
        if chosen.part == "plan":
            from benchmarks.gpu import plan

            return plan.show(measure=chosen.measure)
        return _run(chosen, begun)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_versions() -> None:
    """Refuse packages that are too old, in one line, before anything is spent on them."""
    from importlib import metadata

    from benchmarks.errors import UsageError

    for name, least in REQUIRED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UsageError(f"{name} is not installed: it needs to be {least} or later") from None
        if _numbers(found) < _numbers(least):
            raise UsageError(f"{name} {found} is too old: it needs to be {least} or later")


def _run(chosen: argparse.Namespace, begun: float) -> int:
    import jax

    # A run that resumes compiles nothing again.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((chosen.work / "programs").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.default_backend() == "cpu" and not chosen.tiny:
        from benchmarks.errors import UsageError

        raise UsageError("JAX finds no accelerator here: --tiny rehearses on a CPU")
    from benchmarks.gpu.job import DONE, UNFINISHED, Job, TimeUpError
    from benchmarks.gpu.parts import PARTS

    seconds = PARTS[chosen.part].seconds if chosen.seconds is None else chosen.seconds
    chosen.out.mkdir(parents=True, exist_ok=True)
    job = Job(
        chosen.part,
        chosen.out,
        chosen.work,
        data=chosen.data,
        seconds=seconds,
        tiny=chosen.tiny,
        epochs=chosen.epochs,
        seed=chosen.seed,
        fresh=chosen.fresh,
        begun=begun,
    )
    timer = job.watch()
    job.say(f"on {jax.devices()[0].device_kind}")
    try:
        PARTS[chosen.part].run(job)
    except TimeUpError as up:
        job.say(f"{up}; run it again to go on")
        return UNFINISHED
    finally:
        timer.cancel()
    job.say(f"complete: {chosen.out / chosen.part}.json")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parts = ("check", "vgg16", "ood", "preresnet20", "preresnet56", "surface", "rotation")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", choices=(*parts, "plan"), help="what to run")
    paths = {
        "--out": (Path("results/gpu"), "folder of the JSON and the pictures"),
        "--work": (Path("results/gpu/work"), "folder of what a killed run resumes from"),
        "--data": (None, "folder made by benchmarks/gpu/carry, or of tensorflow-datasets"),
    }
    for name, (default, text) in paths.items():
        parser.add_argument(name, type=Path, default=default, help=text)
    parser.add_argument("--seconds", type=float, help="of the time box; the default is the part's")
    parser.add_argument("--epochs", type=int, help="instead of as many of the schedule as fit")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--tiny", action="store_true", help="rehearse, in seconds on a CPU")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run did")
    parser.add_argument("--measure", action="store_true", help="with plan: count and time it anew")
    return parser


def _numbers(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3]]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: nothing is left to be done, and threads of a device may take seconds
