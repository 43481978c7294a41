"""Noise levels of a sampling run and the deterministic DDIM move between two of them (Song et al. 2021, eq. 12)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inversion.errors import ScheduleError, StepsError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Move:
    """One move of the latents, towards the picture or towards the noise.

    `index` counts sampling steps from the noise, 0 to N - 1, in both directions; `t` is the timestep that the network is
    told; `alpha_from` and `alpha_to` are the cumulative alphas (share of signal variance, 0 to 1) before and after.
    """

    index: int
    t: int
    alpha_from: float
    alpha_to: float

    @property
    def alpha_t(self) -> float:
        """Cumulative alpha of `t`, which is the noisier end of the move in either direction."""
        return min(self.alpha_from, self.alpha_to)


@dataclass(frozen=True)
class Schedule:
    """Timesteps of N sampling steps, noisiest first, with their cumulative alphas; `final_alpha` ends the last step."""

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    final_alpha: float
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise StepsError("a schedule needs at least one step, got none; pass steps=1 or more")
        if len(self.timesteps) != len(self.alphas):
            raise ScheduleError(f"{len(self.timesteps)} timesteps but {len(self.alphas)} alphas; expected one for each")
        levels = (*self.alphas, self.final_alpha)
        if any(not 0 < level <= 1 for level in levels):
            raise ScheduleError(
                f"cumulative alphas must lie in (0, 1], got {min(levels):g} to {max(levels):g}; a schedule of zero "
                "terminal signal cannot be inverted"
            )
        if any(noisy >= clean for noisy, clean in zip(levels, levels[1:])):
            raise ScheduleError("cumulative alphas must rise from step to step (noise first), and these do not")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ScheduleError(f"prediction_type {self.prediction_type!r}; expected one of {PREDICTION_TYPES}")

    @property
    def steps(self) -> int:
        """Number of sampling steps N."""
        return len(self.timesteps)

    def sampling(self) -> tuple[Move, ...]:
        """Moves from noise to picture."""
        levels = (*self.alphas, self.final_alpha)
        return tuple(Move(i, t, levels[i], levels[i + 1]) for i, t in enumerate(self.timesteps))

    def inverting(self) -> tuple[Move, ...]:
        """The same moves backwards, from picture to noise; the network is told the noisier timestep of each."""
        return tuple(Move(m.index, m.t, m.alpha_to, m.alpha_from) for m in reversed(self.sampling()))


def ddim_move(x: Tensor, eps: Tensor, a: float, b: float, noise: Tensor | None = None) -> Tensor:
    """Move latents `x` of cumulative alpha `a` to cumulative alpha `b` along the predicted noise `eps` (eq. 12).

    Deterministic; with standard `noise`, of the shape of `x`, the stochastic move of DDPM towards the picture (eta = 1).
    Raises `ScheduleError` for a stochastic move towards the noise.
    """
    sigma = 0.0 if noise is None else ddpm_sigma(a, b)
    clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
    # What remains is never negative but by rounding.
    moved = b**0.5 * clean + max(1 - b - sigma**2, 0) ** 0.5 * eps
    return moved if noise is None else moved + sigma * noise


def ddpm_sigma(a: float, b: float) -> float:
    """Standard deviation of the noise that DDPM adds in a move from cumulative alpha `a` to a cleaner `b` (eq. 16, eta = 1)."""
    if a > b:
        raise ScheduleError(f"a stochastic move from cumulative alpha {a:g} to {b:g}; noise maps are for moves to the picture")
    return ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5


def to_epsilon(output: Tensor, x: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """Turn a network's output at latents `x` of cumulative alpha `alpha` into the noise it means."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * x
    if prediction_type == "sample":
        return (x - alpha**0.5 * output) / (1 - alpha) ** 0.5
    raise ScheduleError(f"prediction_type {prediction_type!r}; expected one of {PREDICTION_TYPES}")
