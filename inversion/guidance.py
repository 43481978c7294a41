"""Classifier-free guidance, and its proximal variant for edits of inverted pictures."""

from __future__ import annotations

from torch import Tensor

from inversion.errors import TrajectoryError


def guide(unconditional: Tensor, conditional: Tensor, scale: float, proximal: float | None = None) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, eq. 6) of predictions (B, C, h, w); 1 is the conditional one itself.

    `proximal`, a quantile between 0 and 1, soft-thresholds the difference of the two at that quantile of its absolute values in
    each row, so that guidance acts only where the prompts differ most (Han et al. 2023, "Proximal Guidance", L1 norm). The
    authors' code calls this "l0", and the threshold subtracted twice "l1".
    """
    difference = conditional - unconditional
    if proximal is not None:
        require_quantile(proximal)
        limit = difference.abs().flatten(1).float().quantile(proximal, dim=1).to(difference.dtype).view(-1, 1, 1, 1)
        difference = difference.sign() * (difference.abs() - limit).clamp_min(0)
    return unconditional + scale * difference


def require_quantile(proximal: float) -> None:
    """Raise `TrajectoryError` for a quantile that is none."""
    if not isinstance(proximal, int | float) or not 0 < proximal < 1:
        raise TrajectoryError(f"proximal={proximal!r}; expected a quantile between 0 and 1, such as 0.7, or None")
