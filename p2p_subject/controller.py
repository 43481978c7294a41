"""Compiles an edit for two token layouts and a number of steps into the tensors that attention needs at each step.

The published chain replace/refine -> reweight -> gate is linear in the values. With source maps A, target maps B, the
alignment M (S, T), covered c (T,), weights w (T,) and gate g (T,),

    edited = ((A M + B (1 - c)) w) g + B (1 - g) = A (M w g) + B ((1 - c) w g + 1 - g)

so `from_source` = M diag(w g) and `from_target` = (1 - c) w g + 1 - g, applied to the values of the target, give the edited
output without an edited map (Hertz et al. 2022, section 3.3, rearranged).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2p_subject.alignment import Alignment
from p2p_subject.edits import EditSpec, Window
from p2p_subject.errors import EditSpecError
from p2p_subject.prompts import word_and_index
from p2p_subject.tokens import TokenLayout


@dataclass(frozen=True)
class MapSink:
    """Receives the cross-attention maps of one network call: (rows, Q, T) float32, one entry per layer read.

    `rows` are the rows whose maps are wanted, `pixels` the number of pixels Q of the layers that are read.
    """

    rows: tuple[int, ...]
    pixels: int
    maps: list[Tensor] = field(default_factory=list)

    def mean(self) -> Tensor:
        """Average over layers, (rows, Q, T)."""
        return torch.stack(self.maps).mean(0)


@dataclass(frozen=True)
class Tap:
    """Receives queries (rows, H, Q, d) and keys (rows, H, Q or S, d) by the name of the layer.

    Of every cross-attention layer, and of the self-attention layers of at most `self_pixels` pixels.
    """

    self_pixels: int
    taken: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepControl:
    """What the attention layers do in one network call of `rows` rows.

    The last K rows are the conditional targets, K the length of `self_pixels`. They follow the source: row 0, or, where
    `recorded` is given, the queries and keys (1, H, Q, d) that it holds by layer. `from_source` (K, S, T) and `from_target`
    (K, T) change cross-attention's values (None: no cross-attention is changed). Self-attention of target k over at most
    `self_pixels[k]` pixels takes queries and keys of the source (0: none does). `attended` says, by the number Q of a layer's
    pixels, which of them a row's self-attention may look at, (R, 1, 1, Q) bool (None: all). `sink` receives maps, after the
    edit; `tap` queries and keys, before it.
    """

    rows: int
    from_source: Tensor | None = None
    from_target: Tensor | None = None
    self_pixels: tuple[int, ...] = ()
    attended: Mapping[int, Tensor] | None = None
    recorded: Mapping[str, tuple[Tensor, Tensor]] | None = None
    sink: MapSink | None = None
    tap: Tap | None = None


def steps_of(window: Window, steps: int) -> range:
    """Sampling steps of `steps` that lie in `window`; a window (0, f) holds the steps i < int(f * steps)."""
    # k / N * N can fall below k by rounding, and would lose a step.
    start, stop = (int(fraction * steps + 1e-9) for fraction in window)
    return range(start, stop)


def self_pixels(side: int | None, latent_size: tuple[int, int]) -> int:
    """Largest number of pixels of self-attention that follows the source, for latents (h, w).

    `side` is its larger side in latent pixels; None: half the latent's (32 of 64, the published choice at 512x512).
    """
    larger = max(latent_size)
    scale = (side or larger / 2) / larger
    # Rounded up, as a U-Net halves odd sides; less what rounding may have added.
    return math.ceil(latent_size[0] * scale - 1e-9) * math.ceil(latent_size[1] * scale - 1e-9)


@dataclass(frozen=True)
class Controller:
    """Edits of one source, compiled; `at(index, ...)` gives the control of a sampling step.

    For K edits: `matrices` (K, S, T) = M diag(w), `own` (K, T) = (1 - c) w, and `gates` (K, N, T), 1 at the steps and columns
    whose cross-attention follows the source; `self_gates` (K, N) and `self_pixels` (K,) the same for self-attention.
    """

    matrices: Tensor
    own: Tensor
    gates: Tensor
    self_gates: Tensor
    self_pixels: tuple[int, ...]
    open: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Gates stay on the CPU, so that whether a step is controlled need not wait for the GPU; this copy goes there once.
        object.__setattr__(self, "open", self.gates.to(self.own))

    @property
    def steps(self) -> int:
        """Number of sampling steps N."""
        return self.gates.shape[1]

    def crosses(self, index: int) -> bool:
        """Whether any edit changes cross-attention at step `index`."""
        return bool(self.gates[:, index].any())

    def borrows(self, index: int) -> int:
        """Largest number of pixels of self-attention that follows the source at step `index`; 0 for none."""
        return max(pixels * bool(gate) for pixels, gate in zip(self.self_pixels, self.self_gates[:, index]))

    def at(
        self,
        index: int,
        rows: int,
        sink: MapSink | None = None,
        recorded: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        attended: Mapping[int, Tensor] | None = None,
    ) -> StepControl:
        """Control of sampling step `index`; an edit that is outside its windows keeps its own attention."""
        gate, crosses = self.open[:, index], self.crosses(index)
        return StepControl(
            rows=rows,
            from_source=self.matrices * gate[:, None] if crosses else None,
            from_target=self.own * gate + (1 - gate) if crosses else None,
            self_pixels=tuple(p * int(own) for p, own in zip(self.self_pixels, self.self_gates[:, index])),
            attended=attended,
            recorded=recorded,
            sink=sink,
        )


def compile_edits(
    specs: Sequence[EditSpec],
    alignments: Sequence[Alignment],
    targets: Sequence[TokenLayout],
    steps: int,
    latent_size: tuple[int, int],
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Controller:
    """Compile edits of one source; alignments and target layouts in the order of `specs`.

    `latent_size` (h, w) fixes which self-attention layers follow the source; `first` is the sampling step that the edit begins
    with. Raises `EditSpecError` for weights of a word whose window holds none of the steps from there on.
    """
    gates = torch.stack([_gates(spec, target, steps) for spec, target in zip(specs, targets)])
    weights = torch.stack([_weights(spec, target, gate[first:]) for spec, target, gate in zip(specs, targets, gates)])
    matrices = torch.stack([alignment.matrix for alignment in alignments]) * weights[:, None]
    own = (1 - torch.stack([alignment.covered for alignment in alignments])) * weights
    self_gates = torch.zeros(len(specs), steps, dtype=torch.bool)
    for gate, spec in zip(self_gates, specs):
        gate[list(steps_of(spec.self_replace, steps))] = True
    pixels = tuple(self_pixels(spec.self_resolution, latent_size) for spec in specs)
    return Controller(matrices.to(device), own.to(device), gates, self_gates, pixels)


def _gates(spec: EditSpec, target: TokenLayout, steps: int) -> Tensor:
    """(N, T): whether cross-attention of a column follows the source at a step."""
    default, exceptions = spec.cross_windows()
    gates = torch.zeros(steps, target.length, dtype=torch.bool)
    gates[list(steps_of(default, steps))] = True
    for word, window in exceptions.items():
        columns = list(target.columns(*word_and_index(word)))
        gates[:, columns] = False
        for step in steps_of(window, steps):
            gates[step, columns] = True
    return gates


def _weights(spec: EditSpec, target: TokenLayout, gates: Tensor) -> Tensor:
    weights = torch.ones(target.length)
    for word, factor in spec.weights.items():
        columns = list(target.columns(*word_and_index(word)))
        if not gates[:, columns].any():
            raise EditSpecError(
                f"weights: {word!r} can have no effect: of the {len(gates)} steps that are run, its window of cross_replace="
                f"{spec.cross_replace} holds none; widen it, take more steps, skip fewer or leave the weight out"
            )
        weights[columns] = factor
    return weights
