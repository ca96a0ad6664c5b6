"""One scheduler after another in the same pipeline, each by its fused class; its configuration comes from the stock scheduler.

python examples/class_by_class.py [--model NAME]
"""

from __future__ import annotations

import argparse

import tiny
import torch
from diffusers import DiffusionPipeline

from genfast.compat.diffusers import (  # was: from diffusers import ...
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a name that DiffusionPipeline.from_pretrained takes")
parser.add_argument("--prompt", default="a lighthouse at dusk")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

if args.model:
    pipe, text = DiffusionPipeline.from_pretrained(args.model), {"prompt": args.prompt}
else:
    pipe, text = tiny.stable_diffusion(), tiny.text()

for scheduler, options in (
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (UniPCMultistepScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}),
):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    (image,) = pipe(**text, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    # None: every step was one launch. A sentence: diffusers' own step ran, and why.
    print(f"{scheduler.__name__}: top left pixel {[round(v, 3) for v in image[:, 0, 0].tolist()]}, fallback: {pipe.scheduler.fallback}")
