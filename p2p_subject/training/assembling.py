"""A BLIP-Diffusion of public parts, for the two stages to train: as in the paper (Li et al. 2023, section 4), Stable Diffusion
1.5, CLIP's ViT-L/14 and BERT."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedModel

from p2p_subject.blip_diffusion import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipDiffusionPipeline,
    BlipImageProcessor,
    ContextCLIPTextConfig,
    ContextCLIPTextModel,
    QFormerConfig,
    VisionConfig,
)
from p2p_subject.blip_diffusion.loading import LoadOptions, load_component, model_folder
from p2p_subject.blip_diffusion.weights import read_json, require_safetensors, weights_error
from p2p_subject.blip_diffusion.word_pieces import load_word_pieces
from p2p_subject.errors import ArgumentError, ModelError
from p2p_subject.training.multimodal import start_from_bert

Clip = TypeVar("Clip", bound=PreTrainedModel)
_STABLE_DIFFUSION = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
_SAME = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")


def assemble(
    stable_diffusion: str | Path,
    image_encoder: Path,
    bert: Path,
    *,
    queries: int = 16,
    left_out: int = 1,
    variant: str | None = None,
) -> BlipDiffusionPipeline:
    """Put a BLIP-Diffusion together whose Q-Former has not learned to look yet, in single precision on the CPU.

    `stable_diffusion` is the folder or hub name of a Stable Diffusion with one text encoder; `image_encoder` the folder of a
    CLIP or of its image encoder, whose last `left_out` layers are not run (BLIP-2, section 3.4: features of the second last do
    slightly better); `bert` the folder of a BERT with `vocab.txt`, which gives the Q-Former its sizes. The subject takes
    `queries` tokens of the prompt. `variant` is that of Stable Diffusion's files, such as "fp16".

    Raises `ModelError` for parts that are missing, damaged or do not fit, `ArgumentError` for impossible numbers.
    """
    folder, options = model_folder(stable_diffusion, list(_STABLE_DIFFUSION), variant), LoadOptions(variant=variant)
    if (folder / "text_encoder_2").is_dir():
        raise ModelError(f"{folder} has two text encoders, as Stable Diffusion XL; BLIP-Diffusion's subject goes through one")
    if queries < 1:
        raise ArgumentError(f"queries={queries}; expected 1 or more, in the paper 16")
    pieces = load_word_pieces(bert)
    # The cheap parts come first: what does not fit is told before gigabytes are read.
    qformer_config, clip = _qformer_config(bert, len(pieces)), _load_clip(CLIPVisionModel, image_encoder)
    vision = _vision_config(clip, left_out)
    parts = {name: load_component(name, folder, options) for name in _STABLE_DIFFUSION if name != "text_encoder"}
    parts["text_encoder"] = _text_encoder(folder / "text_encoder", variant)
    width = parts["text_encoder"].config.hidden_size
    config = Blip2QFormerConfig(
        vision_config=vision,
        qformer_config=qformer_config,
        num_query_tokens=queries,
        projection_size=None if width == qformer_config.hidden_size else width,
    )
    qformer = Blip2QFormerModel(config)
    qformer.visual_encoder.load_state_dict(encoder_weights(clip, vision.num_hidden_layers))
    start_from_bert(qformer, bert)
    return BlipDiffusionPipeline(
        **parts, qformer=qformer.eval(), image_processor=BlipImageProcessor(size=vision.image_size), qformer_tokenizer=pieces
    )


def _qformer_config(bert: Path, words: int) -> QFormerConfig:
    told = read_json(bert / "config.json")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    missing = [name for name in sizes if name not in told]
    if missing:
        raise ModelError(f"{bert / 'config.json'} has no {', '.join(missing)}; expected the configuration of a BERT")
    return QFormerConfig(vocab_size=words, **{name: told[name] for name in sizes})


def _load_clip(kind: type[Clip], folder: Path, variant: str | None = None) -> Clip:
    path = require_safetensors(folder, "model", variant)
    # The other half of a CLIP in the same file is no finding; what this half lacks is an error below.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        clip, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, variant=variant
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{folder} holds no {kind.__name__}: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    if report["missing_keys"]:
        raise weights_error(kind.__name__, path, missing=report["missing_keys"])
    return clip.float()


def _text_encoder(folder: Path, variant: str | None) -> ContextCLIPTextModel:
    """A CLIP's text encoder with room for a subject; its weights' prefix is that of the release that wrote them, or none."""
    clip = _load_clip(CLIPTextModel, folder, variant)
    encoder = ContextCLIPTextModel(ContextCLIPTextConfig.from_dict(read_json(folder / "config.json")))
    given = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in clip.state_dict().items()}
    own = encoder.state_dict()  # with a counter of positions, which newer releases do not have
    encoder.load_state_dict(own | {name: value for name, value in given.items() if name in own})
    return encoder.eval()


def _vision_config(clip: CLIPVisionModel, left_out: int) -> VisionConfig:
    layers = clip.config.num_hidden_layers
    if not 0 <= left_out < layers:
        raise ArgumentError(f"left_out={left_out}; expected 0 to {layers - 1} of the image encoder's {layers} layers")
    return VisionConfig(num_hidden_layers=layers - left_out, **{name: getattr(clip.config, name) for name in _SAME})


def encoder_weights(clip: CLIPVisionModel, layers: int) -> dict[str, Tensor]:
    """Weights of CLIP's image encoder under the names of `Blip2VisionModel`, of its first `layers` layers.

    Queries, keys and values lie in one matrix there, one after another.
    """
    given = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    kept = {
        "embeddings.class_embedding": given["embeddings.class_embedding"][None, None],
        "embeddings.patch_embedding.weight": given["embeddings.patch_embedding.weight"],
        "embeddings.position_embedding": given["embeddings.position_embedding.weight"][None],
    }
    for kind in ("weight", "bias"):
        kept[f"pre_layernorm.{kind}"] = given[f"pre_layrnorm.{kind}"]
        kept[f"post_layernorm.{kind}"] = given[f"post_layernorm.{kind}"]
        for layer in (f"encoder.layers.{index}" for index in range(layers)):
            attention = f"{layer}.self_attn"
            kept[f"{attention}.qkv.{kind}"] = torch.cat([given[f"{attention}.{part}_proj.{kind}"] for part in "qkv"])
            kept[f"{attention}.projection.{kind}"] = given[f"{attention}.out_proj.{kind}"]
            for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                kept[f"{layer}.{part}.{kind}"] = given[f"{layer}.{part}.{kind}"]
    return kept
