"""PreResNets on CIFAR-10, three seeds side by side, BatchNorm refreshed for every sample."""

import functools

from benchmarks.gpu import classification
from benchmarks.gpu.classification import Setting
from benchmarks.gpu.job import Job
from benchmarks.models import PreResNet

SEEDS = 3


def setting(tiny: bool, blocks: int) -> Setting:
    """What is trained: of depth ``6 * blocks + 2``."""
    full = Setting(
        functools.partial(PreResNet, blocks=blocks),
        learning_rate=0.1,
        swa_learning_rate=0.01,
        weight_decay=3e-4,
        seeds=SEEDS,
        reserve=40.0 + 20.0 * blocks,
    )
    # In float32: a CPU takes ten times as long for grouped convolutions of bfloat16.
    small = {"network": functools.partial(PreResNet, blocks=1, widths=(4,)), "dtype": "float32"}
    return full.tiny(**small) if tiny else full


def run(job: Job, blocks: int) -> None:
    """Train, predict, score, draw, write."""
    classification.run(job, setting(job.tiny, blocks))
