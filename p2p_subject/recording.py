"""What later edits borrow of a source, recorded once: its attention's queries and keys, and its words' maps.

An edit follows the source through queries and keys of its attention (`controller`). They depend on the source alone, and the
steps of a stored trajectory are independent of each other, so one batched pass gathers them for every later edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inversion import TrajectoryError
from p2p_subject.controller import MapSink, StepControl, Tap

Layers = dict[str, tuple[Tensor, Tensor]]
PREFIX = "recording."


def is_cross(layer: str) -> bool:
    """Whether an attention layer of a U-Net, by its name, attends to the prompt."""
    return ".attn2" in layer


# Compared by identity, as trajectories are.
@dataclass(frozen=True, eq=False)
class Recording:
    """Queries and keys of a source's steps, counted from the noise.

    `queries[layer]` (n, H, Q, d): cross-attention of the first n steps, self-attention of the first m, of layers of at most
    `self_pixels` pixels. `keys[layer]`: (1, H, S, d) of cross-attention, the same at every step; (m, H, Q, d) of
    self-attention. `maps` (n, Q, T) float32: the cross-attention maps that masks are read from. In the network's precision.
    """

    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    maps: Tensor
    self_pixels: int
    self_steps: int = field(init=False)

    def __post_init__(self) -> None:
        own = [len(query) for layer, query in self.queries.items() if not is_cross(layer)]
        object.__setattr__(self, "self_steps", min(own, default=0))

    @property
    def cross_steps(self) -> int:
        """Number of steps whose cross-attention is held."""
        return len(self.maps)

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def holds(self, index: int, cross: bool, self_pixels: int) -> bool:
        """Whether step `index` can be edited without the source: its cross-attention, and self-attention up to that size."""
        return (not cross or index < self.cross_steps) and (
            not self_pixels or (index < self.self_steps and self_pixels <= self.self_pixels)
        )

    def at(self, index: int, cross: bool, self_pixels: int, like: Tensor) -> Layers:
        """Queries and keys (1, H, Q or S, d) of step `index` by layer: those that the step borrows, as `like` is placed."""
        wanted = [layer for layer in self.queries if (cross if is_cross(layer) else self_pixels > 0)]
        return {
            layer: (
                self.queries[layer][index : index + 1].to(like),
                (self.keys[layer] if is_cross(layer) else self.keys[layer][index : index + 1]).to(like),
            )
            for layer in wanted
        }

    def maps_at(self, index: int, device: torch.device) -> Tensor:
        """Maps of step `index`, (1, Q, T)."""
        return self.maps[index : index + 1].to(device)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as a safetensors file holds it; `from_tensors` is the inverse."""
        named = {f"{PREFIX}query.{layer}": query for layer, query in self.queries.items()}
        named |= {f"{PREFIX}key.{layer}": key for layer, key in self.keys.items()}
        return named | {f"{PREFIX}maps": self.maps, f"{PREFIX}self_pixels": torch.tensor(self.self_pixels)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> Recording | None:
        """Read what `tensors` gave from among others; None if there is none, `TrajectoryError` if it is incomplete."""
        own = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
        if not own:
            return None
        queries = {key.removeprefix("query."): value for key, value in own.items() if key.startswith("query.")}
        keys = {key.removeprefix("key."): value for key, value in own.items() if key.startswith("key.")}
        if queries.keys() != keys.keys() or not queries or not {"maps", "self_pixels"} <= own.keys():
            raise TrajectoryError(f"{name}: the recording in it is incomplete; record the source again")
        steps = len(own["maps"])
        for layer, query in queries.items():
            key = keys[layer]
            counts = (len(query) == steps and len(key) == 1) if is_cross(layer) else len(query) == len(key)
            fits = query.ndim == key.ndim == 4 and query.shape[1] == key.shape[1] and query.shape[3] == key.shape[3]
            if not (counts and fits and query.isfinite().all() and key.isfinite().all()):
                raise TrajectoryError(
                    f"{name}: the recording of {layer} is damaged: queries {tuple(query.shape)}, keys {tuple(key.shape)} for "
                    f"{steps} steps; record the source again"
                )
        if own["self_pixels"].numel() != 1 or own["maps"].ndim != 3 or not own["maps"].isfinite().all():
            raise TrajectoryError(f"{name}: the maps of the recording in it are damaged; record the source again")
        return cls(queries, keys, own["maps"], int(own["self_pixels"]))


def record(
    read: Callable[[range, StepControl], None],
    cross_steps: int,
    self_steps: int,
    self_pixels: int,
    map_pixels: int,
    budget: int,
    device: torch.device | str,
    batch: int = 4,
    progress: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> Recording | None:
    """Gather a recording of the first steps of a source, as many as `budget` bytes hold, on `device`; None if none do.

    `read(steps, control)` runs the network once with a row for each of those sampling steps, under `control`. Steps are
    gathered `batch` at a time.
    """
    queries: dict[str, list[Tensor]] = {}
    keys: dict[str, list[Tensor]] = {}
    maps: list[Tensor] = []
    used, full = 0, False
    for steps in progress(list(_batches(max(cross_steps, self_steps), batch))):
        if full:
            break
        taken, sink = Tap(self_pixels), MapSink(tuple(range(len(steps))), map_pixels)
        read(steps, StepControl(rows=len(steps), tap=taken, sink=sink))
        maps_of_steps = sink.mean()
        for row, index in enumerate(steps):
            wanted = {
                layer: pair for layer, pair in taken.taken.items() if index < (cross_steps if is_cross(layer) else self_steps)
            }
            # Keys of cross-attention are the same at every step, and kept once.
            new = [k[row] for layer, (_, k) in wanted.items() if not is_cross(layer) or layer not in keys]
            if index < cross_steps:
                new.append(maps_of_steps[row])
            size = sum(tensor.nbytes for tensor in new) + sum(q[row].nbytes for q, _ in wanted.values())
            if used + size > budget:
                full = True
                break
            used += size
            for layer, (query, key) in wanted.items():
                queries.setdefault(layer, []).append(query[row].to(device))
                if not is_cross(layer) or layer not in keys:
                    keys.setdefault(layer, []).append(key[row].to(device))
            if index < cross_steps:
                maps.append(maps_of_steps[row].to(device))
    if not queries:
        return None
    # Taken out one by one: what is stacked need not be held twice.
    return Recording(
        {layer: torch.stack(queries.pop(layer)) for layer in list(queries)},
        {layer: torch.stack(keys.pop(layer)) for layer in list(keys)},
        torch.stack(maps) if maps else torch.empty(0, map_pixels, 0),
        self_pixels,
    )


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
