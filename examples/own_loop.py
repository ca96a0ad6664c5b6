"""A denoising loop of one's own, with guidance inside the step and noise that belongs to each sample.

Three samples drawn together and one by one are the same three: a sample's noise comes from its seed, not from its place in a batch.

python examples/own_loop.py [--model NAME] [--seeds 5 2 9]
"""

from __future__ import annotations

import argparse

import tiny
import torch
from diffusers import UNet2DConditionModel

from genfast.compat.diffusers import EulerAncestralDiscreteScheduler
from genfast.ops import normal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a Stable Diffusion whose UNet is to be sampled from")
parser.add_argument("--seeds", type=int, nargs="+", default=[5, 2, 9])
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
unet = (UNet2DConditionModel.from_pretrained(args.model, subfolder="unet") if args.model else tiny.unet()).eval()
size, width = unet.config.sample_size, unet.config.cross_attention_dim
text = torch.randn(2, 77, width)  # what stands for the empty prompt and the prompt


@torch.no_grad()
def sample(seeds: list[int]) -> torch.Tensor:
    scheduler = EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(args.steps)
    x = normal(torch.tensor(seeds), (len(seeds), 4, size, size)) * scheduler.init_noise_sigma
    embeddings = text.repeat_interleave(len(seeds), dim=0)  # the unconditional half first
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        prediction = unet(torch.cat([model_input, model_input]), t, embeddings).sample
        x = scheduler.step(prediction, t, x, seeds=seeds, guidance_scale=5.0).prev_sample
    return x


together = sample(args.seeds)
alone = torch.cat([sample([seed]) for seed in args.seeds])
print(f"largest difference between a sample alone and in the batch: {float((together - alone).abs().max()):.1e}")
print(f"between two samples: {float((together[0] - together[-1]).abs().max()):.1e}")
