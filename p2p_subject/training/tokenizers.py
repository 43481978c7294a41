"""Tokenizers of the miniature, written in the file formats of the real ones: CLIP byte pairs and BERT word pieces."""

from __future__ import annotations

import json
from pathlib import Path

from p2p_subject.training.backgrounds import PAINTERS
from p2p_subject.training.world import CATEGORIES, HUES

WINDOW = 24
"""Columns of the miniature's text encoder."""
QUERIES = 4
"""Columns of it that a subject takes."""

WORDS = (
    "a", "an", "the", "on", "in", "at", "and", "with", "of", "is", "photo", "picture", "big", "small", "no",
    *CATEGORIES, *PAINTERS, *HUES,
)  # fmt: skip
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merge(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        merged: list[str] = []
        for piece in pieces:
            if merged and merged[-1] == left and piece == right:
                merged[-1] = left + right
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def byte_pairs(words: tuple[str, ...] = WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in which every given word is one token and any other text falls into characters.

    Merges are appended word by word: a later merge has lower priority, so it cannot break up an earlier word.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _merge([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1:])
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *dict.fromkeys(a + b for a, b in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def save_clip_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, window: int = WINDOW) -> None:
    """Write `vocab.json`, `merges.txt` and the two configuration files of a `CLIPTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pairs(words)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": window, "errors": "replace", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def word_pieces(words: tuple[str, ...] = WORDS) -> list[str]:
    """Word-piece vocabulary: special tokens, letters and digits as beginnings and continuations, the words of the world."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    return list(dict.fromkeys([*special, *letters, *("##" + c for c in letters), *words]))


def save_word_piece_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """Write `vocab.txt` and the configuration of a lower-casing `BertTokenizer` with "[DEC]" as its start token."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(word_pieces(words)) + "\n", "utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "bos_token": "[DEC]", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
