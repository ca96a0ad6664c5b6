"""Pipelines with fused schedulers against the same pipelines with stock ones: the same pictures, element by element. Random weights."""

from __future__ import annotations

import functools

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoencoderKL

import genfast.compat.diffusers as gfd

# Stable Diffusion's schedule, for every class that takes it.
TEXT_TO_IMAGE = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False, "variance_type": "fixed_large"},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 3},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {"prediction_type": "v_prediction"},
    "HeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {"thresholding": True, "sample_max_value": 4.0},
}


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


def picture(count=1, seed=5):
    return torch.rand(count, 3, 32, 32, generator=generator(seed))


def pixel_unet():
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def ddpm():
    return diffusers.DDPMPipeline(pixel_unet(), diffusers.DDPMScheduler()), {"batch_size": 2}


def ddim():
    return diffusers.DDIMPipeline(pixel_unet(), diffusers.DDIMScheduler()), {"batch_size": 2, "eta": 0.7}


def text_to_image():
    return tiny.stable_diffusion(), tiny.text(2)


def image_to_image():
    return tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), {**tiny.text(2), "image": picture(2), "strength": 0.6}


def inpaint(in_channels):
    pipe = tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline, in_channels)
    mask = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)
    return pipe, {**tiny.text(1), "image": picture(), "mask_image": mask, "height": 32, "width": 32, "strength": 0.8}


def sdxl():
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    pipe = diffusers.StableDiffusionXLPipeline(tiny.vae(), None, None, None, None, unet, scheduler, add_watermarker=False)
    pooled = torch.randn(2, 8, generator=generator())
    return pipe, {**tiny.text(), "pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:], "guidance_rescale": 0.5}


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return diffusers.DiTPipeline(transformer, tiny.vae(), diffusers.DDIMScheduler()), {"class_labels": [1, 7]}


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, None, None, None, None
    )
    pooled = torch.randn(2, 8, generator=generator())
    return pipe, {**tiny.text(), "pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:], "height": 32, "width": 32}


def flux():
    """Latents of three dimensions, and grids shifted by the length of the sequence."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
    )
    vae = tiny.vae()
    vae.register_to_config(shift_factor=0.06)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    text = {"prompt_embeds": tiny.text()["prompt_embeds"], "pooled_prompt_embeds": torch.randn(1, 8, generator=generator())}
    return pipe, {**text, "height": 32, "width": 32, "guidance_scale": 1.0}


FAMILIES = {
    "ddpm": ddpm,
    "ddim": ddim,
    "text to image": text_to_image,
    "image to image": image_to_image,
    "inpainting, 4 channels": functools.partial(inpaint, 4),
    "inpainting, 9 channels": functools.partial(inpaint, 9),
    "sdxl": sdxl,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
}


def draw(pipe, options, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 5, "generator": generator(), **options, **more}
    # Not every pipeline gives a tensor.
    images = pipe(**call, output_type="np").images
    return torch.from_numpy(images)


def assert_same(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert expected.std() > 0.02 and torch.isfinite(expected).all()  # a picture
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_picture(family):
    torch.manual_seed(0)
    pipe, options = FAMILIES[family]()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    expected = draw(pipe, options)
    stock = pipe.scheduler
    report = gfd.accelerate(pipe)
    assert {"scheduler"} < set(report.swapped) and not report.left  # the networks' attention too
    assert isinstance(pipe.scheduler, gfd.FusedScheduler) and pipe.scheduler.stock is type(stock)
    got = draw(pipe, options)
    assert pipe.scheduler.fallback is None and pipe.scheduler._row is not None
    assert_same(got, expected)
    gfd.restore(pipe)
    assert pipe.scheduler is stock
    assert torch.equal(draw(pipe, options), expected)


STARTS = [
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
]


@pytest.mark.parametrize("name, family", [(name, text_to_image) for name in TEXT_TO_IMAGE] + [(name, image_to_image) for name in STARTS])
def test_same_picture_with_every_scheduler(name, family):
    pipe, options = family()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **TEXT_TO_IMAGE[name])
    expected = draw(pipe, options)
    gfd.accelerate(pipe)
    assert_same(draw(pipe, options), expected)
    assert pipe.scheduler.fallback is None
