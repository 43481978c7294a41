"""The training set: scenes drawn and encoded once, kept as arrays, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from p2p_subject.training import world
from p2p_subject.training.loop import Batch, Batches, share
from p2p_subject.training.miniature import MEAN, STD
from p2p_subject.training.tokenizers import QUERIES, WINDOW, save_clip_tokenizer, save_word_piece_tokenizer

if TYPE_CHECKING:
    from transformers import BertTokenizer


class Cache:
    """Latents, masks, references and labels of the training scenes, drawn and encoded once, memory-mapped."""

    ARRAYS = ("latents", "masks", "references", "ids", "category_ids", "labels", "columns")

    def __init__(self, folder: Path) -> None:
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.ARRAYS}
        self.count = len(self.arrays["latents"])

    def batch(self, indices: np.ndarray, tinted: np.ndarray) -> dict[str, Tensor]:
        """What `SubjectTrainer` takes, of the scenes `indices` (B,); `tinted` (B,) says whose caption names the tint."""
        pick = {name: np.asarray(array[indices]) for name, array in self.arrays.items()}
        rows = np.arange(len(indices))
        category_ids = torch.from_numpy(pick["category_ids"]).long()
        return {
            "latents": torch.from_numpy(pick["latents"]).float(),
            "mask": torch.from_numpy(pick["masks"]).float(),
            "references": normalised(pick["references"]),
            "ids": torch.from_numpy(pick["ids"][rows, tinted.astype(int)]).long(),
            "columns": torch.from_numpy(pick["columns"][rows, tinted.astype(int)]).long(),
            "category_ids": category_ids,
            "category_mask": (category_ids != 0).long(),
            "labels": torch.from_numpy(pick["labels"]).float(),
        }

    def batches(self, size: int, seed: int) -> Batches:
        """Batches of `size` rows over all processes, drawn anew at each step; half of the captions name the tint."""

        def batch(step: int, rank: int, processes: int) -> dict[str, Tensor]:
            rng = np.random.default_rng((seed, step, rank))
            indices = np.sort(rng.integers(0, self.count, share(size, processes)))
            return self.batch(rng.permutation(indices), rng.random(len(indices)) < 0.5)

        return batch


TEXT_LENGTH = 8
"""Word pieces of the longest caption of the world, with [CLS] and [SEP]."""


def caption_pairs(pieces: BertTokenizer, split: str, indices: Sequence[int], tinted: Sequence[bool]) -> Batch:
    """What `MultimodalTrainer` takes: whole scenes and their captions, with the tint where `tinted`."""
    scenes = [world.draw(world.sample(split, int(index))) for index in indices]
    captions = [scene.spec.caption(tint=bool(tint)) for scene, tint in zip(scenes, tinted)]
    text = pieces(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    pictures = np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])
    return {"references": normalised(pictures), "text_ids": text.input_ids, "text_mask": text.attention_mask}


def caption_batches(pieces: BertTokenizer, size: int, seed: int) -> Batches:
    """Batches of `size` pairs over all processes, every scene a new one; half of the captions name the tint."""

    def batch(step: int, rank: int, processes: int) -> Batch:
        rng = np.random.default_rng((seed, step, rank))
        count = share(size, processes)
        return caption_pairs(pieces, "train", rng.integers(0, 2**31, count), rng.random(count) < 0.5)

    return batch


def normalised(pictures: np.ndarray) -> Tensor:
    """Pictures (B, 3, S, S) uint8 as the image encoder takes them, float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(pictures).float() / 255 - mean) / std


def _caption_row(tokenizer, caption: str, category: str) -> tuple[list[int], tuple[int, int]]:
    """Ids of a caption, padded to the window less the queries, and the columns of its category and background words."""
    ids = tokenizer(caption, padding="max_length", max_length=WINDOW - QUERIES).input_ids
    words = caption.split()
    # Every word of the world is one token: word i stands in column i + 1, after the start token.
    return ids, (words.index(category) + 1, len(words))


def make_cache(folder: Path, vae_folder: Path, count: int, processes: int = 1, split: str = "train") -> None:
    """Draw and encode scenes 0 to `count` of a split into `folder`, in `processes` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_clip_tokenizer(folder / "tokenizer")
    save_word_piece_tokenizer(folder / "qformer_tokenizer")
    shapes = {
        "latents": ((4, 16, 16), np.float16),
        "masks": ((16, 16), np.float16),
        "references": ((3, world.SIZE, world.SIZE), np.uint8),
        "ids": ((2, WINDOW - QUERIES), np.int16),
        "columns": ((2, 2), np.int16),
        "category_ids": ((4,), np.int16),
        "labels": ((5,), np.float32),
    }
    for name, (shape, dtype) in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape)).flush()
    mp.start_processes(_fill_cache, (folder, vae_folder, count, processes, split), processes, start_method="fork")


@torch.no_grad()
def _fill_cache(rank: int, folder: Path, vae_folder: Path, count: int, processes: int, split: str) -> None:
    from transformers import BertTokenizer, CLIPTokenizer

    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pieces = BertTokenizer.from_pretrained(folder / "qformer_tokenizer")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in Cache.ARRAYS}
    caption_row = cache(lambda caption, category: _caption_row(tokenizer, caption, category))
    starts = range(64 * rank, count, 64 * processes)
    for start in tqdm(starts, desc="drawing scenes", disable=None if rank == 0 else True):
        chosen = slice(start, min(start + 64, count))
        indices = range(chosen.start, chosen.stop)
        scenes = [world.draw(world.sample(split, index)) for index in indices]
        looks = [scene.spec.look for scene in scenes]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = [
            [caption_row(scene.spec.caption(tint=tint), scene.spec.look.category) for tint in (False, True)] for scene in scenes
        ]
        arrays["latents"][chosen] = vae.encode(images).latent_dist.mean.numpy()
        arrays["masks"][chosen] = [scene.alpha.reshape(16, 4, 16, 4).mean((1, 3)) for scene in scenes]
        arrays["references"][chosen] = [
            world.reference(look, split, index).transpose(2, 0, 1) for look, index in zip(looks, indices)
        ]
        arrays["ids"][chosen] = [[ids for ids, _ in pair] for pair in rows]
        arrays["columns"][chosen] = [[columns for _, columns in pair] for pair in rows]
        names = [look.category for look in looks]
        arrays["category_ids"][chosen] = pieces(names, padding="max_length", max_length=4).input_ids
        arrays["labels"][chosen] = [_labels(look) for look in looks]


def _labels(look: world.Look) -> tuple[float, ...]:
    """Category, source, natural or not, and the hue as a point on the circle (0, 0 for natural colours)."""
    angle = None if look.hue is None else np.deg2rad(look.hue)
    hue = (0.0, 0.0) if angle is None else (np.cos(angle), np.sin(angle))
    return (world.CATEGORIES.index(look.category), world.SOURCES.index(look.source), angle is None, *hue)
