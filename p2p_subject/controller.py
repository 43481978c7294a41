"""Compiles an edit for two token layouts and a number of steps into the tensors that attention needs at each step.

The published chain replace/refine -> reweight -> gate is linear in the values. With source maps A, target maps B, the
alignment M (S, T), covered c (T,), weights w (T,) and gate g (T,),

    edited = ((A M + B (1 - c)) w) g + B (1 - g) = A (M w g) + B ((1 - c) w g + 1 - g)

so `from_source` = M diag(w g) and `from_target` = (1 - c) w g + 1 - g, applied to the values of the target, give the edited
output without an edited map (Hertz et al. 2022, section 3.3, rearranged).
"""

from __future__ import annotations

from collections.abc import Sequence
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
class StepControl:
    """What the attention layers do in one network call of `rows` rows.

    Row `targets[k]` follows row `sources[k]`. `from_source` (K, S, T) and `from_target` (K, T) change cross-attention's values
    (None: no cross-attention is changed). Self-attention of target k over at most `self_pixels[k]` pixels takes
    queries and keys of its source (0: none does). `sink` receives maps, after the edit.
    """

    rows: int
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    from_source: Tensor | None = None
    from_target: Tensor | None = None
    self_pixels: tuple[int, ...] = ()
    sink: MapSink | None = None


def within(window: Window, index: int, steps: int) -> bool:
    """Whether sampling step `index` of `steps` lies in `window`; a window (0, f) holds the steps i < int(f * steps)."""
    return int(window[0] * steps) <= index < int(window[1] * steps)


@dataclass(frozen=True)
class Controller:
    """Edits of one source, compiled; `at(index)` gives the control of a sampling step.

    Rows of a call: the source, the unconditional targets, the conditional targets.
    """

    steps: int
    specs: tuple[EditSpec, ...]
    matrices: Tensor
    from_target: Tensor
    self_pixels: tuple[int, ...]

    @property
    def rows(self) -> int:
        """U-Net rows of a controlled step."""
        return 1 + 2 * len(self.specs)

    def targets(self) -> tuple[int, ...]:
        """Rows of the conditional targets."""
        return tuple(range(1 + len(self.specs), self.rows))

    def at(self, index: int, sink: MapSink | None = None) -> StepControl:
        """Control of sampling step `index`; an edit that is outside its windows keeps its own attention."""
        cross = [within(spec.cross_replace, index, self.steps) for spec in self.specs]
        gate = self.from_target.new_tensor(cross)
        own = [within(spec.self_replace, index, self.steps) for spec in self.specs]
        return StepControl(
            rows=self.rows,
            sources=(0,) * len(self.specs),
            targets=self.targets(),
            from_source=self.matrices * gate[:, None, None] if any(cross) else None,
            from_target=self.from_target * gate[:, None] + (1 - gate[:, None]) if any(cross) else None,
            self_pixels=tuple(pixels * inside for pixels, inside in zip(self.self_pixels, own)),
            sink=sink,
        )


def compile_edits(
    specs: Sequence[EditSpec],
    alignments: Sequence[Alignment],
    targets: Sequence[TokenLayout],
    steps: int,
    latent_size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Controller:
    """Compile edits of one source; alignments and target layouts in the order of `specs`.

    `latent_size` (h, w) fixes which self-attention layers follow the source. Raises `EditSpecError` for weights in a window
    that holds none of the steps.
    """
    for spec in specs:
        if spec.weights and not any(within(spec.cross_replace, index, steps) for index in range(steps)):
            raise EditSpecError(
                f"weights={dict(spec.weights)} can have no effect: of {steps} steps, cross_replace={spec.cross_replace} holds "
                "none; widen it, take more steps or leave the weights out"
            )
    weights = torch.stack([_weights(spec, target) for spec, target in zip(specs, targets)])
    matrices = torch.stack([alignment.matrix for alignment in alignments]) * weights[:, None]
    own = (1 - torch.stack([alignment.covered for alignment in alignments])) * weights
    height, width = latent_size
    pixels = []
    for spec in specs:
        side = spec.self_resolution or max(height, width) // 2
        scale = side / max(height, width)
        pixels.append(round(height * scale) * round(width * scale))
    return Controller(steps, tuple(specs), matrices.to(device), own.to(device), tuple(pixels))


def _weights(spec: EditSpec, target: TokenLayout) -> Tensor:
    weights = torch.ones(target.length)
    for word, factor in spec.weights.items():
        weights[list(target.columns(*word_and_index(word)))] = factor
    return weights
