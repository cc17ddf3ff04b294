"""Images as bytes: from the carried folder, from tensorflow-datasets, or embedded and tiny."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.errors import UsageError

SETS = {"cifar10": 3, "mnist": 1}  # channels
PARTS = ("train", "test")


class Images(NamedTuple):
    """Images uint8 ``(N, H, W, C)`` and integer labels ``(N,)``, to train on and to test on.

    ``source`` says where they come from: copies as JPEG are not quite the original images.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    source: str


def load(name: str, folder: Path | None, tiny: bool) -> Images:
    """A data set by name.

    Args:
      name: ``"cifar10"`` or ``"mnist"``.
      folder: one that ``carry`` made, or one of tensorflow-datasets; None is the default of those.
      tiny: take scikit-learn's digits instead, in the number of channels of the set.
    """
    if tiny:
        return _digits(SETS[name])
    packed = None if folder is None else folder / f"{name}.npz"
    if packed is not None and packed.exists():
        return unpack(packed)
    return _tfds(name, folder)


def pack(path: Path, parts: dict[str, tuple[list[bytes], np.ndarray]]) -> None:
    """Write encoded images (JPEG, PNG) of several parts, one after another, with their labels."""
    content = {}
    for part, (encoded, labels) in parts.items():
        content[f"{part}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        content[f"{part}_ends"] = np.cumsum([len(each) for each in encoded])
        content[f"{part}_labels"] = np.asarray(labels, np.int32)
    np.savez_compressed(path, **content)  # encoded images have headers in common


def unpack(path: Path) -> Images:
    """Decode what ``pack`` wrote.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from PIL import Image
      >>> from benchmarks.gpu import data
      >>> file = io.BytesIO()
      >>> Image.fromarray(np.full((2, 2), 7, np.uint8)).save(file, "PNG")
      >>> path = Path(tempfile.mkdtemp()) / "set.npz"
      >>> part = [file.getvalue()] * 3, np.arange(3)
      >>> data.pack(path, {"train": part, "test": part})
      >>> images = data.unpack(path)
      >>> images.train.shape, int(images.test.max()), images.test_labels.tolist()
      ((3, 2, 2, 1), 7, [0, 1, 2])
    """
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    train, test = (_decode(found[f"{part}_bytes"], found[f"{part}_ends"]) for part in PARTS)
    jpeg = found["test_bytes"][:2].tobytes() == b"\xff\xd8"
    source = "copies as JPEG" if jpeg else "copies as PNG"
    return Images(train, found["train_labels"], test, found["test_labels"], source)


def _decode(encoded: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Images that lie one after another, decoded by several threads."""
    from PIL import Image

    def decode(places: np.ndarray) -> np.ndarray:
        files = [encoded[a:b].tobytes() for a, b in places.tolist()]
        return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])

    places = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    with ThreadPoolExecutor() as pool:
        images = np.concatenate(
            list(pool.map(decode, np.array_split(places, -(-len(ends) // 500))))
        )
    return images if images.ndim == 4 else images[..., None]


def _tfds(name: str, folder: Path | None) -> Images:
    try:
        from benchmarks import data
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{name} is not in --data {folder}, and tensorflow-datasets cannot be asked for it: "
            f"{error}; pip install '.[benchmarks]'"
        ) from error
    train, test = data.raw(name, folder)
    labels = (part.labels.astype(np.int32) for part in (train, test))
    source = "tensorflow-datasets"
    return Images(train.inputs, next(labels), test.inputs, next(labels), source)


def _digits(channels: int) -> Images:
    """Scikit-learn's digits, each pixel twice as wide and high: 16 x 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.minimum(16 * digits.images, 255).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    images, labels = np.repeat(grey[..., None], channels, -1), digits.target.astype(np.int32)
    parts = images[:400], labels[:400], images[400:500], labels[400:500]
    return Images(*parts, "scikit-learn's digits")
