"""Where a training loop meets a scheduler: noise is added by `add_noise`, and a loss on the result of a fused `step` has gradients.

python examples/fine_tune.py [--model NAME] [--steps 20]
"""

from __future__ import annotations

import argparse

import tiny
import torch
from diffusers import UNet2DConditionModel

from genfast.compat.diffusers import DDIMScheduler, DDPMScheduler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a Stable Diffusion whose UNet is to be trained")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet") if args.model else tiny.unet()
size, width = unet.config.sample_size, unet.config.cross_attention_dim
training = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
latents, text = torch.randn(4, 4, size, size), torch.randn(4, 5, width)  # what a data loader and the encoders would give

for step in range(args.steps):
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (4,))
    prediction = unet(training.add_noise(latents, noise, timesteps), timesteps, text).sample
    loss = torch.nn.functional.mse_loss(prediction, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

# A reward on the end of a short trajectory: the derivative of every step is exact, its history included.
sampling = DDIMScheduler.from_config(training.config)
sampling.set_timesteps(2)
x = start = torch.randn(4, 4, size, size)
for t in sampling.timesteps:
    x = sampling.step(unet(x, t, text).sample, t, x).prev_sample
reward = -x.square().mean()
optimizer.zero_grad()
reward.backward()
norm = torch.stack([p.grad.norm() for p in unet.parameters() if p.grad is not None]).norm()
print(f"reward {reward.item():.4f}, norm of its gradient {norm.item():.3e}")
