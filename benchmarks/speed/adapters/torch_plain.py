"""SWAG in plain PyTorch, written from the paper's algorithm 1 for this comparison.

Running moments updated in place, a list of the last K deviations, samples written into the module
one after another, BatchNorm statistics by ``torch.optim.swa_utils.update_bn``.
"""

import platform

import torch
import torch_networks
from serve import serve, threads


class SWAG:
    """Moments and deviations of a module's parameters."""

    def __init__(self, model, rank):
        """Collect nothing yet."""
        self.model, self.rank, self.count = model, rank, 0
        self.mean = [torch.zeros_like(p) for p in model.parameters()]
        self.sq_mean = [torch.zeros_like(p) for p in model.parameters()]
        self.deviations = []

    @torch.no_grad()
    def collect(self):
        """Update the moments with the weights of the module, append their deviation."""
        self.count += 1
        weights = list(self.model.parameters())
        for mean, sq_mean, p in zip(self.mean, self.sq_mean, weights, strict=True):
            mean.lerp_(p, 1 / self.count)
            sq_mean.mul_(1 - 1 / self.count).addcmul_(p, p, value=1 / self.count)
        deviation = [p - mean for p, mean in zip(weights, self.mean, strict=True)]
        self.deviations = [*self.deviations, deviation][-self.rank :]

    @torch.no_grad()
    def sample(self):
        """Write a sample into the module."""
        z2 = (torch.randn(len(self.deviations)) / (2 * (len(self.deviations) - 1)) ** 0.5).tolist()
        for i, p in enumerate(self.model.parameters()):
            variance = torch.addcmul(self.sq_mean[i], self.mean[i], self.mean[i], value=-1)
            noise = torch.randn_like(p).mul_(variance.clamp_(min=1e-30).mul_(0.5).sqrt_())
            for deviation, z in zip(self.deviations, z2, strict=True):
                noise.add_(deviation[i], alpha=z)
            torch.add(self.mean[i], noise, out=p.data)


def build(workload, rank):
    """See ``serve``."""
    model = torch_networks.NETWORKS[workload]()
    swag, data = SWAG(model, rank), {}
    for step in range(rank + 1):
        torch_networks.wander(model, step)
        swag.collect()

    def sample(samples):
        for _ in range(samples):
            swag.sample()

    def predict(samples, images, refresh, batch):
        if (images, refresh, batch) not in data:
            pair = torch_networks.batches(images, batch), torch_networks.batches(refresh, batch)
            data[images, refresh, batch] = pair
        test, train = data[images, refresh, batch]

        def draw():
            swag.sample()
            if train:
                torch.optim.swa_utils.update_bn(train, model)
            return model.eval()

        torch_networks.average(samples, test, batch, draw)

    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "collect": swag.collect, "sample": sample, "predict": predict}


if __name__ == "__main__":
    torch.set_num_threads(threads())
    serve(build, {"python": platform.python_version(), "torch": torch.__version__})
