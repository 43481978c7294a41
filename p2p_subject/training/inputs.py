"""What of a BLIP-Diffusion model its training data depends on: tokenizers, image processor and sizes, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig, ContextCLIPTextConfig
from p2p_subject.blip_diffusion.loading import LoadOptions, load_component, model_folder
from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.errors import ArgumentError, ModelError, SubjectError

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizerFast

    from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor

_PARTS = ("tokenizer", "text_encoder", "qformer", "image_processor", "vae", "unet")


@dataclass(frozen=True)
class ModelInputs:
    """What of a BLIP-Diffusion model its training data depends on; no weights are read.

    `window` L, `queries` Nq, `words` the Q-Former's positions for text, `factor` pixels a side of one latent, `resolution`
    pixels a side of the pictures that its U-Net draws, `mean` and `std` what the model has in place of the processor's.
    """

    tokenizer: CLIPTokenizerFast
    word_pieces: BertTokenizer
    image_processor: BlipImageProcessor
    window: int
    queries: int
    words: int
    factor: int
    resolution: int
    mean: Sequence[float] | None
    std: Sequence[float] | None

    @classmethod
    def of(cls, name: str | Path, qformer_tokenizer: str | Path | None = None) -> ModelInputs:
        """Read the configurations and tokenizers of a model folder or hub name, whose U-Net is square; raises `ModelError`.

        `qformer_tokenizer`: the word pieces' folder or name, for folders that lack them.
        """
        folder = model_folder(name, list(_PARTS), None)
        options = LoadOptions(qformer_tokenizer=qformer_tokenizer)
        text = ContextCLIPTextConfig.from_dict(read_json(folder / "text_encoder" / "config.json"))
        qformer = Blip2QFormerConfig.from_dict(read_json(folder / "qformer" / "config.json"))
        index = read_json(folder / "model_index.json")
        own = read_json(folder / "unet" / "config.json").get("sample_size")
        if not isinstance(own, int):
            raise ModelError(f"{folder}: the U-Net's sample_size is {own!r}; expected one number, the side of a square latent")
        factor = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
        return cls(
            tokenizer=load_component("tokenizer", folder, options),
            word_pieces=load_component("qformer_tokenizer", folder, options),
            image_processor=load_component("image_processor", folder, options),
            window=text.max_position_embeddings,
            queries=qformer.num_query_tokens,
            words=qformer.qformer_config.max_position_embeddings,
            factor=factor,
            resolution=factor * own,
            mean=index.get("mean"),
            std=index.get("std"),
        )

    @property
    def side(self) -> int:
        """S, the side of the encoder's square pictures in pixels."""
        return self.image_processor.output_size[0]

    def reference(self, picture: Any) -> Tensor:
        """A picture as the encoder takes it, (3, S, S) float32, normalised."""
        return self.image_processor.preprocess(picture, image_mean=self.mean, image_std=self.std)[0]

    def categories(self, subjects: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Word pieces and mask of each category, (T,) int64, padded to the longest; `SubjectError` for one that is too long."""
        names = sorted(set(subjects))
        words = self.word_pieces(names, padding=True, return_tensors="pt")
        if words.input_ids.shape[1] > self.words:
            longest = names[int(words.attention_mask.sum(1).argmax())]
            raise SubjectError(f"the subject {longest!r:.60} has more word pieces than the Q-Former reads ({self.words})")
        return {name: (ids, mask) for name, ids, mask in zip(names, words.input_ids, words.attention_mask)}

    def captions(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor, list[bool]]:
        """Word pieces (N, T) int32 of captions between [CLS] and [SEP], padded to T = `length`; how many each row has, (N,);
        whether it was cut at its end.

        Raises `ArgumentError` for a length that the Q-Former cannot read.
        """
        if not 3 <= length <= self.words:
            raise ArgumentError(f"length={length}; expected 3 to {self.words} word pieces, what this Q-Former reads")
        encode = self.word_pieces
        whole = encode(list(texts), verbose=False).input_ids
        cut = [ids if len(ids) <= length else [*ids[: length - 1], encode.sep_token_id] for ids in whole]
        rows = [ids + [encode.pad_token_id] * (length - len(ids)) for ids in cut]
        return (
            torch.tensor(rows, dtype=torch.int32),
            torch.tensor([len(ids) for ids in cut]),
            [len(ids) > length for ids in whole],
        )
