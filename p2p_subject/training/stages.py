"""What the stages of the command line do: arguments become a trainer, batches and what is drawn or told at checkpoints."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from p2p_subject import drawing
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.context import Context
from p2p_subject.errors import ArgumentError
from p2p_subject.images import load_image
from p2p_subject.loading import miniature_folder
from p2p_subject.models import Model
from p2p_subject.outputs import save_image
from p2p_subject.training import (
    assembling,
    cutout_stage,
    export,
    grids,
    miniature,
    multimodal,
    pictures,
    representation,
    scenes,
    structure,
)
from p2p_subject.training import vae as autoencoder
from p2p_subject.training.inputs import ModelInputs
from p2p_subject.training.loop import Evaluate, RunConfig, share, train
from p2p_subject.training.representation import Shares, SubjectLearning, SubjectTrainer, empty_prompt, start
from p2p_subject.training.world import with_article

SHOWN = 6
"""Rows of a folder of pictures that are drawn at checkpoints."""

MINIATURE = {
    "multimodal": {"steps": 1200, "batch": 64, "learning_rate": 1e-3, "decay_from": 0.4},
    "representation": {"steps": 8000, "batch": 64, "learning_rate": 1e-3, "decay_from": 0.4},
}
PUBLISHED = {
    "multimodal": {
        "steps": 250_000,
        "batch": 2320,
        "learning_rate": 1e-4,
        "decay_from": 0.0,
        "warmup": 2000,
        "betas": (0.9, 0.98),
        "weight_decay": 0.05,
    },
    "representation": {
        "steps": 500_000,
        "batch": 16,
        "learning_rate": 2e-6,
        "decay_from": 1.0,
        "warmup": 0,
        "betas": (0.9, 0.999),
    },
}
"""How the two stages are run unless told otherwise: as suited the miniature, and of pictures as was published: stage one after
BLIP-2 (Li et al. 2023, section 3.4 there), stage two after BLIP-Diffusion, with AdamW's usual moments."""


def run(arguments: Namespace) -> None:
    """Run the stage that the arguments name."""
    globals()[f"_{arguments.stage}"](arguments)


