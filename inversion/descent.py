"""Two ways to descend to the unconditional contexts that null-text inversion looks for, in one sampling step of P pictures.

Both minimise the mean square of what a move misses the stored latents by; the miss is linear in the prediction, and nearly so
in the context. Letters: A pictures still worked on, L columns of a context, D its width, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inversion.errors import TrajectoryError

Miss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`miss(contexts (A, L, D), rows (A,)) -> predictions, misses (A, C, h, w)` of the pictures `rows`, differentiable."""

PUBLISHED_RATE = 1e-2


class Adam:
    """The published descent (Mokady et al. 2023): Adam anew at each step, at a rate that falls from sampling step to step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, miss: Miss, start: Tensor, tolerance: float, index: int) -> tuple[Tensor, Tensor]:
        """Contexts (P, L, D) found from `start`, and predictions (P, C, h, w) with them; a loss under `tolerance` will do."""
        rate = PUBLISHED_RATE * max(1 - index / 100, 0.01)
        contexts, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        everyone = rows = torch.arange(len(start), device=start.device)
        for step in range(1, self.steps + 1):
            point, _, missed = _evaluate(miss, contexts[rows], rows, differentiable=True)
            gradient = _gradient(point, missed) * (2 / missed[0].numel())
            first[rows] = 0.9 * first[rows] + 0.1 * gradient
            second[rows] = 0.999 * second[rows] + 0.001 * gradient**2
            scale = (second[rows] / (1 - 0.999**step)).sqrt() + 1e-8
            contexts[rows] -= rate / (1 - 0.9**step) * first[rows] / scale
            # As published, the step is taken even where the loss before it would do.
            rows = rows[_loss(missed) >= tolerance]
            if not len(rows):
                break
        return contexts, _evaluate(miss, contexts, everyone, differentiable=False)[1]


class ConjugateGradient:
    """Conjugate gradients (Polak and Ribiere 1969) whose line searches cost no call of the network.

    Along a line the prediction is nearly linear. So what a trial point misses gives the minimum of the line, and what is missed
    and the gradient there: the next direction starts from that point, at which the network is never called. The length of a
    trial step is what was best at the same place in the sampling step before. Gradients are brought to one size, so that it
    still is, and token by token, with which fewer steps are needed than with one size for all.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.lengths: list[Tensor] = []

    def __call__(self, miss: Miss, start: Tensor, tolerance: float, index: int) -> tuple[Tensor, Tensor]:
        """Contexts (P, L, D) found from `start`, and predictions (P, C, h, w) with them; a loss under `tolerance` will do.

        The best of the points at which the network was called is taken.
        """
        self.lengths = self.lengths or [torch.full_like(start[:, 0, 0], PUBLISHED_RATE)]
        rows = torch.arange(len(start), device=start.device)
        point, predicted, missed = _evaluate(miss, start, rows, differentiable=self.steps > 0)
        best, predictions, least = start.clone(), predicted.clone(), _loss(missed)
        on = least >= tolerance
        if self.steps == 0 or not on.any():
            return best, predictions
        rows, base, left = rows[on], start[on], missed.detach()[on]
        slope = _gradient(point, missed)[on]
        level = _levelled(slope)
        direction = -level
        for step in range(self.steps):
            more = step + 1 < self.steps
            if step == len(self.lengths):
                self.lengths.append(self.lengths[-1].clone())
            lengths = self.lengths[step]
            ahead = lengths[rows].view(-1, 1, 1) * direction
            point, predicted, missed = _evaluate(miss, base + ahead, rows, differentiable=more)
            loss, change = _loss(missed), missed.detach() - left
            better = loss < least[rows]
            won = rows[better]
            best[won], predictions[won], least[won] = point.detach()[better], predicted[better], loss[better]

            # The minimum of |left + times * change|^2; NaN (an overflow, or no change at all) shortens the next trial.
            times = (-_dot(left, change) / _dot(change, change)).nan_to_num(0.1, 10, -10).clamp(-10, 10)
            lengths[rows] *= times.abs().clamp(0.1, 10)
            on = ~(loss < tolerance)
            if not more or not on.any():
                break
            times, rows = times[on], rows[on]
            base, left = base[on] + _over(times, ahead) * ahead[on], left[on] + _over(times, left) * change[on]
            before, slope = slope[on], slope[on] + _over(times, slope) * (_gradient(point, missed)[on] - slope[on])
            turn = _levelled(slope)
            carried = (_dot(turn, slope - before) / _dot(level[on], before)).nan_to_num(0, 0, 0).clamp_min(0)
            direction = _over(carried, turn) * direction[on] - turn
            level = turn
        return best, predictions


def _evaluate(miss: Miss, contexts: Tensor, rows: Tensor, *, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.set_grad_enabled(differentiable):
        point = contexts.detach().clone().requires_grad_(differentiable)
        predicted, missed = miss(point, rows)
    return point, predicted.detach(), missed


def _gradient(point: Tensor, missed: Tensor) -> Tensor:
    """Gradient of half the squares of `missed`, summed, with respect to `point` (A, L, D)."""
    if not missed.requires_grad:
        raise TrajectoryError("noise(...) cannot be differentiated; take one without torch.no_grad(), and no inference mode")
    # Sent back at size one: what is small underflows in a network of half precision.
    size = missed.detach().square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    return torch.autograd.grad(missed, point, missed.detach() / size)[0] * size[:, 0]


def _levelled(gradient: Tensor) -> Tensor:
    return gradient / gradient.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)


def _loss(missed: Tensor) -> Tensor:
    return missed.detach().square().mean((1, 2, 3))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Values (A,) in a shape that multiplies rows of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
