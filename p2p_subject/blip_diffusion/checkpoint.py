"""Reading and writing a whole BLIP-Diffusion checkpoint in the layout of the public one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from p2p_subject.blip_diffusion.loading import (
    OWN_LIBRARY,
    TOKENIZER_FOLDER,
    LoadOptions,
    load_component,
    model_folder,
)
from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.blip_diffusion.word_pieces import save_prompt_tokenizer, save_word_pieces
from p2p_subject.errors import ModelError, did_you_mean
from p2p_subject.outputs import atomic_write
from p2p_subject.supported import bare

if TYPE_CHECKING:
    import torch
    from transformers import BertTokenizer
    from typing_extensions import Self

__all__ = ["CheckpointMixin"]

_SETTINGS = ("ctx_begin_pos", "mean", "std")


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the pipelines; a subclass names further components."""

    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "vae",
        "unet",
        "scheduler",
        "qformer",
        "image_processor",
    )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        qformer_tokenizer: str | Path | BertTokenizer | None = None,
        variant: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **components: Any,
    ) -> Self:
        """Load a checkpoint in the layout of `Salesforce/blipdiffusion`, from safetensors only.

        Args:
            pretrained_model_name_or_path: a folder, or "owner/name" on the Hugging Face hub.
            torch_dtype: float type of the networks, float32 if None; `dtype` is another spelling.
            dtype: see `torch_dtype`.
            qformer_tokenizer: the word pieces of the subject's category: a folder with BERT's `vocab.txt`, a
                hub name, or a tokenizer. None takes the checkpoint's own folder `qformer_tokenizer`, or,
                without one, the name in `qformer/config.json`.
            variant: part of the weight files' names, such as "fp16".
            low_cpu_mem_usage: as in diffusers, for its networks; the library's own never take memory twice.
            use_safetensors: False is refused.
            revision: on the hub; so are `cache_dir`, `token` and `local_files_only`.
            cache_dir: see `revision`.
            token: see `revision`.
            local_files_only: download nothing.
            components: parts to use in place of the checkpoint's, such as `scheduler=` or `unet=`.

        Returns:
            The pipeline on the CPU, its networks in evaluation mode.

        Raises:
            ModelError: the name is no model; a file is missing, damaged or pickled; a weight is missing,
                misshapen or unknown; the word pieces cannot be found; or parts do not fit together.
        """
        if use_safetensors is False:
            raise ModelError("use_safetensors=False asks for pickled weights, which are never loaded; leave it out.")
        for name in components.keys() - set(cls.component_names):
            raise ModelError(
                f"from_pretrained() takes no {name!r}.{did_you_mean(name, cls.component_names)} Components "
                f"that can be replaced: {', '.join(cls.component_names)}."
            )
        options = LoadOptions(torch_dtype or dtype, variant, low_cpu_mem_usage, local_files_only, qformer_tokenizer)
        needed = [name for name in cls.component_names if name not in components]
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = model_folder(pretrained_model_name_or_path, needed, variant, **hub)
        index = read_json(folder / "model_index.json")
        # The tokenizer first: it is the part most often missing, and the cheapest.
        loaded = {name: load_component(name, folder, options) for name in ("qformer_tokenizer", *needed)}
        settings = {name: index[name] for name in _SETTINGS if name in index}
        return cls(**loaded, **components, **settings)

    def save_pretrained(
        self, save_directory: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write the checkpoint as safetensors in the layout of the public one.

        The word pieces go into the additional folder `qformer_tokenizer`, which the official loader ignores.

        Args:
            save_directory: made if needed.
            safe_serialization: False is refused.
            variant: part of the weight files' names, such as "fp16".

        Raises:
            ModelError: pickled weights are asked for, `save_directory` is a file, or the U-Net carries an adapter.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise ModelError("safe_serialization=False asks for pickled weights, which are never written; leave it out.")
        if folder.is_file():
            raise ModelError(f"{folder} is a file; pass a folder to save the model in.")
        if adapters := ", ".join(getattr(bare(self.unet), "peft_config", {})):
            # Its weights have other names then, under which no plain U-Net finds them.
            raise ModelError(
                f"the U-Net carries the adapter {adapters!r}, which this layout has no place for; save a fine-tuned model by "
                "Finetuned.save, or the pipeline without the adapter and the adapter by unet.save_lora_adapter"
            )
        folder.mkdir(parents=True, exist_ok=True)
        index = json.loads(self.to_json_string())
        del index[TOKENIZER_FOLDER]
        for name in self.component_names:
            part = getattr(self, name)
            if name in OWN_LIBRARY:
                index[name] = ["blip_diffusion", type(part).__name__]
            if name == "tokenizer":
                # As transformers names it in its own file: the two classes read the same files.
                index[name][1] = index[name][1].removesuffix("Fast")
                save_prompt_tokenizer(part, folder / name)
            elif isinstance(part, nn.Module):
                part.save_pretrained(folder / name, variant=variant)
            else:
                part.save_pretrained(folder / name)
        save_word_pieces(self.qformer_tokenizer, folder / TOKENIZER_FOLDER)
        atomic_write(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
