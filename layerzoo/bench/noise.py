"""What can be said of a few noisy samples: medians, their confidence intervals, and who is faster."""

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import Literal, NamedTuple

CONFIDENCE = 0.95
Verdict = Literal["faster", "slower", "within the noise"]


class Interval(NamedTuple):
    """A median, and the bounds between which the true one lies with at least 95 % confidence."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Of a ratio: over 1 is faster, under it slower, and nobody wins where 1 lies between the bounds."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "within the noise"


def interval(samples: Sequence[float]) -> Interval:
    """Of the median, from order statistics alone, so for any distribution; unbounded for fewer than six samples.

    Below the k-th smallest of n samples the true median lies with the probability that fewer than k of n coins fall
    heads up; k is the largest for which that is at most 2.5 %, on either side.
    """
    ordered, n = sorted(samples), len(samples)
    below, rank = 0.0, 0
    for k in range(n):
        below += comb(n, k) / 2**n
        if below > (1 - CONFIDENCE) / 2:
            break
        rank = k + 1
    middle = median(ordered)
    return Interval(middle, ordered[rank - 1], ordered[n - rank]) if rank else Interval(middle, 0.0, float("inf"))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Interval:
    """How many times longer `theirs` take than `ours`; sample i of one was taken beside sample i of the other.

    So what slows the whole machine down for a while cancels out. Of samples that are not pairs (one side ran once)
    there is the ratio of the medians, without bounds.
    """
    if len(theirs) == len(ours) > 1:
        return interval([a / b for a, b in zip(theirs, ours, strict=True)])
    return Interval(median(theirs) / median(ours), 0.0, float("inf"))
