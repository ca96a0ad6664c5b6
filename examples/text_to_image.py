"""Text to image with a whole pipeline accelerated: the stock pictures, the fused ones, and how far apart they are.

python examples/text_to_image.py                       # a tiny pipeline of random weights
python examples/text_to_image.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a lighthouse at dusk" --out out.png
"""

from __future__ import annotations

import argparse
import time

import tiny
import torch
from diffusers import DiffusionPipeline

import genfast.compat.diffusers as gfd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a name that DiffusionPipeline.from_pretrained takes")
parser.add_argument("--prompt", default="a lighthouse at dusk")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", help="where the fused picture goes")
args = parser.parse_args()

if args.model:
    pipe, text = DiffusionPipeline.from_pretrained(args.model), {"prompt": args.prompt}
else:
    pipe, text = tiny.stable_diffusion(), tiny.text()
pipe.to(args.device)


def picture() -> torch.Tensor:
    start = time.perf_counter()
    generator = torch.Generator(args.device).manual_seed(args.seed)
    (image,) = pipe(**text, num_inference_steps=args.steps, generator=generator, output_type="pt").images
    print(f"{type(pipe.scheduler).__name__}: {time.perf_counter() - start:.3f} s")
    return image


stock = picture()
print(gfd.accelerate(pipe))  # the one line
fused = picture()
print(f"largest difference of a pixel: {float((fused - stock).abs().max()):.1e}")
gfd.restore(pipe)

if args.out:
    pipe.image_processor.numpy_to_pil(fused[None].permute(0, 2, 3, 1).float().cpu().numpy())[0].save(args.out)
