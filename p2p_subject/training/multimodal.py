"""Multimodal representation learning, the first stage of BLIP-Diffusion's pre-training (Li et al. 2023, section 3.1).

The three objectives of BLIP-2 (Li et al. 2023, section 3.1 there) on pairs of picture and caption, over a frozen image encoder:
contrast (ITC), where queries and text do not see each other; image-grounded text generation (ITG), where text is causal and
sees the queries; matching (ITM), where all see all, with hard negatives. They differ in nothing but the attention mask and
the head, so the functions that make the masks are most of what is here.

Letters: B rows, Nq queries, T word pieces of a caption, D the Q-Former's width, E that of the contrast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.weights import read_tensors, require_safetensors
from p2p_subject.errors import ArgumentError, ModelError
from p2p_subject.training.loop import Batch, Evaluate
from p2p_subject.training.pictures import CaptionedPictures
from p2p_subject.training.scenes import caption_pairs

if TYPE_CHECKING:
    from transformers import BertTokenizer

SMOOTHING = 0.1
"""Label smoothing of text generation, as BLIP-2 has it."""


def unimodal(text: Tensor, queries: int) -> Tensor:
    """Mask (B, Nq + T, Nq + T) bool under which queries and text do not see each other; `text` (B, T) is 0 for padding."""
    mask = bidirectional(text, queries)
    mask[:, :queries, queries:] = mask[:, queries:, :queries] = False
    return mask


def causal(text: Tensor, queries: int) -> Tensor:
    """Mask (B, Nq + T, Nq + T) bool under which queries see queries, and text sees queries and the text before it."""
    mask = bidirectional(text, queries)
    mask[:, :queries, queries:] = False
    mask[:, queries:, queries:] &= torch.ones(text.shape[1], text.shape[1], dtype=torch.bool, device=text.device).tril()
    return mask


def bidirectional(text: Tensor, queries: int) -> Tensor:
    """Mask (B, Nq + T, Nq + T) bool under which all see all that is no padding; padding sees the first word piece too."""
    seen = F.pad(text.bool(), (queries, 0), value=True)
    return seen[:, None].expand(-1, seen.shape[1], -1).clone()


def contrast(similarity: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of (B, N) similarities, in logits, with every pair that is the `same` (B, N) bool an equal target."""
    target = same / same.sum(1, keepdim=True)
    return -(target * similarity.log_softmax(1)).sum(1).mean()


