"""Grids of images for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def grid(x: Tensor, columns: int, names: Sequence[str] = (), zoom: int = 2, gap: int = 2) -> Any:
    """A Pillow image of ``x`` (B, 1 or 3, H, W) with values in [-1, 1], ``columns`` a row; ``names`` label the rows in a left margin."""
    from PIL import Image, ImageDraw

    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    count, height, width, channels = pixels.shape
    margin = 80 if names else gap
    rows = -(-count // columns)
    sheet = np.full((gap + rows * (height + gap), margin + columns * (width + gap), channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), margin + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((4, gap + row * (height + gap) + height // 2), name, fill=0 if channels == 1 else (0, 0, 0), anchor="lm")
    return picture
