"""The networks: what defines them, in any precision, in training and out of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from blip_tiny import MULTIMODAL, TEXT, deviation
from conftest import golden

from p2p_subject.blip_diffusion import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    ContextCLIPTextConfig,
    ContextCLIPTextModel,
)
from p2p_subject.errors import ImageError, ModelError, PromptTooLongError, SubjectError

# The text encoder


@pytest.fixture(scope="module")
def text_encoder():
    torch.manual_seed(0)
    return ContextCLIPTextModel(replace(TEXT, initializer_range=0.2)).eval()


def test_the_subject_stands_where_it_is_put(text_encoder):
    ids = torch.arange(10)[None]
    table = text_encoder.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        plain = text_encoder(ids)
        spliced = text_encoder(torch.cat([ids[:, :2], ids[:, 5:]], dim=1), table[None, 2:5], context_position=2)
    assert torch.equal(plain, spliced)


def test_each_prompt_may_have_its_own_position(text_encoder):
    generator = torch.Generator().manual_seed(4)
    positions = [0, 2, 7, 9]
    ids = torch.randint(0, TEXT.vocab_size, (len(positions), 9), generator=generator)
    subjects = torch.randn(len(positions), 4, TEXT.hidden_size, generator=generator, requires_grad=True)
    together = text_encoder(ids, subjects, torch.tensor(positions))
    alone = [text_encoder(ids[row : row + 1], subjects[row : row + 1], at) for row, at in enumerate(positions)]
    assert deviation(together, torch.cat(alone)) < 1e-5
    together.square().sum().backward()
    assert (subjects.grad.abs().sum((1, 2)) > 0).all()
    for wrong in (torch.tensor([0, 2, 7, 10]), torch.tensor([0, -1, 7, 9]), torch.tensor([2, 2]), torch.full((4,), 2.0)):
        with pytest.raises(ModelError, match="context_position"):
            text_encoder(ids, subjects, wrong)


def test_later_tokens_do_not_change_earlier_outputs(text_encoder):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TEXT.vocab_size, (1, 12), generator=generator)
    subject = torch.randn(1, 4, TEXT.hidden_size, generator=generator)
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % TEXT.vocab_size
    with torch.no_grad():
        before, after = text_encoder(ids, subject), text_encoder(changed, subject)
    column = 6 + 4
    assert torch.equal(before[:, :column], after[:, :column])
    assert all(not torch.equal(before[:, at], after[:, at]) for at in range(column, 12 + 4))


def test_the_subject_changes_only_what_follows_it(text_encoder):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, TEXT.vocab_size, (1, 12), generator=generator)
    first, second = torch.randn(2, 1, 4, TEXT.hidden_size, generator=generator)
    with torch.no_grad():
        a, b = text_encoder(ids, first), text_encoder(ids, second)
    assert torch.equal(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2:], b[:, 2:])


def test_too_many_tokens_for_the_positions_are_refused(text_encoder):
    with pytest.raises(PromptTooLongError, match="25 positions; this text encoder has 24"):
        text_encoder(torch.zeros(1, 21, dtype=torch.long), torch.zeros(1, 4, TEXT.hidden_size))


@pytest.mark.parametrize("shape", [(2, 4, TEXT.hidden_size), (1, 4, TEXT.hidden_size + 1), (4, TEXT.hidden_size)])
def test_a_context_of_another_shape_is_refused(text_encoder, shape):
    with pytest.raises(ModelError, match="number of queries"):
        text_encoder(torch.zeros(1, 8, dtype=torch.long), torch.zeros(shape))


@pytest.mark.parametrize("position", [-1, 9])
def test_a_context_outside_the_prompt_is_refused(text_encoder, position):
    with pytest.raises(ModelError, match="from 0 to 8"):
        text_encoder(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 4, TEXT.hidden_size), position)


# The Q-Former


@pytest.fixture(scope="module")
def qformer():
    torch.manual_seed(0)
    return Blip2QFormerModel(replace(MULTIMODAL, initializer_range=0.2)).eval()


def pixels(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_padding_of_the_category_changes_nothing(qformer):
    ids = torch.tensor([[2, 5, 3]])
    padded, mask = torch.tensor([[2, 5, 3, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        assert deviation(qformer(pixels(1), padded, mask), qformer(pixels(1), ids)) < 1e-5


def test_picture_and_category_both_matter(qformer):
    dog, cat = torch.tensor([[2, 5, 3]]), torch.tensor([[2, 6, 3]])
    with torch.no_grad():
        base = qformer(pixels(1), dog)
        assert not torch.allclose(base, qformer(pixels(1, seed=1), dog), atol=1e-3)
        assert not torch.allclose(base, qformer(pixels(1), cat), atol=1e-3)


def test_forward_is_encoding_and_projection(qformer):
    ids = torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        hidden = qformer.encode(qformer.visual_encoder(pixels(1)), ids)
        assert hidden.shape == (1, 4 + 3, 32)
        assert torch.equal(qformer.proj_layer(hidden[:, :4]), qformer(pixels(1), ids))


def test_a_mask_of_pairs_can_keep_queries_and_text_apart(qformer):
    apart = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3))[None]
    features = qformer.visual_encoder(pixels(1))
    with torch.no_grad():
        queries = qformer.encode(features)
        mixed = qformer.encode(features, torch.tensor([[2, 5, 3]]), apart)
    assert deviation(mixed[:, :4], queries) < 1e-5


def test_only_every_nth_layer_reads_the_image(qformer):
    layers = {name.split(".")[2] for name in qformer.state_dict() if "crossattention" in name}
    assert layers == {"0"}


def test_pictures_of_another_size_are_refused(qformer):
    with pytest.raises(ImageError, match=r"\(B, 3, 32, 32\)"):
        qformer(torch.zeros(1, 3, 16, 16), torch.tensor([[2, 3]]))


def test_a_category_longer_than_the_positions_is_refused(qformer):
    with pytest.raises(SubjectError, match="17 word pieces"):
        qformer(pixels(1), torch.zeros(1, 17, dtype=torch.long))


def test_a_mask_of_another_shape_is_refused(qformer):
    with pytest.raises(ModelError, match="attention_mask"):
        qformer(pixels(1), torch.tensor([[2, 3]]), torch.ones(1, 5))


# Both


def test_every_weight_receives_a_gradient():
    torch.manual_seed(0)
    text_encoder, qformer = ContextCLIPTextModel(TEXT), Blip2QFormerModel(MULTIMODAL)
    assert text_encoder.training and qformer.training
    subject = qformer(pixels(2), torch.tensor([[2, 5, 3], [2, 6, 3]]))
    text_encoder(torch.zeros(2, 6, dtype=torch.long), subject).square().sum().backward()
    # The last layer's text half ends in outputs that nothing reads.
    unread = ("encoder.layer.1.intermediate.", "encoder.layer.1.output.")
    for network in (text_encoder, qformer):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and (name.startswith(unread) or parameter.grad.abs().sum() > 0), name


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    qformer, ids = Blip2QFormerModel(MULTIMODAL), torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        assert not torch.equal(qformer(pixels(1), ids), qformer(pixels(1), ids))
        qformer.eval()
        assert torch.equal(qformer(pixels(1), ids), qformer(pixels(1), ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_close(text_encoder, qformer, dtype):
    ids, prompt = torch.tensor([[2, 5, 3]]), torch.arange(12)[None]
    half_text = ContextCLIPTextModel(text_encoder.config).to(dtype).eval()
    half_text.load_state_dict(text_encoder.state_dict())
    half_qformer = Blip2QFormerModel(qformer.config).to(dtype).eval()
    half_qformer.load_state_dict(qformer.state_dict())
    with torch.no_grad():
        subject, half_subject = qformer(pixels(1), ids), half_qformer(pixels(1), ids)
        text, half_out = text_encoder(prompt, subject), half_text(prompt, half_subject)
    assert half_subject.dtype == half_out.dtype == half_text.dtype == half_qformer.dtype == dtype
    assert deviation(half_subject.float(), subject) < 0.15 * subject.abs().max()
    assert deviation(half_out.float(), text) < 0.15 * text.abs().max()


def test_defaults_are_those_of_the_published_configurations():
    text, multimodal = ContextCLIPTextConfig.from_dict({}), Blip2QFormerConfig.from_dict({})
    assert (text.hidden_size, text.num_hidden_layers, text.max_position_embeddings) == (512, 12, 77)
    vision, qformer = multimodal.vision_config, multimodal.qformer_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (
        1408,
        39,
        14,
        224,
    )
    assert (qformer.hidden_size, qformer.cross_attention_frequency, qformer.vocab_size) == (768, 2, 30522)
    assert multimodal.output_size == 768


def test_configurations_give_back_what_they_were_read_from():
    content = json.loads(golden("blip_diffusion/checkpoint/qformer/config.json").read_text())
    assert Blip2QFormerConfig.from_dict(content).to_dict() == content
    wider = replace(Blip2QFormerConfig.from_dict(content), num_query_tokens=7)
    assert wider.to_dict() == {**content, "num_query_tokens": 7}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("qformer_config", "num_attention_heads", 5),
        ("vision_config", "patch_size", 500),
        ("qformer_config", "hidden_act", "x"),
    ],
)
def test_impossible_configurations_are_refused(section, key, value):
    content = MULTIMODAL.to_dict()
    content[section] = {**content[section], key: value}
    with pytest.raises(ModelError, match=key.replace("num_attention_heads", "heads")):
        Blip2QFormerModel(Blip2QFormerConfig.from_dict(content))
