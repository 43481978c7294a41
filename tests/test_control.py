"""Attention control: the fused path against explicit maps, scoped installation, counted rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_subject.alignment import Alignment
from p2p_subject.attention import ControlledAttention, controlled_attention, map_size
from p2p_subject.blend import attended_pixels
from p2p_subject.controller import Controller, MapSink, StepControl, Tap, compile_edits, self_pixels, steps_of
from p2p_subject.edits import EditSpec
from p2p_subject.errors import EditSpecError, HookError
from p2p_subject.prompts import aligned
from p2p_subject.tokens import TokenLayout, layout
from tests.tiny_pipelines import WINDOW, tokenizer

TOKENS, WIDTH = 6, 8


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**(config | changes)).eval()


class ExplicitMaps:
    """The oracle: the published chain, written from its formula on materialised maps.

    replace or refine -> reweight -> gate:  edited = ((A M + B (1 - c)) w) g + B (1 - g)
    """

    def __init__(self, edits: list[dict], self_pixels: int) -> None:
        self.edits, self.self_pixels, self.seen = edits, self_pixels, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            attn.head_to_batch_dim(f(x)) for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        maps = (q @ k.transpose(1, 2) * attn.scale).softmax(-1).unflatten(0, (len(hidden_states), -1))  # (B, H, Q, T)
        pixels = maps.shape[2]
        source = maps[0].clone()
        for number, edit in enumerate(self.edits):
            row = 1 + len(self.edits) + number
            if cross:
                own = maps[row]
                mixed = source @ edit["M"] + own * (1 - edit["c"])
                maps[row] = mixed * edit["w"] * edit["g"] + own * (1 - edit["g"])
            elif pixels <= self.self_pixels:
                maps[row] = source
        if cross:
            self.seen.append((pixels, maps.mean(1)))
        out = maps.flatten(0, 1) @ v
        return attn.to_out[0](attn.batch_to_head_dim(out))


def random_edit(draw_seed: int, gate: str) -> dict:
    generator = torch.Generator().manual_seed(draw_seed)
    covered = (torch.rand(TOKENS, generator=generator) < 0.6).double()
    matrix = torch.rand(TOKENS, TOKENS, generator=generator, dtype=torch.float64) * covered
    weights = torch.randn(TOKENS, generator=generator, dtype=torch.float64) * 2
    gates = {"none": torch.zeros(TOKENS), "all": torch.ones(TOKENS), "words": torch.rand(TOKENS, generator=generator) < 0.5}
    return {"M": matrix, "c": covered, "w": weights, "g": gates[gate].double()}


def compiled(edits: list[dict], pixels: int) -> Controller:
    return Controller(
        matrices=torch.stack([e["M"] * e["w"] for e in edits]),
        own=torch.stack([(1 - e["c"]) * e["w"] for e in edits]),
        gates=torch.stack([e["g"].bool()[None] for e in edits]),
        self_gates=torch.ones(len(edits), 1, dtype=torch.bool),
        self_pixels=(pixels,) * len(edits),
    )


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 3),
    gate=st.sampled_from(["none", "all", "words"]),
    side=st.sampled_from([0, 4, 8]),
)
@settings(deadline=None, max_examples=25)
def test_changed_values_equal_changed_maps(seed: int, count: int, gate: str, side: int) -> None:
    """With the source in the batch and, to rounding, with its recorded queries and keys in its place."""
    unet = tiny_unet().double()
    edits = [random_edit(seed + k, gate) for k in range(count)]
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + 2 * count
    latents = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    controller = compiled(edits, side * side)
    sink, tap = MapSink(rows=tuple(range(rows)), pixels=16), Tap(side * side)
    short = MapSink(rows=tuple(range(rows - 1)), pixels=16)
    with torch.no_grad(), controlled_attention(unet):
        ours = unet(latents, 500, context, cross_attention_kwargs={"control": controller.at(0, rows, sink)}).sample
        record = StepControl(rows=1, tap=tap)
        unet(latents[:1], 500, context[:1], cross_attention_kwargs={"control": record})
        replayed = controller.at(0, rows - 1, short, tap.taken)
        recorded = unet(latents[1:], 500, context[1:], cross_attention_kwargs={"control": replayed}).sample
    oracle = ExplicitMaps(edits, side * side)
    unet.set_attn_processor(oracle)
    with torch.no_grad():
        theirs = unet(latents, 500, context).sample
    assert (ours - theirs).abs().max() < 1e-10 and (recorded - theirs[1:]).abs().max() < 1e-10
    read = torch.stack([maps for pixels, maps in oracle.seen if pixels == 16]).mean(0)
    # Maps are read in float32.
    assert (sink.mean() - read).abs().max() < 1e-6 and (short.mean() - read[1:]).abs().max() < 1e-6
    assert set(tap.taken) >= {name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name}


@pytest.mark.parametrize("pixels", [0, 64])
def test_hidden_pixels_are_seen_by_no_row_that_they_are_hidden_from(pixels: int) -> None:
    """Against maps that are set to zero and normalised again; of self-attention that follows the source, too."""
    unet = tiny_unet().double()
    latents, context = torch.randn(3, 4, 8, 8).double(), torch.randn(3, TOKENS, WIDTH).double()
    mask = torch.zeros(8, 8)
    mask[2:4, 3:6] = 1
    seen = {q: torch.stack([torch.ones_like(own), own, own])[:, None, None] for q, own in attended_pixels(mask).items()}

    class Zeroed:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            cross = encoder_hidden_states is not None
            states = encoder_hidden_states if cross else hidden_states
            q, k, v = (
                f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for f, x in ((attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states))
            )
            if not cross and q.shape[2] <= pixels:
                q, k = (torch.cat([x[:2], x[:1]]) for x in (q, k))
            maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
            if not cross:
                maps = maps * seen[q.shape[2]]
                maps = maps / maps.sum(-1, keepdim=True)
            return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))

    with torch.no_grad(), controlled_attention(unet):
        control = StepControl(rows=3, self_pixels=(pixels,), attended=seen)
        ours = unet(latents, 500, context, cross_attention_kwargs={"control": control}).sample
        plain = unet(latents, 500, context, cross_attention_kwargs={"control": StepControl(3, self_pixels=(pixels,))}).sample
    unet.set_attn_processor(Zeroed())
    with torch.no_grad():
        theirs = unet(latents, 500, context).sample
    assert (ours - theirs).abs().max() < 1e-10
    assert (ours[0] - plain[0]).abs().max() < 1e-10 < 1e-4 < (ours[1:] - plain[1:]).abs().amax((1, 2, 3)).min()


def test_without_a_control_the_network_computes_what_it_did() -> None:
    unet = tiny_unet()
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        before = unet(latents, 10, context).sample
        with controlled_attention(unet):
            inside = unet(latents, 10, context).sample
            silent = unet(latents, 10, context, cross_attention_kwargs={"control": StepControl(rows=2)}).sample
        after = unet(latents, 10, context).sample
    assert torch.equal(before, inside) and torch.equal(before, silent) and torch.equal(before, after)


def test_an_identity_edit_of_equal_rows_is_the_plain_run() -> None:
    unet = tiny_unet().double()
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64).expand(3, -1, -1, -1)
    context = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64).expand(3, -1, -1)
    step = StepControl(3, torch.eye(TOKENS).double()[None], torch.zeros(1, TOKENS).double(), self_pixels=(64,))
    with torch.no_grad(), controlled_attention(unet):
        edited = unet(latents, 10, context, cross_attention_kwargs={"control": step}).sample
    with torch.no_grad():
        plain = unet(latents, 10, context).sample
    assert (edited - plain).abs().max() < 1e-12


def test_the_number_of_rows_is_checked_in_the_processor() -> None:
    unet = tiny_unet()
    with controlled_attention(unet), pytest.raises(HookError, match="called with 2 rows, the control was compiled for 3"):
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, TOKENS, WIDTH), cross_attention_kwargs={"control": StepControl(3)})


def test_processors_are_restored_after_an_exception() -> None:
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), controlled_attention(unet):
        assert {type(p) for p in unet.attn_processors.values()} == {ControlledAttention}
        raise RuntimeError("stop")
    assert unet.attn_processors == before and len(before) == 14


def test_foreign_processors_are_never_dropped_in_silence() -> None:
    class Foreign(AttnProcessor2_0):
        pass

    unet = tiny_unet()
    unet.set_attn_processor(Foreign())
    with pytest.raises(HookError, match="14 attention layers carry Foreign"), controlled_attention(unet):
        pass
    assert {type(p) for p in unet.attn_processors.values()} == {Foreign}


def test_a_network_without_cross_attention_is_refused() -> None:
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None
    )
    with pytest.raises(HookError, match="nothing to control"), controlled_attention(unet):
        pass


@pytest.mark.parametrize(
    ("latent", "expected"),
    [
        ((8, 8), (8, 8)),
        ((32, 32), (16, 16)),
        ((64, 64), (32, 32)),
        ((16, 24), (16, 24)),
        ((64, 96), (32, 48)),
        ((9, 31), (9, 31)),
        ((31, 33), (16, 17)),
    ],
)
def test_maps_are_read_where_their_area_is_nearest_to_sixteen_squared(latent, expected) -> None:
    assert map_size(tiny_unet(), latent) == expected


def test_the_maps_that_are_announced_are_the_maps_that_come() -> None:
    unet = tiny_unet()
    for size in ((8, 8), (16, 24), (12, 36), (10, 30)):
        height, width = map_size(unet, size)
        sink = MapSink((0,), height * width)
        with torch.no_grad(), controlled_attention(unet):
            control = StepControl(rows=1, sink=sink)
            unet(torch.zeros(1, 4, *size), 1, torch.zeros(1, TOKENS, WIDTH), cross_attention_kwargs={"control": control})
        assert sink.mean().shape == (1, height * width, TOKENS)
        assert torch.allclose(sink.mean().sum(-1), torch.ones(1))


@given(start=st.floats(0, 1), stop=st.floats(0, 1), steps=st.integers(1, 100))
def test_windows_are_contiguous_and_disjoint_windows_share_no_step(start: float, stop: float, steps: int) -> None:
    start, stop = sorted((start, stop))
    inside = steps_of((start, stop), steps)
    assert abs(inside.start - start * steps) <= 1 and abs(inside.stop - stop * steps) <= 1
    assert not set(steps_of((stop, 1.0), steps)) & set(inside)
    assert steps_of((0.0, 1.0), steps) == range(steps)


@given(steps=st.integers(1, 200), data=st.data())
def test_a_window_of_k_steps_of_n_holds_k_steps(steps: int, data) -> None:
    """k / N * N may fall below k by rounding: 29 of 58, say, in another order of operations."""
    k = data.draw(st.integers(0, steps))
    assert steps_of((0.0, k / steps), steps) == range(k)


@pytest.mark.parametrize(
    ("side", "latent", "pixels"),
    [
        (None, (31, 33), 16 * 17),
        (None, (64, 64), 32 * 32),
        (16, (64, 64), 256),
        (None, (64, 96), 32 * 48),
        (None, (16, 8), 8 * 4),
        (64, (64, 64), 4096),
    ],
)
def test_self_attention_follows_up_to_half_the_latents_side(side, latent, pixels) -> None:
    assert self_pixels(side, latent) == pixels


LAYOUT = TokenLayout("a cat", (1, 5, 6, 2, 2, 2), (None, (0, 1), (2, 5), None, None, None), range(0))
IDENTITY = Alignment(torch.eye(TOKENS), torch.ones(TOKENS))


def test_compiled_weights_and_windows() -> None:
    spec = EditSpec(prompt="a cat", cross_replace=(0.0, 0.5), self_replace=(0.5, 1.0), weights={"cat": 3.0})
    controller = compile_edits([spec], [IDENTITY], [LAYOUT], 4, (16, 8))
    first, last = controller.at(0, 3), controller.at(3, 3)
    assert controller.steps == 4 and first.rows == 3
    assert torch.equal(first.from_source[0], torch.diag(torch.tensor([1.0, 1, 3, 1, 1, 1]))) and first.self_pixels == (0,)
    assert last.from_source is None and last.self_pixels == (8 * 4,)
    assert [controller.crosses(i) for i in range(4)] == [True, True, False, False]
    assert [controller.borrows(i) for i in range(4)] == [0, 0, 32, 32]


def test_words_have_windows_of_their_own() -> None:
    spec = EditSpec(prompt="a cat", cross_replace={"cat": (0.25, 0.5), None: 0.75})
    controller = compile_edits([spec], [IDENTITY], [LAYOUT], 4, (16, 8))
    assert controller.gates[0, :, 2].tolist() == [False, True, False, False]
    assert controller.gates[0, :, 1].tolist() == [True, True, True, False]
    assert controller.at(0, 3).from_target[0].tolist() == [0, 0, 1, 0, 0, 0]
    alone = compile_edits([EditSpec(prompt="a cat", cross_replace={"cat": 0.5})], [IDENTITY], [LAYOUT], 10, (16, 8))
    assert alone.gates[0, :, 1].sum() == 8 and alone.gates[0, :, 2].sum() == 5


def test_weights_of_one_of_two_equal_words_and_weights_without_a_step() -> None:
    seen = TokenLayout("cat cat", (1, 5, 5, 2, 2, 2), (None, (0, 3), (4, 7), None, None, None), range(0))
    spec = EditSpec(prompt="cat cat", cross_replace=0.5, weights={("cat", 1): 3.0})
    controller = compile_edits([spec], [IDENTITY], [seen], 4, (16, 8))
    assert torch.equal(controller.at(0, 3).from_source[0].diag(), torch.tensor([1.0, 1, 3, 1, 1, 1]))
    with pytest.raises(EditSpecError, match="can have no effect: of the 1 steps"):
        compile_edits([spec], [IDENTITY], [seen], 1, (16, 8))


WORDS = ["cat", "dog", "grass", "sand", "blue", "hat", "on", "a", "fox"]
prompts = st.lists(st.sampled_from(WORDS), min_size=2, max_size=6).map(" ".join)
windows = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: tuple(k / 4 for k in sorted(pair)))


@given(source=prompts, target=prompts, index=st.integers(0, 3), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_compiled_spec_is_the_published_chain_at_every_step(source: str, target: str, index: int, seed: int, data) -> None:
    """From the words of a spec to attention: layouts, alignment, weights and windows of words, against explicit maps."""
    ours, theirs = (layout(tokenizer(), prompt, max_length=WINDOW) for prompt in (source, target))
    same_length = len(source.split()) == len(target.split())
    once = [word for word in WORDS if target.split().count(word) == 1]
    default = data.draw(windows)
    own = data.draw(st.dictionaries(st.sampled_from(once), windows, max_size=2)) if once else {}
    spec = EditSpec(
        prompt=target,
        alignment=data.draw(st.sampled_from(["words", "refine", *["replace"] * same_length])),
        padding=data.draw(st.sampled_from(["shifted", "reference"])),
        cross_replace={None: default, **own},
        self_replace=data.draw(windows),
        self_resolution=data.draw(st.sampled_from([4, 8])),
    )
    alignment = aligned(ours, theirs, spec)
    gate = torch.full((WINDOW,), float(int(4 * default[0]) <= index < int(4 * default[1])), dtype=torch.float64)
    weights = torch.ones(WINDOW, dtype=torch.float64)
    factors = {}
    for word, (start, stop) in own.items():
        gate[list(theirs.columns(word))] = float(int(4 * start) <= index < int(4 * stop))
        if stop > start:
            factors[word] = data.draw(st.floats(-3, 3))
            weights[list(theirs.columns(word))] = factors[word]
    controller = compile_edits([replace(spec, weights=factors)], [alignment], [theirs], 4, (8, 8))
    follows = int(4 * spec.self_replace[0]) <= index < int(4 * spec.self_replace[1])
    edit = {"M": alignment.matrix.double(), "c": alignment.covered.double(), "w": weights, "g": gate}

    unet = tiny_unet().double()
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(3, WINDOW, WIDTH, generator=generator, dtype=torch.float64)
    # The same in double precision; the controller itself works in single.
    matrices, left = (alignment.matrix.double() * weights)[None], ((1 - alignment.covered.double()) * weights)[None]
    exact = replace(controller, matrices=matrices, own=left)
    assert torch.allclose(controller.matrices.double(), exact.matrices) and torch.allclose(controller.own.double(), exact.own)
    with torch.no_grad(), controlled_attention(unet):
        edited = unet(latents, 500, context, cross_attention_kwargs={"control": exact.at(index, 3)}).sample
    unet.set_attn_processor(ExplicitMaps([edit], spec.self_resolution**2 * follows))
    with torch.no_grad():
        assert (edited - unet(latents, 500, context).sample).abs().max() < 1e-10
