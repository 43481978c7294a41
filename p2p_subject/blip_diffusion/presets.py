"""Settings of generation that were published, as keyword arguments of a pipeline's call: `pipeline(..., **PAPER)`."""

from __future__ import annotations

from typing import Any

PAPER: dict[str, Any] = {"num_inference_steps": 100, "guidance_scale": 7.5, "prompt_strength": 1.0, "prompt_reps": 1}
"""Those of the paper (Li et al. 2023, section 4), which samples by PNDM: the scheduler that the public checkpoint has."""
RELEASED: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 7.5, "prompt_strength": 1.0, "prompt_reps": 20}
"""Those of the scripts that came with the public checkpoint, where the prompt is repeated to strengthen it."""
