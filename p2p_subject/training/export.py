"""From the weights of a run to a model folder in the layout of the public checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler
from safetensors.torch import load_file
from torch import nn

from p2p_subject.blip_diffusion import BlipDiffusionPipeline, BlipImageProcessor
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer, load_word_pieces
from p2p_subject.models import SETTINGS
from p2p_subject.outputs import atomic_write
from p2p_subject.training import world
from p2p_subject.training.captions import PAPER
from p2p_subject.training.miniature import MEAN, SCHEDULER, STD, networks
from p2p_subject.training.representation import PARTS, start
from p2p_subject.training.structure import StructureTrainer
from p2p_subject.training.tokenizers import save_clip_tokenizer, save_word_piece_tokenizer

GUIDANCE_SCALE = 3.0
"""What suits the miniature: chosen on swaps of the validation split."""


def assemble(weights: Path, vae_folder: Path, tokenizers: Path) -> BlipDiffusionPipeline:
    """Build the pipeline of a run's `ema.safetensors`; writes the tokenizers' files into `tokenizers`."""
    parts = networks()
    start(nn.ModuleDict(parts), weights)
    save_clip_tokenizer(tokenizers / "tokenizer")
    save_word_piece_tokenizer(tokenizers / "qformer_tokenizer")
    side = {"height": world.SIZE, "width": world.SIZE}
    # PNDM, as in the public checkpoint; it takes the noise levels and the v-prediction of the training.
    scheduler = {key: value for key, value in SCHEDULER.items() if key != "clip_sample"} | {"skip_prk_steps": True}
    return BlipDiffusionPipeline(
        tokenizer=load_prompt_tokenizer(tokenizers / "tokenizer"),
        text_encoder=parts["text_encoder"].eval(),
        vae=AutoencoderKL.from_pretrained(vae_folder).eval(),
        unet=parts["unet"].eval(),
        scheduler=PNDMScheduler(**scheduler),
        qformer=parts["qformer"].eval(),
        image_processor=BlipImageProcessor(size=side, image_mean=list(MEAN), image_std=list(STD)),
        qformer_tokenizer=load_word_pieces(tokenizers / "qformer_tokenizer"),
        mean=list(MEAN),
        std=list(STD),
    )


def export(run: Path, vae_folder: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the averaged weights of a run of the miniature as a model folder, in half precision."""
    out.mkdir(parents=True, exist_ok=True)
    save(assemble(run / "ema.safetensors", vae_folder, out).to(dtype), out)
    (out / SETTINGS).write_text(json.dumps({"guidance_scale": GUIDANCE_SCALE}) + "\n")


def with_weights(model: Path, weights: Path) -> BlipDiffusionPipeline:
    """The pipeline of a model folder with the parts that a run's `ema.safetensors` holds in their place."""
    pipeline = BlipDiffusionPipeline.from_pretrained(model)
    start(nn.ModuleDict({name: getattr(pipeline, name) for name in PARTS}), weights)
    return pipeline


def export_onto(run: Path, model: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the averaged weights of a run as a model folder, with all else from the model folder that it began with."""
    settings = run / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()).get("template") == PAPER:
        warnings.warn(
            f"{run} was trained with the paper's template, whose subject comes last; the pipelines insert a subject after the "
            "first word, where this model has seen none. Train with --template released for them",
            stacklevel=2,
        )
    save(with_weights(model, run / "ema.safetensors").to(dtype), out)
    if (model / SETTINGS).is_file():
        (out / SETTINGS).write_text((model / SETTINGS).read_text())


def export_controlnet(run: Path, model: Path, out: Path) -> None:
    """Write the averaged weights of a run of `structure` as a ControlNet folder of diffusers, in half precision.

    `model` is the model folder that it steers.
    """
    trainer = StructureTrainer(BlipDiffusionPipeline.from_pretrained(model))
    trainer.load_state_dict(load_file(run / "ema.safetensors"))
    trainer.controlnet.half().save_pretrained(out)
    _forget_origin(out / "config.json")


def save(pipeline: BlipDiffusionPipeline, out: Path) -> None:
    """Write a pipeline as a model folder that does not tell where its parts came from; `model_index.json`, which makes the
    folder a model, comes last."""
    pipeline.save_pretrained(out)
    for path in out.glob("*/config.json"):
        _forget_origin(path)


def _forget_origin(path: Path) -> None:
    """Take out of a configuration where the weights lay on the machine that trained them."""
    config = json.loads(path.read_text())
    if config.pop("_name_or_path", None) is not None:
        atomic_write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
