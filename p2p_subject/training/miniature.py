"""The networks of the miniature: the classes of BLIP-Diffusion and Stable Diffusion, small enough to train on a CPU."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig, ContextCLIPTextConfig
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.training import world
from p2p_subject.training.representation import Shares, SubjectLearning
from p2p_subject.training.tokenizers import QUERIES, WINDOW, byte_pairs, word_pieces

WIDTH = 128

UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH,
    attention_head_dim=(2, 4, 4),
    norm_num_groups=16,
)
TEXT = dict(
    vocab_size=len(byte_pairs()[0]),
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=WINDOW,
    hidden_act="quick_gelu",
    bos_token_id=len(byte_pairs()[0]) - 2,
    eos_token_id=len(byte_pairs()[0]) - 1,
)
QFORMER = dict(
    num_query_tokens=QUERIES,
    tokenizer="qformer_tokenizer",
    vision_config=dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=8,
        hidden_act="quick_gelu",
    ),
    qformer_config=dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=1,
        max_position_embeddings=16,
        vocab_size=len(word_pieces()),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

LEARNING = SubjectLearning(
    shares=Shares(), train_image_encoder=True, max_snr=5.0, central=0.5, subject_weight=1.0, auxiliary_weight=0.06
)
"""How the shipped weights were trained: nothing of the miniature was trained before, its image encoder neither."""

SETTINGS = dict(scheduler=SCHEDULER, empty=[TEXT["bos_token_id"], *[TEXT["eos_token_id"]] * (WINDOW - 1)])
"""What a `SubjectTrainer` is told beside the networks."""


def networks() -> dict[str, UNet2DConditionModel | ContextCLIPTextModel | Blip2QFormerModel]:
    """The networks that stage two trains, with random weights, by their names in a model folder."""
    return {
        "unet": UNet2DConditionModel(**UNET),
        "text_encoder": ContextCLIPTextModel(ContextCLIPTextConfig.from_dict(TEXT)),
        "qformer": Blip2QFormerModel(Blip2QFormerConfig.from_dict(QFORMER)),
    }