def hard_negatives(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draw, for each row of (B, N) similarities, another that is alike but not the `same` (B, N) bool.

    Returns (rows, drawn), int64 of one length: the rows that have such another, and it.
    """
    weights = similarity.float().softmax(1).masked_fill(same, 0)
    weights = weights + 1e-6 * ~same  # So that rows whose softmax lies on their own pair have something to draw.
    rows = (~same).any(1).nonzero()[:, 0]
    return rows, torch.multinomial(weights[rows], 1)[:, 0] if len(rows) else rows


class _Gather(torch.autograd.Function):
    """The rows of all processes, in the order of their ranks; gradients go back to the process that the rows came from."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


class MultimodalTrainer(nn.Module):
    """A Q-Former with the heads of the stage; `start` is the id of the word piece "[DEC]" that begins a generated text."""

    def __init__(self, qformer: Blip2QFormerModel, start: int, contrast_width: int = 256) -> None:
        super().__init__()
        width = qformer.config.qformer_config.hidden_size
        self.qformer, self.start = qformer, start
        self.picture_head, self.text_head = nn.Linear(width, contrast_width), nn.Linear(width, contrast_width)
        self.match_head = nn.Linear(width, 2)
        self.word_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(qformer.config.qformer_config.vocab_size))
        self.temperature = nn.Parameter(torch.tensor(0.07))
        qformer.visual_encoder.requires_grad_(False)
        # The way into the text encoder is learned in stage two.
        qformer.proj_layer.requires_grad_(False)

    def train(self, mode: bool = True) -> MultimodalTrainer:
        """As of every module; the image encoder stays in evaluation mode."""
        super().train(mode)
        self.qformer.visual_encoder.eval()
        return self

    @property
    def queries(self) -> int:
        """How many queries Nq there are."""
        return self.qformer.config.num_query_tokens

    def forward(self, references: Tensor, text_ids: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        """Losses of pairs: normalised pictures (B, 3, S, S), word pieces (B, T) int64 with [CLS] first, and their mask (B, T).

        Beside the losses, how often each task was done right in this batch.
        """
        with torch.no_grad():
            features = self.qformer.visual_encoder(references)
        itc, similarities, same, recall = self.contrast(features, text_ids, text_mask)
        itm, matched = self.match(features, text_ids, text_mask, similarities, same)
        itg, told = self.tell(features, text_ids, text_mask)
        losses = {"contrast": itc, "matching": itm, "generation": itg}
        return {"loss": itc + itm + itg, **losses, "recall": recall, "matched": matched, "told": told}

    @property
    def together(self) -> bool:
        """Whether the rows of several processes are one batch. Evaluation runs in one process, while the others wait."""
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def everyones(self, rows: Tensor) -> Tensor:
        """Rows (B, ...) of all processes in the order of their ranks, (N, ...)."""
        return _Gather.apply(rows) if self.together else rows

    def contrast(
        self, features: Tensor, text_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """ITC: the loss, similarities (B, N) of this process's pictures to all texts and of its texts to all pictures, which
        pairs are the same (B, N), and recall at 1.

        The similarity is that of the query nearest to the text. Equal captions are positives of each other's pictures.
        """
        queries, text = self.embed(features, text_ids, text_mask)
        # In one call, so that the ways back of two cannot cross.
        every_query, every_text = self.everyones(torch.cat([queries, text[:, None]], 1)).split([self.queries, 1], 1)
        same = (text_ids[:, None] == self.everyones(text_ids)[None]).all(-1)
        scale = self.temperature.clamp(0.001, 0.5)
        # What bfloat16 can tell apart is more than similarities differ by.
        with torch.autocast(features.device.type, enabled=False):
            to_text = torch.einsum("bqe,ne->bnq", queries, every_text[:, 0]).amax(-1) / scale
            to_picture = torch.einsum("be,nqe->bnq", text, every_query).amax(-1) / scale
        loss = (contrast(to_text, same) + contrast(to_picture, same)) / 2
        recall = same.gather(1, to_text.argmax(1, keepdim=True)).float().mean()
        return loss, (to_text.detach(), to_picture.detach()), same, recall

    def embed(self, features: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures, one a query (B, Nq, E), and of texts (B, E), which do not see each other."""
        hidden = self.qformer.encode(features, text_ids, unimodal(text_mask, self.queries))
        queries = F.normalize(self.picture_head(hidden[:, : self.queries]).float(), dim=-1)
        return queries, F.normalize(self.text_head(hidden[:, self.queries]).float(), dim=-1)

    def match(
        self, features: Tensor, text_ids: Tensor, text_mask: Tensor, similarities: tuple[Tensor, Tensor], same: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ITM: the loss of true pairs and of hard negatives, a text for each picture and a picture for each text, drawn from
        those of all processes; `similarities` and `same` are `contrast`'s."""
        having, texts = hard_negatives(similarities[0], same)
        wanting, pictures = hard_negatives(similarities[1], same)
        picture = torch.cat([features, features[having], self.everyones(features)[pictures]])
        ids, mask = (torch.cat([own, self.everyones(own)[texts], own[wanting]]) for own in (text_ids, text_mask))
        logits = self.matching(picture, ids, mask)
        true = (torch.arange(len(picture), device=features.device) < len(features)).long()
        return F.cross_entropy(logits, true), (logits.argmax(1) == true).float().mean()

    def matching(self, features: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits (B, 2) of no match and match; the mean over the queries."""
        hidden = self.qformer.encode(features, text_ids, bidirectional(text_mask, self.queries))
        return self.match_head(hidden[:, : self.queries]).float().mean(1)

    def tell(self, features: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """ITG: the loss of each next word piece, and the share of them that is right."""
        begun = text_ids.clone()
        begun[:, 0] = self.start
        hidden = self.qformer.encode(features, begun, causal(text_mask, self.queries))[:, self.queries : -1]
        logits = self.word_head(hidden) @ self.qformer.embeddings.word_embeddings.weight.T + self.word_bias
        asked = text_mask[:, 1:].bool()
        logits, true = logits[asked].float(), text_ids[:, 1:][asked]
        return F.cross_entropy(logits, true, label_smoothing=SMOOTHING), (logits.argmax(1) == true).float().mean()


def fresh(pretrained: Blip2QFormerModel, pieces: BertTokenizer, bert: Path | None = None) -> MultimodalTrainer:
    """A trainer whose Q-Former has the sizes and the image encoder of `pretrained`, and begins anew, or with a BERT."""
    qformer = Blip2QFormerModel(pretrained.config)
    qformer.visual_encoder.load_state_dict(pretrained.visual_encoder.state_dict())
    learner = MultimodalTrainer(qformer, pieces.convert_tokens_to_ids("[DEC]"))
    if bert is not None:
        start_from_bert(qformer, bert)
        start_words_from_bert(learner, bert)
    return learner


GALLERY = 64
"""Pictures that a caption is searched among when a run is measured."""

Pairs = dict[str, Callable[[], Iterator[Batch]]]
"""Sets of pairs to measure on, by name, each as what yields its batches."""


def world_pairs(pieces: BertTokenizer, count: int = 256) -> Pairs:
    """New scenes of known looks ("validation"), and of art held out of training ("new_art")."""

    def of(split: str) -> Iterator[Batch]:
        for first in range(0, count, GALLERY):
            yield caption_pairs(pieces, split, range(first, first + GALLERY), [True] * GALLERY)

    return {split: partial(of, split) for split in ("validation", "new_art")}


def folder_pairs(dataset: CaptionedPictures, count: int = 1024) -> Pairs:
    """The first pictures of a folder, in galleries of one size; `ArgumentError` for fewer than two."""
    size = min(GALLERY, len(dataset))
    if size < 2:
        raise ArgumentError(
            f"{len(dataset)} picture to measure on; expected two or more, for there is nothing to confuse it with"
        )

    def of() -> Iterator[Batch]:
        for last in range(size, min(count, len(dataset)) + 1, size):
            yield default_collate([dataset[at] for at in range(last - size, last)])

    return {"validation": of}


def evaluation(build: Callable[[], MultimodalTrainer], pairs: Pairs, device: str = "cpu") -> Evaluate:
    """What is told of a run at its checkpoints: how often the tasks are done right on pairs that it is not trained on."""

    @torch.no_grad()
    def evaluate(step: int, folder: Path) -> dict[str, float]:
        trainer = build().to(device).eval()
        trainer.load_state_dict(load_file(folder / "ema.safetensors"))
        figures = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, batches in pairs.items():
                parts = [trainer(**{key: value.to(device) for key, value in batch.items()}) for batch in batches()]
                for task in ("recall", "matched", "told"):
                    figures[f"{name} {task}"] = float(torch.stack([part[task] for part in parts]).mean())
        return figures

    return evaluate


@torch.no_grad()
def start_from_bert(qformer: Blip2QFormerModel, folder: Path) -> None:
    """Begin a Q-Former with the weights of a BERT, as BLIP-2 does; cross-attention and queries, which it lacks, stay.

    Text and queries begin with the same feed-forward parts. Word pieces beyond BERT's, such as "[DEC]", stay as they are.
    Raises `ModelError` for a BERT of other sizes, and for files that are missing or damaged.
    """
    saved, own = _bert(folder), qformer.state_dict()
    for name, value in own.items():
        if name == "query_tokens" or "crossattention" in name or not name.startswith(("embeddings.", "encoder.")):
            continue
        wanted = name.replace("attention.attention.", "attention.self.").replace("_query.", ".")
        if name == "embeddings.position_ids":
            continue
        if wanted not in saved:
            raise ModelError(f"{folder} holds no {wanted}; expected a BERT with the Q-Former's number of layers")
        given = saved[wanted]
        part = value[: len(given)] if value.ndim == 2 and name.startswith("embeddings.") else value
        given = given[: len(part)]
        if given.shape != part.shape:
            raise ModelError(f"{folder}: {wanted} has shape {tuple(given.shape)}; the Q-Former's is {tuple(part.shape)}")
        part.copy_(given)


@torch.no_grad()
def start_words_from_bert(trainer: MultimodalTrainer, folder: Path) -> None:
    """Begin the head that tells word pieces with that of a BERT, where its folder holds it."""
    saved = _bert(folder)
    for part, name in ((trainer.word_head[0], "transform.dense"), (trainer.word_head[2], "transform.LayerNorm")):
        for kind, value in part.named_parameters():
            if (given := saved.get(f"cls.predictions.{name}.{kind}")) is not None:
                value.copy_(given)
    if (bias := saved.get("cls.predictions.bias")) is not None:
        trainer.word_bias[: len(bias)] = bias[: len(trainer.word_bias)]


def _bert(folder: Path) -> dict[str, Tensor]:
    """The weights of a BERT by the names that they have today."""
    saved = {}
    for name, value in read_tensors(require_safetensors(folder, "model")).items():
        # The public files are as old as the names that these once had.
        renamed = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        saved[renamed.removeprefix("bert.")] = value
    return saved
