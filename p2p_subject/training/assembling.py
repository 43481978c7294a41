"""A BLIP-Diffusion of public parts, for the two stages to train: as in the paper (Li et al. 2023, section 4), Stable Diffusion
1.5, CLIP's ViT-L/14 and BERT."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

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
from p2p_subject.loading import load_encoder
from p2p_subject.training.multimodal import start_from_bert

_STABLE_DIFFUSION = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")
_OF_CLIP = (*_SIZES, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
_OF_BERT = (*_SIZES, "num_hidden_layers", "max_position_embeddings")


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
    slightly better); `bert` the folder of a BERT with `vocab.txt`, which gives the Q-Former its sizes and first weights. Every
    layer of the Q-Former reads the picture, as in the public checkpoint. The subject takes `queries` tokens of the prompt.
    `variant` is that of Stable Diffusion's files, such as "fp16".

    Raises `ModelError` for parts that are missing, damaged or do not fit, `ArgumentError` for impossible numbers.
    """
    if queries < 1:
        raise ArgumentError(f"queries={queries}; expected 1 or more, in the paper 16")
    for name, folder in (("image_encoder", image_encoder), ("bert", bert)):
        if not Path(folder).is_dir():
            raise ModelError(f"{name}={str(folder)!r} is no folder; download the model and give the folder it is in")
    # The small files come first: what does not fit is told before gigabytes are read.
    require_safetensors(bert, "model")
    pieces = load_word_pieces(bert)
    reader, vision = _qformer_config(bert, len(pieces)), _vision_config(image_encoder, left_out)
    folder, options = model_folder(stable_diffusion, list(_STABLE_DIFFUSION), variant), LoadOptions(variant=variant)
    if (folder / "text_encoder_2").is_dir():
        raise ModelError(f"{folder} has two text encoders, as Stable Diffusion XL; BLIP-Diffusion's subject goes through one")
    text = ContextCLIPTextConfig.from_dict(read_json(folder / "text_encoder" / "config.json"))
    # The start token, what stands before the subject, and the end token share the prompt with it.
    if queries > text.max_position_embeddings - 3:
        raise ArgumentError(f"queries={queries}; a prompt of {text.max_position_embeddings} tokens has room for 3 fewer")
    config = Blip2QFormerConfig(
        vision_config=vision,
        qformer_config=reader,
        num_query_tokens=queries,
        projection_size=None if text.hidden_size == reader.hidden_size else text.hidden_size,
    )
    qformer = Blip2QFormerModel(config)
    start_from_bert(qformer, bert)
    clip = _load_clip(image_encoder)
    qformer.visual_encoder.load_state_dict(encoder_weights(clip, vision.num_hidden_layers))
    return BlipDiffusionPipeline(
        **{name: load_component(name, folder, options) for name in _STABLE_DIFFUSION if name != "text_encoder"},
        text_encoder=_text_encoder(folder / "text_encoder", variant),
        qformer=qformer.eval(),
        image_processor=BlipImageProcessor(size=vision.image_size, **_normalisation(image_encoder)),
        qformer_tokenizer=pieces,
    )


def _qformer_config(bert: Path, words: int) -> QFormerConfig:
    told = read_json(bert / "config.json")
    missing = [name for name in _OF_BERT if name not in told]
    if missing:
        raise ModelError(f"{bert / 'config.json'} has no {', '.join(missing)}; expected the configuration of a BERT")
    return QFormerConfig(vocab_size=words, cross_attention_frequency=1, **{name: told[name] for name in _OF_BERT})


def _vision_config(folder: Path, left_out: int) -> VisionConfig:
    require_safetensors(folder, "model")
    told = read_json(folder / "config.json")
    # Of a whole CLIP, or of its image encoder alone; files leave out what is transformers' default.
    config = CLIPVisionConfig(**told.get("vision_config", told))
    if told.get("model_type") not in ("clip", "clip_vision_model"):
        raise ModelError(f"{folder} holds a {told.get('model_type')!r}; expected a CLIP or the image encoder of one")
    layers = config.num_hidden_layers
    if not 0 <= left_out < layers:
        raise ArgumentError(f"left_out={left_out}; expected 0 to {layers - 1} of the image encoder's {layers} layers")
    return VisionConfig(num_hidden_layers=layers - left_out, **{name: getattr(config, name) for name in _OF_CLIP})


def _normalisation(folder: Path) -> dict[str, list[float]]:
    path = folder / "preprocessor_config.json"
    told = read_json(path) if path.is_file() else {}
    return {name: told[name] for name in ("image_mean", "image_std") if name in told}


def _load_clip(folder: Path) -> CLIPVisionModel:
    path = require_safetensors(folder, "model")
    # CLIP's text encoder in the same file is no finding; what the image encoder lacks is an error below.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        clip, report = CLIPVisionModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no CLIPVisionModel: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    if report["missing_keys"]:
        raise weights_error("CLIPVisionModel", path, missing=report["missing_keys"])
    return clip.float()


def _text_encoder(folder: Path, variant: str | None) -> ContextCLIPTextModel:
    """A CLIP's text encoder with room for a subject; its weights' prefix is that of the release that reads them, or none."""
    clip = load_encoder(CLIPTextModel, folder, LoadOptions(variant=variant, torch_dtype=torch.float32))
    encoder = ContextCLIPTextModel(ContextCLIPTextConfig.from_dict(read_json(folder / "config.json")))
    given = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in clip.state_dict().items()}
    # A counter of positions, which some releases write and others do not.
    counter = "text_model.embeddings.position_ids"
    encoder.load_state_dict(given | {counter: encoder.state_dict()[counter]})
    return encoder.eval()


def encoder_weights(clip: CLIPVisionModel, layers: int) -> dict[str, Tensor]:
    """Weights of CLIP's image encoder under the names of `Blip2VisionModel`, of its first `layers` layers.

    Queries, keys and values lie in one matrix there, one after another. The last norm is without scale and shift: CLIP's are
    those of its last layer's class token, and what they could learn the keys and values behind them can.
    """
    given = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    token = given["embeddings.class_embedding"]
    kept = {
        "embeddings.class_embedding": token[None, None],
        "embeddings.patch_embedding.weight": given["embeddings.patch_embedding.weight"],
        "embeddings.position_embedding": given["embeddings.position_embedding.weight"][None],
        "post_layernorm.weight": torch.ones_like(token),
        "post_layernorm.bias": torch.zeros_like(token),
    }
    for kind in ("weight", "bias"):
        kept[f"pre_layernorm.{kind}"] = given[f"pre_layrnorm.{kind}"]
        for layer in (f"encoder.layers.{index}" for index in range(layers)):
            attention = f"{layer}.self_attn"
            kept[f"{attention}.qkv.{kind}"] = torch.cat([given[f"{attention}.{part}_proj.{kind}"] for part in "qkv"])
            kept[f"{attention}.projection.{kind}"] = given[f"{attention}.out_proj.{kind}"]
            for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                kept[f"{layer}.{part}.{kind}"] = given[f"{layer}.{part}.{kind}"]
    return kept
