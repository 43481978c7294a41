"""Training sets from any folder of pictures, for the two stages of pre-training at the real size.

`PictureFolder` is prompted context generation, the second stage (Li et al. 2023, section 3.2); `CaptionedPictures` is
pictures and captions, the first. Both are map-style datasets whose items torch's default collation stacks. `listing` says
what a folder looks like; `cutout_cache.make_cutouts` comes before the second stage.

Letters: B rows, (H, W) pixels, (h, w) latents, S side of the encoder's pictures, L columns of the text encoder, Nq of them
the subject's, T word pieces.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from p2p_subject.errors import ArgumentError
from p2p_subject.images import load_image, to_tensor
from p2p_subject.training.captions import RELEASED, Caption, caption
from p2p_subject.training.composing import Box, Composition, compose, draw_background, square_box, subject_box
from p2p_subject.training.cutout_cache import read_cutouts
from p2p_subject.training.inputs import ModelInputs
from p2p_subject.training.listing import Entry, read_backgrounds, read_folder, shortened
from p2p_subject.training.loop import Batch, Batches


class PictureFolder(Dataset):
    """Rows of the second stage: a subject on a random background, and the picture it was cut out of with its caption.

    An item holds `pixels` (3, H, W) float32 in [-1, 1], the picture; `mask` (h, w) float32 in [0, 1], the subject's alpha in
    it; `references` (3, S, S) float32, normalised, the subject on a background; `ids` (L - Nq,) int64, the caption;
    `position` () int64, how many of its tokens stand before the subject's embeddings; `category_ids`, `category_mask` (T,)
    int64, the word pieces of the category, T as the longest of the set needs. It is a function of seed, epoch and index.
    """

    def __init__(
        self,
        folder: str | Path,
        cutouts: str | Path,
        model: ModelInputs,
        *,
        template: str = RELEASED,
        resolution: int | None = None,
        backgrounds: str | Path | None = None,
        composition: Composition | None = None,
        subject: str = "",
        seed: int = 0,
    ) -> None:
        """Read the folder and encode its captions; pictures are opened when their rows are asked for.

        Args:
            folder: as `listing` describes.
            cutouts: the cache that `make_cutouts` filled for this folder.
            model: what the rows are for.
            template: "released" or "paper"; see `captions.sentence`.
            resolution: H and W, a multiple of `model.factor`; None takes the model's own.
            backgrounds: a folder of pictures without subjects; None paints procedural ones.
            composition: sizes and places of subjects; where pictures are cropped.
            subject: category of the pictures that do not name theirs.
            seed: of backgrounds, places and crops.

        Raises:
            DatasetError: something is missing in a folder, or the cache does not know a picture as it is now.
            SubjectError, PromptError: a category or a caption cannot be encoded.
            ArgumentError: template or resolution cannot be used.
        """
        self.model, self.template, self.seed = model, template, seed
        self.composition = composition or Composition()
        self.resolution = model.resolution if resolution is None else resolution
        if self.resolution < model.factor or self.resolution % model.factor:
            raise ArgumentError(f"resolution={resolution}; expected a positive multiple of {model.factor} pixels")
        if seed < 0:
            raise ArgumentError(f"seed={seed}; expected 0 or more")
        self.backgrounds = [] if backgrounds is None else read_backgrounds(backgrounds)
        self.rows = read_cutouts(read_folder(folder, subject=subject), Path(cutouts))
        entries = [entry for entry, _ in self.rows]
        small = [min(entry.size) < self.resolution for entry in entries]
        _warn_of(entries, small, f"smaller than {self.resolution} pixels and are enlarged")
        captions = [
            self.caption(entry.text, entry.subject)
            for entry in tqdm(entries, desc="reading captions", disable=None, leave=False)
        ]
        _warn_of(entries, [own.cut for own in captions], "captioned with more than the text encoder reads; the ends are cut")
        self.ids = torch.tensor([own.ids for own in captions], dtype=torch.int32)
        self.positions = torch.tensor([own.position for own in captions])
        self.categories = model.categories(entry.subject for entry in entries)

    def caption(self, text: str, subject: str) -> Caption:
        """A text about a subject as rows of this set have theirs."""
        model = self.model
        return caption(model.tokenizer, text, subject, self.template, model.window, model.queries)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Batch:
        """Row `index` as it is in an epoch: another background, place and crop in each."""
        entry, file = self.rows[index]
        rng = np.random.default_rng((self.seed, epoch, range(len(self))[index]))
        with Image.open(file) as image:
            cutout = image.convert("RGBA")
        background = draw_background(self.backgrounds, self.model.side, rng)
        reference = compose(cutout, background, self.composition, rng)
        picture = load_image(entry.picture)
        box = square_box(picture.size, _scaled(subject_box(cutout), cutout.size, picture.size), self.composition.crop, rng)
        target = picture.resize((self.resolution,) * 2, Image.Resampling.LANCZOS, box)
        latent = self.resolution // self.model.factor
        alpha = cutout.getchannel("A")
        mask = alpha.resize((latent,) * 2, Image.Resampling.BOX, _scaled(box, picture.size, cutout.size))
        category_ids, category_mask = self.categories[entry.subject]
        return {
            "pixels": to_tensor([target])[0],
            "mask": torch.from_numpy(np.asarray(mask, np.float32) / 255),
            "references": self.model.reference(reference),
            "ids": self.ids[index].long(),
            "position": self.positions[index],
            "category_ids": category_ids,
            "category_mask": category_mask,
        }


class CaptionedPictures(Dataset):
    """Rows of the first stage: a whole picture and its caption.

    An item holds `references` (3, S, S) float32, normalised, the picture as the encoder sees it; `text_ids`, `text_mask` (T,)
    int64, the word pieces of the caption between [CLS] and [SEP], padded to T = `length`; longer captions are cut, and a
    warning counts them. Subjects and masks of the folder are not read.

    Raises `DatasetError` for a folder that cannot be used, `ArgumentError` for a `length` that the Q-Former cannot read.
    """

    def __init__(self, folder: str | Path, model: ModelInputs, *, length: int = 32) -> None:
        self.model = model
        self.entries = read_folder(folder, need_subject=False)
        self.texts, self.lengths, long = model.captions([entry.text for entry in self.entries], length)
        _warn_of(self.entries, long, f"captioned with more than {length} word pieces; the ends are cut")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Batch:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Batch:
        """Row `index`, the same in every epoch."""
        ids = self.texts[index].long()
        mask = (torch.arange(len(ids)) < self.lengths[index]).long()
        reference = self.model.reference(load_image(self.entries[index].picture))
        return {"references": reference, "text_ids": ids, "text_mask": mask}


def batches(dataset: PictureFolder | CaptionedPictures, batch_size: int, seed: int = 0, *, threads: int = 0) -> Batches:
    """The batch of any step, as a function of (step, rank, world), for `loop.run`.

    A step takes the next `batch_size` rows of an endless series of epochs, each in an order of its own, and a process of rank
    `rank` its share of them: B = `batch_size` / `world` rows. So a resumed run sees what an uninterrupted one would have seen.
    `threads` read ahead, the rows of the next step while this one is computed; 0 reads when asked. torch's `DataLoader` takes
    the dataset as well, but composes every epoch as the first. Raises `ArgumentError` for a batch that cannot be shared out.
    """
    if batch_size < 1 or threads < 0:
        raise ArgumentError(f"batch_size={batch_size}, threads={threads}; expected 1 or more, and 0 or more")
    rows = len(dataset)
    order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(rows))

    def chosen(step: int, rank: int, world: int) -> list[tuple[int, int]]:
        """(index, epoch) of each row of a batch."""
        if batch_size % world:
            raise ArgumentError(f"a batch of {batch_size} cannot be shared by {world} processes; take a multiple of {world}")
        share = batch_size // world
        first = step * batch_size + rank * share
        places = [divmod(place, rows) for place in range(first, first + share)]
        return [(int(order(epoch)[at]), epoch) for epoch, at in places]

    if threads == 0:
        return lambda step, rank, world: default_collate([dataset.at(*row) for row in chosen(step, rank, world)])

    ahead: dict[tuple[int, int, int], list[Future[Batch]]] = {}
    # Started at the first batch: a pool does not survive the fork into the processes of a run.
    pool = lru_cache(maxsize=1)(lambda: ThreadPoolExecutor(threads))

    def submitted(*of: int) -> list[Future[Batch]]:
        return [pool().submit(dataset.at, *row) for row in chosen(*of)]

    def batch(step: int, rank: int, world: int) -> Batch:
        reading = ahead.pop((step, rank, world), None) or submitted(step, rank, world)
        ahead.clear()
        ahead[step + 1, rank, world] = submitted(step + 1, rank, world)
        return default_collate([row.result() for row in reading])

    return batch


def _scaled(box: Box, size: tuple[int, int], other: tuple[int, int]) -> Box:
    """A box of a picture of `size` in another `size` of the same picture."""
    # Never beyond the picture by a rounding error: resizing refuses such a box.
    return tuple(min(edge * new / old, new) for edge, old, new in zip(box, size * 2, other * 2))


def _warn_of(entries: Sequence[Entry], held: Sequence[bool], what: str) -> None:
    named = [entry.file for entry, holds in zip(entries, held) if holds]
    if named:
        warnings.warn(f"{len(named)} of {len(entries)} pictures are {what}: {shortened(named)}", stacklevel=3)
