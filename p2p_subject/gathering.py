"""From a source to a recorded one: what `Editor.record` does with `recording.record`."""

from __future__ import annotations

import dataclasses
import warnings

import torch

from p2p_subject import checks, inverting
from p2p_subject.attention import map_size
from p2p_subject.controller import self_pixels, steps_of
from p2p_subject.models import Model
from p2p_subject.preparing import context_of, reader
from p2p_subject.progress import Callback, progress
from p2p_subject.recording import record
from p2p_subject.source import Source


def gather(
    model: Model,
    source: Source,
    cross_window: checks.Window,
    self_window: checks.Window,
    self_resolution: int | None,
    budget: int,
    device: torch.device | str | None,
    callback: Callback | None,
) -> Source:
    """Gather what edits of a source borrow; see `Editor.record`."""
    trajectory = source.trajectory
    model.require_controllable()
    trajectory.require_model(model.fingerprint)
    model.require_structure(source.structure)
    if trajectory.replay:
        inverting.require_recordable(trajectory.method)
    if self_resolution is not None:
        checks.whole(self_resolution, "self_resolution", 1, "1 or more latent pixels, or None")
    steps, size = trajectory.schedule.steps, tuple(trajectory.latents.shape[-2:])
    cross, own = steps_of(cross_window, steps).stop, steps_of(self_window, steps).stop
    height, width = map_size(model.unet, size)
    pixels, place = self_pixels(self_resolution, size), device or model.device
    with model.controlled():
        read = reader(model, trajectory, context_of(model, source), callback)
        recording = record(read, cross, own, pixels, height * width, budget, place, progress=progress("recording"))
    held = (0, 0) if recording is None else (recording.cross_steps, recording.self_steps)
    if held[0] < cross or held[1] < own:
        warnings.warn(
            f"the recording holds cross-attention of {held[0]} of {cross} steps and self-attention of {held[1]} of {own}: "
            f"no more fits in {budget} bytes; edits run a third U-Net row in the others. Give a larger budget",
            stacklevel=4,
        )
    return dataclasses.replace(source, recording=recording)
