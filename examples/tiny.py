"""A Stable Diffusion of a few thousand random weights: what the examples run on when no ``--model`` is given."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def unet(in_channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def stable_diffusion(pipeline: type = StableDiffusionPipeline, in_channels: int = 4) -> Any:
    """Weights from seed 0, the schedule of Stable Diffusion 1; no text encoder, so it is called with ``prompt_embeds``."""
    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    pipe = pipeline(
        vae=vae().eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(in_channels).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(count: int = 1, length: int = 5, width: int = 8) -> dict[str, torch.Tensor]:
    """What stands for ``count`` encoded prompts, and for the empty ones that guidance needs."""
    prompts = torch.randn(2 * count, length, width, generator=torch.Generator().manual_seed(7))
    return {"prompt_embeds": prompts[:count], "negative_prompt_embeds": prompts[count:]}