def _config(arguments: Namespace) -> RunConfig:
    """The configuration of a run; what was not said is filled in, here and in `arguments`."""
    presets = MINIATURE if getattr(arguments, "data", None) is None else PUBLISHED
    for name, value in presets.get(arguments.stage, {}).items():
        if getattr(arguments, name) is None:
            # A run that is much shorter than the published one would end before it had its full rate.
            setattr(arguments, name, min(value, arguments.steps // 10) if name == "warmup" else value)
    if arguments.processes is None:
        alone = arguments.device == "cpu" and "WORLD_SIZE" not in os.environ
        arguments.processes = 2 if alone else 1
    # Before any process is started, whose errors would come as tracebacks.
    share(arguments.batch, arguments.processes)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return RunConfig(**{name: value for name, value in given.items() if name in RunConfig.__dataclass_fields__})


def _record(arguments: Namespace) -> dict[str, Any]:
    """Everything else that a run was told, for its `settings.json`; paths as they are from anywhere."""
    given = {name: value for name, value in vars(arguments).items() if name not in RunConfig.__dataclass_fields__}
    whole = {name: value.resolve() for name, value in given.items() if isinstance(value, Path)}
    return {**given, **whole, "start_from": [path.resolve() for path in given.get("start_from", [])]}


def _learning_record(learning: SubjectLearning) -> dict[str, Any]:
    told = dataclasses.asdict(learning)
    # It changes memory and time alone.
    del told["checkpointing"]
    return told


def _vae(arguments: Namespace) -> None:
    config = _config(arguments)
    grids.reconstruction_grid(autoencoder.train(config, arguments.batch), config.out / "reconstructions.png")


def _scenes(arguments: Namespace) -> None:
    scenes.make_cache(arguments.out, arguments.vae, arguments.count, arguments.processes)


def _cutouts(arguments: Namespace) -> None:
    cutout_stage.command(arguments)


def _assemble(arguments: Namespace) -> None:
    if arguments.out.is_file() or (arguments.out.is_dir() and any(arguments.out.iterdir())):
        raise ArgumentError(f"{arguments.out} is there already; give the name of a new folder")
    pipeline = assembling.assemble(
        arguments.stable_diffusion,
        arguments.image_encoder,
        arguments.bert,
        queries=arguments.queries,
        left_out=arguments.left_out,
        variant=arguments.variant,
    )
    export.save(pipeline, arguments.out)


def _multimodal(arguments: Namespace) -> None:
    config, folder = _config(arguments), arguments.model or miniature_folder()
    if arguments.batch < 2:
        raise ArgumentError("--batch 1: a picture is told from those of other captions; give two or more")
    pipeline = BlipDiffusionPipeline.from_pretrained(folder)
    pieces = pipeline.qformer_tokenizer

    def build() -> multimodal.MultimodalTrainer:
        return multimodal.fresh(pipeline.qformer, pieces, arguments.bert)

    if arguments.data is None:
        batches, pairs = scenes.caption_batches(pieces, arguments.batch, config.seed), multimodal.world_pairs(pieces)
    else:
        inputs = ModelInputs.of(folder)
        told = {
            name: pictures.CaptionedPictures(path, inputs, length=arguments.text_length)
            for name, path in (("data", arguments.data), ("validation", arguments.validation))
            if path is not None
        }
        batches = pictures.batches(told["data"], arguments.batch, config.seed, threads=arguments.threads)
        pairs = multimodal.folder_pairs(told["validation"]) if "validation" in told else {}
    evaluate = multimodal.evaluation(build, pairs, config.device) if pairs else None
    train(config, build, batches, evaluate, **_record(arguments) | {"model": folder.resolve()})


def learning_of(arguments: Namespace) -> SubjectLearning:
    """What of stage two is done how, as the arguments say: the miniature's recipe for its scenes, the paper's for pictures."""
    recipe = miniature.LEARNING if arguments.data is None else SubjectLearning()
    drop, none = arguments.no_subject_drop, arguments.captions_only
    if none and (drop or arguments.attention_weight or arguments.no_category_text):
        raise ArgumentError("--captions-only trains without subjects; leave out the options that are about them")
    neither = recipe.shares.neither
    return dataclasses.replace(
        recipe,
        attention_weight=arguments.attention_weight,
        auxiliary_weight=0.0 if none else recipe.auxiliary_weight,
        train_text_encoder=not arguments.freeze_text_encoder,
        category_text=not arguments.no_category_text,
        shares=Shares(0.0, neither) if drop else Shares(1 - neither, neither) if none else recipe.shares,
        checkpointing=arguments.checkpointing,
    )


def _representation(arguments: Namespace) -> None:
    if (arguments.data is None) == (arguments.scenes is None):
        raise ArgumentError(
            "give --scenes (and --vae), to train the miniature, or --data (and --cutouts, --model), for pictures"
        )
    needed = ("scenes", "vae") if arguments.data is None else ("data", "cutouts", "model")
    missing = [name for name in needed if getattr(arguments, name) is None]
    if missing:
        raise ArgumentError(f"--{needed[0]} was given without --{missing[0]}; it needs both")
    (_on_scenes if arguments.data is None else _on_pictures)(arguments)


def _on_scenes(arguments: Namespace) -> None:
    config, learning, cache = _config(arguments), learning_of(arguments), scenes.Cache(arguments.scenes)

    def build() -> SubjectTrainer:
        trainer = SubjectTrainer(**miniature.networks(), **miniature.SETTINGS, learning=learning)
        for path in arguments.start_from:
            start(trainer, path)
        return trainer

    def evaluate(step: int, folder: Path) -> dict[str, float]:
        grids.generation_grid(folder / "ema.safetensors", arguments.vae, folder / f"grid-{step:06d}.png")
        return {}

    told = {"learning": _learning_record(learning), "scenes": cache.count}
    train(config, build, cache.batches(arguments.batch, config.seed), evaluate, **_record(arguments) | told)


def _on_pictures(arguments: Namespace) -> None:
    config, learning = _config(arguments), learning_of(arguments)
    dataset = pictures.PictureFolder(
        arguments.data,
        arguments.cutouts,
        ModelInputs.of(arguments.model),
        template=arguments.template,
        resolution=arguments.resolution,
        backgrounds=arguments.backgrounds,
        subject=arguments.subject,
        seed=config.seed,
    )

    def build() -> SubjectTrainer:
        pipeline = BlipDiffusionPipeline.from_pretrained(arguments.model)
        parts = {name: getattr(pipeline, name) for name in representation.PARTS}
        settings = {"scheduler": pipeline.scheduler.config, "empty": empty_prompt(pipeline)}
        trainer = SubjectTrainer(
            **parts, **settings, learning=learning, vae=pipeline.vae, position=pipeline.config.ctx_begin_pos
        )
        for path in arguments.start_from:
            start(trainer, path)
        return trainer

    batches = pictures.batches(dataset, arguments.batch, config.seed, threads=arguments.threads)
    told = {"learning": _learning_record(learning), "resolution": dataset.resolution, "pictures": len(dataset)}
    train(config, build, batches, _drawn(arguments, dataset), **_record(arguments) | told)


def _drawn(arguments: Namespace, dataset: pictures.PictureFolder, steps: int = 25, scale: float = 7.5) -> Evaluate:
    """What draws, at checkpoints, some pictures above what is generated of their subjects."""
    entries = [dataset.rows[at][0] for at in np.unique(np.linspace(0, len(dataset) - 1, SHOWN).astype(int))]

    @torch.no_grad()
    def evaluate(step: int, folder: Path) -> dict[str, float]:
        pipeline = export.with_weights(arguments.model, folder / "ema.safetensors").to(arguments.device)
        model, given = Model.of(pipeline), [load_image(entry.picture) for entry in entries]
        subjects = pipeline.subject_embeddings([[one] for one in given], [entry.subject for entry in entries])
        # As in training: where the template has the subject's embeddings.
        captions = [dataset.caption(with_article(entry.subject), entry.subject) for entry in entries]
        ids = torch.tensor([own.ids for own in captions], device=model.device)
        position = torch.tensor([own.position for own in captions], device=model.device)
        told = Context(pipeline.text_encoder(ids, subjects, position))
        made = drawing.sample_contexts(model, told, range(len(entries)), steps, scale)
        rows = [[np.asarray(one.resize(made[0].size)) for one in row] for row in (given, made)]
        save_image(grids.tiled(rows, 1), folder / f"grid-{step:06d}.png")
        return {}

    return evaluate


def _structure(arguments: Namespace) -> None:
    config, folder = _config(arguments), arguments.model or miniature_folder()
    pipeline = BlipDiffusionPipeline.from_pretrained(folder)
    cache = scenes.Cache(arguments.scenes)
    batches = structure.batches(cache, arguments.batch, config.seed)

    def build() -> structure.StructureTrainer:
        trainer = structure.StructureTrainer(pipeline)
        for path in arguments.start_from:
            trainer.load_state_dict(load_file(path))
        return trainer

    told = {"model": folder.resolve(), "scenes": cache.count}
    train(config, build, batches, **_record(arguments) | told)


def _export(arguments: Namespace) -> None:
    if arguments.vae:
        export.export(arguments.run, arguments.vae, arguments.out)
    elif arguments.model:
        export.export_onto(arguments.run, arguments.model, arguments.out)
    else:
        export.export_controlnet(arguments.run, arguments.structure, arguments.out)
