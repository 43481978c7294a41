"""Recovering the generation of a picture; knows torch, nothing of diffusers, prompts or edits."""

from inversion.ddim import ddim
from inversion.errors import (
    ModelMismatchError,
    NonFiniteError,
    OutputError,
    P2PSubjectError,
    ScheduleError,
    StepsError,
    TrajectoryError,
)
from inversion.schedule import Move, Schedule, ddim_move, to_epsilon
from inversion.trajectory import Trajectory
from inversion.walk import Predict, require_finite, walk

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
    "require_finite",
    "to_epsilon",
    "walk",
]
