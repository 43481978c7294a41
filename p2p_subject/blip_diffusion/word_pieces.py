"""The tokenizers: BERT's word pieces for the Q-Former, CLIP's byte pairs for the prompt, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from p2p_subject.errors import ModelError

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizerFast

__all__ = ["load_prompt_tokenizer", "load_word_pieces", "save_prompt_tokenizer", "save_word_pieces"]

_PROMPT_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_HOW = (
    "Pass qformer_tokenizer= a folder that holds BERT's vocab.txt (of bert-base-uncased for the public "
    "checkpoint), or a name from which it can be downloaded."
)


def load_word_pieces(source: str | Path, *, local_files_only: bool = False) -> BertTokenizer:
    """Load the lower-casing word pieces of the subject's category, with "[DEC]" as start token as in BLIP-2.

    Args:
        source: a folder with `vocab.txt`, or a name on the Hugging Face hub.
        local_files_only: take a name from the local cache only.

    Raises:
        ModelError: there is no `vocab.txt`; the message says how to pass one.
    """
    from transformers import BertTokenizer

    # transformers 5 makes an almost empty tokenizer, without an error, where the vocabulary is missing.
    folder = _vocabulary_folder(source, local_files_only)
    # Whether lower case is the default depends on the release: 5.0 keeps capitals, which the vocabulary does not know.
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=True, truncation_side="right")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _vocabulary_folder(source: str | Path, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    folder = Path(source)
    if folder.is_dir():
        if not (folder / "vocab.txt").is_file():
            raise ModelError(f"the Q-Former's tokenizer folder {folder} has no vocab.txt. {_HOW}")
        return folder
    try:
        return Path(hf_hub_download(str(source), "vocab.txt", local_files_only=local_files_only)).parent
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"the Q-Former's tokenizer {str(source)!r} is no folder and cannot be downloaded ({type(error).__name__}). {_HOW}"
        ) from error


def save_word_pieces(tokenizer: BertTokenizer, folder: str | Path) -> None:
    """Write the word pieces as `vocab.txt`, which every release of transformers reads alike."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [piece for piece, index in pieces if index < tokenizer.vocab_size]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_prompt_tokenizer(folder: str | Path) -> CLIPTokenizerFast:
    """Load CLIP's tokenizer from the `tokenizer` folder of a checkpoint.

    Raises:
        ModelError: its vocabulary is missing.
    """
    # Before transformers 5, `CLIPTokenizer` cannot read tokenizer.json; from 5 on the two are one class.
    from transformers import CLIPTokenizerFast

    folder = Path(folder)
    if not any(all((folder / name).is_file() for name in files) for files in _PROMPT_FILES):
        raise ModelError(
            f"{folder} holds no CLIP tokenizer: expected vocab.json and merges.txt, or tokenizer.json. "
            "Download the model again."
        )
    return CLIPTokenizerFast.from_pretrained(folder)


def save_prompt_tokenizer(tokenizer: CLIPTokenizerFast, folder: str | Path) -> None:
    """Write CLIP's tokenizer so that releases of transformers before and after 5 can read it."""
    tokenizer.save_pretrained(folder)
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer.backend_tokenizer.model.save(str(folder))
