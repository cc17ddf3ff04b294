"""The networks of ``benchmarks/speed/models.py`` and LeNet5, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional


def lenet5():
    """62,006 parameters for 32 x 32 x 3 images and 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def resnet18():
    """11.2 M parameters."""
    stem = [_conv(3, 64), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [
        _Block(before if not i else width, width, 2 if stage and not i else 1)
        for stage, (before, width) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)))
        for i in range(2)
    ]
    return nn.Sequential(*stem, *blocks, *_head(512))


def preresnet20():
    """272 k parameters."""
    return _preact(3, (16, 32, 64))


def wrn28x10():
    """36.5 M parameters."""
    return _preact(4, (160, 320, 640))


class _Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if before != width:
            self.shortcut = nn.Sequential(
                _conv(before, width, stride, size=1), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _PreActBlock(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv(before, width, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width)
        self.shortcut = _conv(before, width, stride, size=1) if before != width else None

    def forward(self, x):
        y = functional.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(functional.relu(self.norm2(self.conv1(y))))


def _preact(count, widths):
    befores = (16, *widths[:-1])
    blocks = [
        _PreActBlock(before if not i else width, width, 2 if stage and not i else 1)
        for stage, (before, width) in enumerate(zip(befores, widths, strict=True))
        for i in range(count)
    ]
    norm = nn.BatchNorm2d(widths[-1]), nn.ReLU()
    return nn.Sequential(_conv(3, 16), *blocks, *norm, *_head(widths[-1]))


def _conv(before, width, stride=1, size=3):
    return nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False)


def _head(width):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


NETWORKS = {f.__name__: f for f in (lenet5, resnet18, preresnet20, wrn28x10)}


def wander(model, step):
    """Move the weights a little, in place, as a step of training would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=1e-3)


def batches(images, batch):
    """Random images in batches."""
    return list(torch.randn(images, 3, 32, 32).split(batch)) if images else []


def average(samples, images, batch, draw):
    """Mean over samples of the softmax of ``draw()``, a network ready for evaluation."""
    total = 0
    with torch.no_grad():
        for _ in range(samples):
            model = draw()
            total += torch.cat([model(x).softmax(-1) for x in images])
    return total / samples
