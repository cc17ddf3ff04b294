"""Make the folder that a machine without a network needs: wheels and data.

``python -m benchmarks.gpu.carry --data TFDS --to .gpu``: the wheels are those that the job needs
beside JAX for CUDA, NumPy, SciPy, scikit-learn, matplotlib, rich and Pillow, for that machine's
Python.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import UsageError
from benchmarks.gpu.data import PARTS, SETS, pack

WHEELS = ("flax==0.12.8", "optax==0.2.8", "chex==0.1.92", "treescope==0.1.10", "msgpack==1.2.4")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 60_000_000  # bytes of the whole folder


def main(args: list[str] | None = None) -> int:
    """Make the folder and print its size; 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.carry", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of tensorflow-datasets; its own default")
    parser.add_argument("--to", type=Path, default=Path(".gpu"), help="the folder")
    parser.add_argument("--python", default="3.12", help="version of that machine's Python")
    chosen = parser.parse_args(args)
    chosen.to.mkdir(parents=True, exist_ok=True)
    try:
        download(chosen.to, chosen.python)
        for name in SETS:
            pack(
                chosen.to / f"{name}.npz",
                {part: encoded(name, chosen.data, part) for part in PARTS},
            )
        print(f"{check_size(chosen.to) / 1e6:.1f} MB in {chosen.to}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def download(folder: Path, python: str) -> None:
    """The wheels, by pip, without what they need in turn."""
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run([*command, "--dest", str(folder), *WHEELS], check=False)
    if done.returncode:
        raise UsageError("pip could not download the wheels: see above")


def encoded(name: str, folder: Path | None, part: str) -> tuple[list[bytes], np.ndarray]:
    """The images of a part as they are stored, encoded, and their labels."""
    import tensorflow_datasets as tfds

    where: dict[str, Any] = {} if folder is None else {"data_dir": folder}
    builder = tfds.builder(name, file_format="array_record", **where)
    if not builder.is_prepared():
        builder.download_and_prepare()
    raw = {"image": tfds.decode.SkipDecoding()}
    rows = [(row["image"], row["label"]) for row in builder.as_data_source(part, decoders=raw)]
    images, labels = zip(*rows, strict=True)
    return list(images), np.array(labels)


def check_size(folder: Path) -> int:
    """Bytes of all files in a folder, which are to be few enough to be carried."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise UsageError(f"{folder} holds {size / 1e6:.1f} MB: at most {LIMIT / 1e6:.0f}")
    return size


if __name__ == "__main__":
    sys.exit(main())
