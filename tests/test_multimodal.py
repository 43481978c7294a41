"""Stage one of pre-training: what sees what under each objective, hard negatives, several processes, the start from BERT."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.errors import ArgumentError
from p2p_subject.loading import miniature_folder
from p2p_subject.training.miniature import QFORMER, QUERIES
from p2p_subject.training.multimodal import (
    MultimodalTrainer,
    bidirectional,
    causal,
    contrast,
    evaluation,
    folder_pairs,
    fresh,
    hard_negatives,
    start_from_bert,
    start_words_from_bert,
    unimodal,
    world_pairs,
)
from p2p_subject.training.scenes import TEXT_LENGTH, caption_batches, caption_pairs
from p2p_subject.training.tokenizers import save_word_piece_tokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> BertTokenizer:
    folder = tmp_path_factory.mktemp("pieces")
    save_word_piece_tokenizer(folder)
    return BertTokenizer.from_pretrained(folder)


def qformer(seed: int = 0) -> Blip2QFormerModel:
    torch.manual_seed(seed)
    return Blip2QFormerModel(Blip2QFormerConfig.from_dict(QFORMER)).eval()


def trainer(seed: int = 0) -> MultimodalTrainer:
    return MultimodalTrainer(qformer(seed), start=5).eval()


def text(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random word pieces, the last two of each row padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (rows, TEXT_LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, -2:] = mask[:, -2:] = 0
    return ids, mask


@torch.no_grad()
def changed(mask_of, position: int) -> list[bool]:
    """Of each of Nq + T positions: whether what it becomes depends on the word piece at `position`."""
    network, (ids, mask) = qformer(), text()
    features = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, position] = 60
    before, after = (network.encode(features, own, mask_of(mask, QUERIES)) for own in (ids, other))
    return [not torch.allclose(a, b, atol=1e-6) for a, b in zip(before.unbind(1), after.unbind(1))]


@given(position=st.integers(0, TEXT_LENGTH - 3))
@settings(max_examples=6, deadline=None)
def test_what_sees_a_word_under_each_objective(position: int) -> None:
    words = TEXT_LENGTH - 2
    apart, forward, together = (changed(mask_of, position) for mask_of in (unimodal, causal, bidirectional))
    assert apart[: QUERIES + words] == [False] * QUERIES + [True] * words
    assert forward[: QUERIES + words] == [False] * QUERIES + [index >= position for index in range(words)]
    assert together[: QUERIES + words] == [True] * (QUERIES + words)


@pytest.mark.parametrize("mask_of", [unimodal, causal, bidirectional])
def test_padding_is_seen_by_none_and_sees_something(mask_of) -> None:
    assert changed(mask_of, TEXT_LENGTH - 1)[: QUERIES + TEXT_LENGTH - 2] == [False] * (QUERIES + TEXT_LENGTH - 2)
    assert bool(mask_of(text()[1], QUERIES).any(-1).all())


def test_queries_are_unmoved_by_text_that_generates_or_contrasts() -> None:
    """Under both masks the queries are what they are without any text."""
    network, (ids, mask) = qformer(), text()
    features = torch.randn(3, 64, 128)
    with torch.no_grad():
        alone = network.encode(features)
        for mask_of in (unimodal, causal):
            assert torch.allclose(network.encode(features, ids, mask_of(mask, QUERIES))[:, :QUERIES], alone, atol=1e-5)


def test_contrast_takes_equal_captions_for_positives() -> None:
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    similarity = torch.tensor([[9.0, 0.0, 9.0], [0.0, 9.0, 0.0], [9.0, 0.0, 9.0]])
    best = contrast(similarity, same)
    assert best < contrast(similarity, torch.eye(3, dtype=torch.bool)) + 0.2
    # Two positives share the probability, so ln 2 is the least there is for these rows.
    assert torch.allclose(best, torch.tensor(2 / 3 * math.log(2)), atol=1e-3)
    plain = torch.randn(4, 4)
    assert torch.allclose(
        contrast(plain, torch.eye(4, dtype=torch.bool)), nn.functional.cross_entropy(plain, torch.arange(4)), atol=1e-6
    )


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_hard_negatives_are_alike_and_never_the_same(seed: int, rows: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 3, (rows,))
    same = labels[:, None] == labels[None]
    having, drawn = hard_negatives(10 * torch.randn(rows, rows), same)
    assert having.tolist() == [row for row in range(rows) if not bool(same[row].all())]
    assert not bool(same[having, drawn].any())


def test_the_hardest_negative_is_drawn_most() -> None:
    similarity = torch.tensor([[9.0, 5.0, 1.0, 0.0]]).repeat(4, 1)
    drawn = [int(hard_negatives(similarity, torch.eye(4, dtype=torch.bool))[1][0]) for _ in range(300)]
    assert drawn.count(1) > 0.9 * len(drawn)


def test_a_step_trains_all_but_the_image_encoder_and_the_way_out(pieces) -> None:
    torch.manual_seed(0)
    learner = trainer().train()
    losses = learner(**caption_pairs(pieces, "train", range(8), [True] * 8))
    assert set(losses) == {"loss", "contrast", "matching", "generation", "recall", "matched", "told"}
    losses["loss"].backward()
    frozen = ("qformer.visual_encoder.", "qformer.proj_layer.")
    for name, parameter in learner.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        # Positions beyond the text and the bias of keys, which softmax cancels, have no gradient worth the name.
        if not name.endswith("key.bias") and "position_embeddings" not in name:
            assert moved != name.startswith(frozen), name
    assert not learner.qformer.visual_encoder.training


def test_contrast_and_generation_can_be_learned(pieces) -> None:
    """Eight pairs are learnt by heart: the picture can be found by its caption, and the caption told from it."""
    torch.manual_seed(0)
    shipped = Blip2QFormerModel.from_pretrained(miniature_folder() / "qformer")
    learner = fresh(shipped, pieces).train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 1e-3)
    batch = caption_pairs(pieces, "train", range(8), [True] * 8)
    for _ in range(60):
        losses = learner(**batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    # What is there to be had without looking at the picture is 1/8 and .55.
    assert losses["recall"] == 1 and losses["told"] > 0.75


def contrast_gradient(rank: int, world: int, folder: Path, batch: dict[str, Tensor]) -> None:
    """The mean over processes of the gradient of the contrast, each process with its rows of the batch."""
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    # In double precision: the position embeddings' gradients are sums that cancel, whose rounding differs between processors.
    learner = trainer().double().train()
    own = {name: value.chunk(world)[rank] for name, value in batch.items()}
    features = learner.qformer.visual_encoder(own["references"].double())
    learner.contrast(features, own["text_ids"], own["text_mask"])[0].backward()
    gradients = {name: p.grad / world for name, p in learner.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        if world > 1:
            dist.all_reduce(gradient)
    if rank == 0:
        save_file(gradients, folder / f"{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


def test_pictures_and_captions_of_all_processes_are_contrasted(pieces, tmp_path) -> None:
    whole = caption_pairs(pieces, "train", range(8), [True] * 8)
    contrast_gradient(0, 1, tmp_path, whole)
    mp.start_processes(contrast_gradient, (2, tmp_path, whole), nprocs=2, start_method="fork")
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, two[name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7), name


def matched_rows(rank: int, folder: Path, batch: dict[str, Tensor]) -> None:
    """Which pictures and texts of two processes, each with one row, are put together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    learner, matching, seen = trainer().train(), MultimodalTrainer.matching, {}

    def noted(features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen.update(features=features, ids=ids)
        return matching(learner, features, ids, mask)

    learner.matching = noted
    losses = learner(**{name: value.chunk(2)[rank].contiguous() for name, value in batch.items()})
    losses["loss"].backward()
    save_file({name: value.detach().contiguous() for name, value in seen.items()}, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


def test_hard_negatives_come_from_all_processes(pieces, tmp_path) -> None:
    batch = caption_pairs(pieces, "train", range(2), [True] * 2)
    mp.start_processes(matched_rows, (tmp_path, batch), nprocs=2, start_method="fork")
    with torch.no_grad():
        features = trainer().qformer.visual_encoder(batch["references"])
    for rank in (0, 1):
        own, other = batch["text_ids"][rank], batch["text_ids"][1 - rank]
        seen = load_file(tmp_path / f"rank{rank}.safetensors")
        # The pair, its picture with the other's text, the other's picture with its text.
        assert torch.equal(seen["ids"], torch.stack([own, other, own]))
        assert torch.allclose(seen["features"], features[[rank, rank, 1 - rank]], atol=1e-4)


def test_similarities_are_in_single_precision() -> None:
    learner, (ids, mask) = trainer(), text()
    with torch.autocast("cpu", torch.bfloat16):
        loss, similarities, _, _ = learner.contrast(torch.randn(3, 64, 128), ids, mask)
    assert loss.dtype == torch.float32 and all(values.dtype == torch.float32 for values in similarities)


@pytest.mark.parametrize(("pictures", "sizes"), [(130, [64, 64]), (17, [17]), (2, [2])])
def test_captions_are_searched_among_as_many_pictures_each_time(pictures: int, sizes: list[int]) -> None:
    rows = [{"text_ids": torch.tensor([at])} for at in range(pictures)]
    galleries = [batch["text_ids"][:, 0] for batch in folder_pairs(rows)["validation"]()]
    assert [len(gallery) for gallery in galleries] == sizes
    assert torch.equal(torch.cat(galleries), torch.arange(sum(sizes)))


def test_one_picture_is_nothing_to_measure_on() -> None:
    with pytest.raises(ArgumentError, match="1 picture to measure on"):
        folder_pairs([{}])


def test_batches_depend_on_seed_step_and_rank_alone(pieces) -> None:
    batch = caption_batches(pieces, 8, 0)
    first, again, other = batch(3, 1, 2), batch(3, 1, 2), batch(3, 0, 2)
    assert all(torch.equal(first[name], again[name]) for name in first) and len(first["text_ids"]) == 4
    assert not torch.equal(first["references"], other["references"])


def test_what_a_run_learnt_is_told_on_scenes_it_never_saw(pieces, tmp_path) -> None:
    learner = trainer()
    save_file(learner.state_dict(), tmp_path / "ema.safetensors")
    evaluate = evaluation(trainer, world_pairs(pieces, count=64))
    figures = evaluate(1, tmp_path)
    assert set(figures) == {f"{split} {name}" for split in ("validation", "new_art") for name in ("recall", "matched", "told")}
    assert figures == evaluate(1, tmp_path) and all(0 <= value <= 1 for value in figures.values())


def evaluate_alone(rank: int, folder: Path) -> None:
    # The threads of this process's arithmetic, if it has begun any, were not forked: more than one would be waited for.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    ids, mask = text()
    if rank == 0:
        trainer()(torch.randn(3, 3, 64, 64), ids, mask)
        (folder / "done").touch()


def test_one_process_evaluates_while_the_others_wait(tmp_path) -> None:
    context = mp.start_processes(evaluate_alone, (tmp_path,), nprocs=2, start_method="fork", join=False)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in context.processes:
            process.kill()
    assert (tmp_path / "done").exists()


def test_a_qformer_begins_with_the_weights_of_bert(tmp_path) -> None:
    """Without queries, the text alone goes through what was BERT, and comes out as BERT has it."""
    config = QFORMER["qformer_config"]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 512}
    bert = BertModel(BertConfig(**sizes, vocab_size=config["vocab_size"] - 1, max_position_embeddings=16)).eval()
    bert.save_pretrained(tmp_path)
    network = qformer()
    cross = network.encoder.layer[0].crossattention.attention.key.weight.clone()
    start_from_bert(network, tmp_path)
    ids, mask = text()
    with torch.no_grad():
        # Token types are added to all of BERT's text alike; the Q-Former has none.
        bert.embeddings.token_type_embeddings.weight.zero_()
        expected = bert(ids, attention_mask=mask).last_hidden_state
        hidden = network.encode(torch.randn(3, 64, 128), ids, unimodal(mask, QUERIES))[:, QUERIES:]
    assert torch.allclose(hidden[mask.bool()], expected[mask.bool()], atol=1e-4)
    layer = network.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(cross, network.encoder.layer[0].crossattention.attention.key.weight)
    saved = load_file(tmp_path / "model.safetensors")
    old = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for name, value in saved.items()}  # fmt: skip
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    again = qformer(seed=1)
    start_from_bert(again, tmp_path / "old")
    assert torch.equal(again.embeddings.LayerNorm.weight, network.embeddings.LayerNorm.weight)
    smaller = BertModel(BertConfig(**{**sizes, "hidden_size": 64}, vocab_size=50, max_position_embeddings=16))
    smaller.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="has shape"):
        start_from_bert(network, tmp_path / "small")


def test_words_are_told_as_bert_told_them(tmp_path) -> None:
    config = QFORMER["qformer_config"]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 512}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**sizes, vocab_size=config["vocab_size"] - 1, max_position_embeddings=16)).eval()
    with torch.no_grad():
        for weight in bert.cls.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    bert.save_pretrained(tmp_path)
    learner = trainer()
    start_from_bert(learner.qformer, tmp_path)
    start_words_from_bert(learner, tmp_path)
    hidden = torch.randn(2, 3, 128)
    with torch.no_grad():
        told = learner.word_head(hidden) @ learner.qformer.embeddings.word_embeddings.weight.T + learner.word_bias
        assert torch.allclose(told[..., :-1], bert.cls(hidden), atol=1e-4)
    headless, before = trainer(), trainer().state_dict()
    bert.bert.save_pretrained(tmp_path / "headless")
    start_words_from_bert(headless, tmp_path / "headless")
    assert all(torch.equal(value, before[name]) for name, value in headless.state_dict().items())
