"""Fine-tuning from pictures to a result: everything is checked, then the subject embedded once, then the U-Net trained.

After BLIP-Diffusion (Li et al. 2023, on fine-tuning): the mean embedding of the pictures stands in the prompt from the first
step on, the text encoder stays as it is, and the U-Net learns with AdamW at a constant rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from p2p_subject.finetuning import network
from p2p_subject.finetuning.folder import RunFolder, State
from p2p_subject.finetuning.grids import progress_grid
from p2p_subject.finetuning.pictures import Contexts, Views, encode
from p2p_subject.finetuning.plan import Plan, plan
from p2p_subject.finetuning.result import Finetuned, Row, load_finetuned, with_unet
from p2p_subject.finetuning.settings import Settings
from p2p_subject.finetuning.trainer import Trainer
from p2p_subject.models import Model
from p2p_subject.outputs import save_image
from p2p_subject.subject import EmbeddedSubject

EMBEDDING = "embedding"
"""Name of the subject's embedding among the weights that change; no weight of a U-Net is called so."""


@dataclass(eq=False)
class Progress:
    """How far a run is: steps taken, figures of each, and the best weights on held-out pictures."""

    step: int = 0
    history: list[Row] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float | None = None
    misses: int = 0

    def measured(self, loss: float, weights: dict[str, nn.Parameter]) -> None:
        """Note a loss on held-out pictures, and the weights if it is the lowest so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
            self.best_step, self.best_loss, self.misses = self.step, loss, 0
        else:
            self.misses += 1

    def state(self) -> State:
        """Everything, as a checkpoint keeps it."""
        values = {name: getattr(self, name) for name in ("step", "history", "best_step", "best_loss", "misses")}
        return {f"best.{name}": weight for name, weight in self.best.items()}, values

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> Progress:
        """What `state` gave."""
        best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
        return cls(best=best, **values)


def finetune(
    model: Model,
    pictures: Any,
    category: str,
    *,
    masks: Any = None,
    validation: Any = None,
    prior: Any = None,
    out: str | Path | None = None,
    callback: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Finetuned:
    """Fine-tune a model on pictures of a subject; see `Editor.finetune`."""
    made = plan(model, pictures, category, masks, validation, prior, Settings.of(**options))
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None:
        folder.begin(made.identity)
        if folder.finished:
            folder.tidy()
            return load_finetuned(folder.path, base=model)
    run = _Run(model, made, folder)
    run.train(callback)
    result = run.result()
    if folder is not None:
        result.write(folder.path)
        folder.tidy()
    return result


class _Run:
    """A fine-tuning under way."""

    def __init__(self, model: Model, made: Plan, folder: RunFolder | None) -> None:
        self.model, self.plan, self.folder = model, made, folder
        self.settings = settings = made.settings
        kept = None if folder is None else folder.load()
        with torch.no_grad():
            # The only pass of the multimodal encoder; a run that goes on has it from its checkpoint.
            found = model.embed(made.subject).float() if kept is None else kept[0]["subject"].to(model.device)
        self.embedding = nn.Parameter(found, requires_grad=settings.train_embedding)
        self.unet = network.copy_of(model, share=settings.method == "lora")
        if settings.method == "lora":
            weights = network.add_lora(self.unet, settings.rank, settings.lora_alpha, settings.seed)
        else:
            weights = network.unlock(self.unet)
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        contexts = subject_contexts(model, self.embedding)
        sets = [Views(encode(model, made.learned), made.prompts, contexts)]
        if made.prior is not None:
            drawn = made.prior.pictures(model, made.plain[0], None if folder is None else folder.run / "prior")
            sets.append(Views(encode(model, drawn), made.plain, plain_contexts(model), settings.prior_weight))
        self.held_out = Views(encode(model, made.held_out), made.prompts, contexts) if made.held_out else None
        half = model.unet.dtype
        learned_embedding = [({EMBEDDING: self.embedding}, settings.embedding_rate)] if settings.train_embedding else []
        self.trainer = Trainer(
            unet=self.unet,
            groups=[(weights, settings.rate), *learned_embedding],
            sets=sets,
            scheduler=model.noise_levels(),
            batch=settings.batch,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            half=None if half == torch.float32 else half,
        )
        self.progress = Progress()
        if kept is not None:
            self.trainer.restore(kept[0], kept[1]["trainer"])
            self.progress = Progress.restored(kept[0], kept[1]["progress"])

    def train(self, callback: Callable[[int, float], None] | None = None) -> None:
        """Take the steps that are left, until the last or until held-out pictures stop to gain."""
        settings, progress = self.settings, self.progress
        bar = tqdm(total=settings.steps, initial=progress.step, desc="fine-tuning", disable=None, delay=2, leave=False)
        with bar:
            if progress.step == 0 and self.held_out is not None:
                progress.history.append({"step": 0, "validation": self._measure()})
            while progress.step < settings.steps and not self._stopped:
                loss = self.trainer.step(progress.step)
                progress.step += 1
                row = {"step": progress.step, "loss": loss}
                last = progress.step == settings.steps
                if self.held_out is not None and (last or progress.step % settings.validate_every == 0):
                    row["validation"] = self._measure()
                progress.history.append(row)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if last or self._stopped or progress.step % settings.checkpoint_every == 0:
                    self._checkpoint()
                if callback is not None:
                    callback(progress.step, loss)

    @property
    def _stopped(self) -> bool:
        return 0 < self.settings.patience <= self.progress.misses

    def _measure(self) -> float:
        loss = self.trainer.held_out_loss(self.held_out)
        self.progress.measured(loss, self.trainer.weights)
        return loss

    def _checkpoint(self) -> None:
        """Keep everything that the next step depends on, and draw what the model can do at this step."""
        if self.folder is None:
            return
        trained, values = self.trainer.state()
        best, reached = self.progress.state()
        state = {**trained, **best, "subject": self.embedding.detach().clone()}, {"trainer": values, "progress": reached}
        now = with_unet(self.model, self.unet, self._subject(), self._name())
        if self.settings.method == "lora":
            # Few MB each, so that the one whose grid looks best can be had. U-Nets are GB: of these the last is kept alone.
            made = Finetuned(now, self.settings, self.plan.base, self.progress.step, tuple(self.progress.history))
            made.write(self.folder.run / f"step-{self.progress.step:05d}")
        sheet = progress_grid(now, self.plan.learned, self.plan.grid, self.settings.seed, f"step {self.progress.step}")
        save_image(sheet, self.folder.run / f"grid-{self.progress.step:05d}.png")
        # Last: a run that was killed before goes on from the checkpoint before, and makes these again.
        self.folder.save(state)

    def _subject(self) -> EmbeddedSubject:
        return EmbeddedSubject(self.embedding, self.plan.subject.category)

    def _name(self) -> str:
        return f"{self.model.name} + {self.plan.subject.category}"

    def result(self) -> Finetuned:
        """The tuned model with the best weights, or without held-out pictures the last."""
        if self.progress.best:
            self.trainer.put(self.progress.best)
        self.unet.disable_gradient_checkpointing()
        if self.settings.method == "full":
            network.convert([*self.unet.parameters(), *self.unet.buffers()], self.model.unet.dtype)
        self.unet.requires_grad_(False)
        step = self.progress.best_step if self.progress.best else self.progress.step
        tuned = with_unet(self.model, self.unet, self._subject(), self._name())
        return Finetuned(tuned, self.settings, self.plan.base, step, tuple(self.progress.history))


def subject_contexts(model: Model, embedding: Tensor) -> Contexts:
    """What the U-Net is told of prompts with a subject (1, Nq, D) in them; encoded once, unless the embedding is trained."""

    def encoded(prompt: str) -> Tensor:
        return model.encode(model.layout(prompt, subject=True), embedding).tokens

    return _stacked(encoded if embedding.requires_grad else cache(encoded))


def plain_contexts(model: Model) -> Contexts:
    """What the U-Net is told of prompts as they are."""
    return _stacked(cache(lambda prompt: model.encode(model.layout(prompt)).tokens))


def _stacked(encoded: Callable[[str], Tensor]) -> Contexts:
    def contexts(prompts: Sequence[str]) -> Tensor:
        return torch.cat([encoded(prompt) for prompt in prompts])

    return contexts
