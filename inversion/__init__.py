"""Recovering the generation of a picture; knows torch, nothing of diffusers, prompts or edits."""

from inversion.ddim import ddim
from inversion.direct import direct, direct_offsets
from inversion.edit_friendly import edit_friendly
from inversion.errors import (
    ModelMismatchError,
    NonFiniteError,
    OutputError,
    P2PSubjectError,
    ScheduleError,
    StepsError,
    TrajectoryError,
)
from inversion.fixed_point import fixed_point
from inversion.guidance import guide
from inversion.negative_prompt import negative_prompt
from inversion.null_text import null_text, null_text_batch
from inversion.reconstruct import reconstruct
from inversion.schedule import Move, Schedule, ddim_move, ddpm_sigma, to_epsilon
from inversion.trajectory import Trajectory
from inversion.walk import Predict, require_finite, trace, walk

__all__ = [
    "ModelMismatchError",
    "Move",
    "NonFiniteError",
    "OutputError",
    "P2PSubjectError",
    "Predict",
    "Schedule",
    "ScheduleError",
    "StepsError",
    "Trajectory",
    "TrajectoryError",
    "ddim",
    "ddim_move",
    "ddpm_sigma",
    "direct",
    "direct_offsets",
    "edit_friendly",
    "fixed_point",
    "guide",
    "negative_prompt",
    "null_text",
    "null_text_batch",
    "reconstruct",
    "require_finite",
    "to_epsilon",
    "trace",
    "walk",
]
