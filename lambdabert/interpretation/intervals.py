"""Bootstrap intervals of means."""

import torch

SAMPLES = 1000
LEVEL = 0.95
FEWEST_GROUPS = 20  # with fewer, samples repeat a few means, and their percentiles are no interval at that level


def bootstrap_interval(values: torch.Tensor, groups: torch.Tensor | None = None, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of values [S], at 95 %, from 1000 samples.

    Args:
        values: [S]
        groups: int [S]; values of one group are drawn together, as they depend on each other. None = each alone.
        seed: of the samples.
    """
    values = values.double().cpu()
    if groups is None:
        groups = torch.arange(len(values))
    _, groups = groups.cpu().unique(return_inverse=True)
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=torch.double).index_add(0, groups, values)
    sizes = torch.zeros(count, dtype=torch.double).index_add(0, groups, torch.ones_like(values))
    draws = torch.randint(0, count, (SAMPLES, count), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high
