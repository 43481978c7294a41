"""Negative-prompt inversion: guidance against the source's own prompt, without optimisation (Miyake et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from inversion.ddim import ddim
from inversion.guidance import require_quantile
from inversion.schedule import Schedule
from inversion.trajectory import Trajectory
from inversion.walk import Predict


def negative_prompt(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    context: Tensor,
    *,
    pooled: Tensor | None = None,
    proximal: float | None = None,
    **record: Any,
) -> Trajectory:
    """The path of `ddim`, with the source's conditional context (1, L, D) as the unconditional one of every step.

    `pooled` (1, P) is that context's pooled text, where the model has one.

    With both contexts the same, guidance cancels for the source at any scale; a target is guided by what its prompt says beyond
    the source's. `proximal` (a quantile, such as 0.7) drops the guidance that is smaller (Han et al. 2023), see `guide`.
    `record` is what `ddim` takes: prompt, fingerprint, progress.
    """
    if proximal is not None:
        require_quantile(proximal)
    path = ddim(predict, latents, schedule, **record)
    null = {"null_embeddings": context.float(), "null_pooled": None if pooled is None else pooled.float()}
    return replace(path, method="negative_prompt", replay=False, proximal=proximal, **null)
