"""Generation in batches, and subjects that lie between others or are known by their embeddings."""

from __future__ import annotations

import pytest
import torch

from inversion import TrajectoryError
from p2p_subject import EditSpec, EmbeddedSubject, MixedSubject, Subject, refine, swap_subject
from p2p_subject.errors import ArgumentError, EditSpecError, PromptError, SubjectError
from tests.editing import STEPS, picture


def test_pictures_generated_together_are_those_generated_alone(editor, dog) -> None:
    prompts, subjects, seeds = ["a cat", "a dog on grass", "a dog on grass"], [None, dog, dog], [3, 3, 4]
    together = editor.generate(prompts, subject=subjects, seed=seeds, steps=STEPS)
    for source, prompt, subject, seed in zip(together, prompts, subjects, seeds):
        alone = editor.generate(prompt, subject=subject, seed=seed, steps=STEPS)
        assert torch.allclose(source.trajectory.latents, alone.trajectory.latents, atol=1e-4)
        assert torch.allclose(source.attention, alone.attention, atol=1e-5) and source.prompt == prompt
        assert torch.equal(source.trajectory.before(0), alone.trajectory.before(0))
    assert torch.equal(together[0].trajectory.before(0), together[1].trajectory.before(0))
    edited = editor.edit(together[1], refine("a dog on grass at night", blend=None))
    assert edited.image.size == together[1].image.size


def test_what_is_not_in_a_list_serves_every_row(editor, dog) -> None:
    pair = editor.generate("a dog", subject=dog, seed=[0, 1], steps=2)
    assert [source.prompt for source in pair] == ["a dog"] * 2
    noise = torch.zeros(1, 4, 16, 16)
    same = editor.generate(["a dog", "a dog"], latents=noise, steps=2)
    assert torch.allclose(same[0].trajectory.clean, same[1].trajectory.clean, atol=1e-5)
    assert len(editor.generate(["a dog"], seed=0, steps=2)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, ArgumentError, "prompt has 2, seed has 3; expected lists of one length"),
        ({"prompt": []}, ArgumentError, "prompt has 0"),
        ({"prompt": ["a dog", 3]}, PromptError, "prompt=3; expected a text"),
        ({"prompt": "a dog", "subject": "dog.png"}, SubjectError, "expected Subject"),
        ({"prompt": "a dog", "seed": [0, -1]}, EditSpecError, "seed=-1"),
        ({"prompt": "a dog", "seed": 2**64}, EditSpecError, "expected a whole number from 0 to 2"),
        ({"prompt": "a dog", "latents": torch.zeros(1, 4, 16, 16), "size": (64, 128)}, ArgumentError, "latents of pictures of"),
        ({"prompt": "a dog", "latents": torch.zeros(1, 4, 16, 16), "size": "huge"}, ArgumentError, "size='huge'"),
        ({"prompt": ["a", "b"], "latents": torch.zeros(3, 4, 16, 16)}, TrajectoryError, r"expected \(1 or 2, 4, h, w\)"),
    ],
)
def test_lists_that_do_not_fit_are_refused_before_any_network(editor, monkeypatch, arguments: dict, error, message) -> None:
    for name in ("unet", "text_encoder", "qformer", "vae"):
        monkeypatch.setattr(getattr(editor.model.pipeline, name), "forward", None)
    with pytest.raises(error, match=message):
        editor.generate(arguments.pop("prompt"), steps=2, **arguments)


@pytest.mark.parametrize("spherical", [False, True])
def test_subjects_are_mixed_along_the_way_between_their_embeddings(editor, dog, spherical: bool) -> None:
    cat = Subject(picture(seed=2), "cat")
    first, second = editor.model.embed(dog), editor.model.embed(cat)
    ends = [editor.model.embed(Subject.mix(dog, cat, amount, spherical=spherical)) for amount in (0, 1)]
    assert torch.allclose(ends[0], first, atol=1e-5) and torch.allclose(ends[1], second, atol=1e-5)
    middle = editor.model.embed(Subject.mix(dog, cat, 0.25, spherical=spherical))
    if spherical:
        lengths = 0.75 * first.norm(dim=-1) + 0.25 * second.norm(dim=-1)
        assert torch.allclose(middle.norm(dim=-1), lengths, rtol=1e-4)
        # A quarter of the way is a quarter of the angle.
        between = [torch.cosine_similarity(first, other, dim=-1).arccos() for other in (middle, second)]
        assert torch.allclose(between[0], 0.25 * between[1], atol=2e-3)
    else:
        assert torch.allclose(middle, 0.75 * first + 0.25 * second, atol=1e-6)
    strip = editor.generate("a dog", subject=[Subject.mix(dog, cat, t) for t in (0, 0.5, 1)], seed=0, steps=2)
    alone = editor.generate("a dog", subject=dog, seed=0, steps=2)
    assert torch.allclose(strip[0].trajectory.clean, alone.trajectory.clean, atol=1e-4)


def test_a_subject_known_by_its_embedding_edits_as_its_picture_does(editor, source, dog) -> None:
    known = EmbeddedSubject(editor.model.embed(dog), "dog")
    pictured, learned = (editor.edit(source, swap_subject("cat", subject)) for subject in (dog, known))
    assert torch.equal(pictured.latents, learned.latents)
    with pytest.raises(SubjectError, match="Learn the subject with this model"):
        editor.edit(source, swap_subject("cat", EmbeddedSubject(torch.zeros(1, 3, 8), "dog")))


@pytest.mark.parametrize("spherical", [False, True])
def test_every_kind_of_subject_survives_json(dog, spherical: bool) -> None:
    known = EmbeddedSubject(torch.randn(1, 4, 128), "cat")
    mixed = Subject.mix(dog, Subject.mix(known, dog, 0.9), 0.3, spherical=spherical, category="pet")
    read = EditSpec.from_json(swap_subject("fox", mixed).to_json()).subject
    assert isinstance(read, MixedSubject) and (read.amount, read.spherical, read.category) == (0.3, spherical, "pet")
    assert read.first == dog and torch.equal(read.second.first.embedding, known.embedding)
    assert read.second.category == "dog" and read.encoded == ("dog", "dog")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda dog: Subject.mix(dog, dog, 1.5), "amount=1.5; expected a number between 0"),
        (lambda dog: Subject.mix(dog, "cat.png", 0.5), "second='cat.png'; expected Subject"),
        (lambda dog: Subject.mix(dog, dog, 0.5, category=" "), "category=' '"),
        (lambda dog: EmbeddedSubject(torch.zeros(4, 128), "dog"), r"\(4, 128\) given; expected a tensor"),
        (lambda dog: EmbeddedSubject(torch.full((1, 4, 8), float("nan")), "dog"), "finite numbers"),
        (lambda dog: EmbeddedSubject("x", "dog"), "str given"),
        (lambda dog: Subject.from_dict({"embedding": "!", "shape": [1], "category": "dog"}), "float32 in base64"),
    ],
)
def test_subjects_that_cannot_be_are_refused(dog, make, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        make(dog)


def test_opposite_and_equal_directions_are_mixed_straight() -> None:
    one = EmbeddedSubject(torch.ones(1, 2, 4), "dog")
    other = EmbeddedSubject(torch.cat([-torch.ones(1, 1, 4), torch.ones(1, 1, 4)], 1), "dog")
    mixed = Subject.mix(one, other, 0.5, spherical=True).embedded(None)
    assert torch.allclose(mixed, torch.tensor([[[0.0] * 4, [1.0] * 4]]), atol=1e-5)
