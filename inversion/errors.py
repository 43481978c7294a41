"""Errors of the whole project; every one derives from `P2PSubjectError`, so one `except` catches them all."""

from __future__ import annotations


class P2PSubjectError(Exception):
    """Base of every error that a user of this project can act on."""


class StepsError(P2PSubjectError, ValueError):
    """The number of steps cannot make a schedule."""


class ScheduleError(P2PSubjectError, ValueError):
    """The noise schedule of a model cannot be read or is of an unsupported kind."""


class NonFiniteError(P2PSubjectError, ArithmeticError):
    """NaN or infinity appeared in latents or in a network's prediction."""


class TrajectoryError(P2PSubjectError, ValueError):
    """A stored trajectory is incomplete or its parts do not fit together."""


class OutputError(P2PSubjectError, OSError):
    """A result cannot be written where it was asked for."""


class ModelMismatchError(P2PSubjectError, ValueError):
    """Something was made with another model or another noise schedule than the one it is used with."""
