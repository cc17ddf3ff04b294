"""VGG16 on CIFAR-10 by the full schedule of the authors of SWAG."""

import functools

from benchmarks.gpu import classification
from benchmarks.gpu.classification import Setting
from benchmarks.gpu.job import Job
from benchmarks.models import VGG16, LeNet5

# The authors train with dropout before the first two dense layers.
SETTING = Setting(
    functools.partial(VGG16, dropout=0.5),
    learning_rate=0.05,
    swa_learning_rate=0.01,
    weight_decay=5e-4,
)
# Of all 50,000 training images and the original test images: the authors' README and table 8 of
# Izmailov et al. (2019), arXiv 1907.07504. Ours holds 5,000 out, and may be given JPEG copies.
PUBLISHED = {"SGD": 0.33, "SWA": 0.2621, "SWA-Temp": 0.2481, "SWAG-Diag": 0.22, "SWAG": 0.2016}


def setting(tiny: bool) -> Setting:
    """What is trained; in the rehearsal a small network without BatchNorm."""
    return SETTING.tiny(network=LeNet5) if tiny else SETTING


def run(job: Job) -> None:
    """Train, predict, score, draw, write."""
    classification.run(job, setting(job.tiny), PUBLISHED)
