"""Pictures: single files, grids with names in the margin, folders and animations."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from genfast.files import write_atomically

Pixels = NDArray[np.uint8]


def pixels(x: Tensor) -> Pixels:
    """``x`` (B, C, H, W) with values in [-1, 1], 1 or 3 channels, as (B, H, W, C) uint8."""
    scaled = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    array: Pixels = scaled.permute(0, 2, 3, 1).numpy()
    return array


def grid(x: Tensor, columns: int, names: Sequence[str] = (), zoom: int = 2, gap: int = 2) -> Image.Image:
    """``x`` (B, 1 or 3, H, W) with values in [-1, 1] as a picture, ``columns`` images a row; ``names`` label the rows in a left margin."""
    images = pixels(x).repeat(zoom, 1).repeat(zoom, 2)
    count, height, width, channels = images.shape
    margin = 80 if names else gap
    rows = -(-count // columns)
    sheet = np.full((gap + rows * (height + gap), margin + columns * (width + gap), channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), margin + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    picture = _picture(sheet)
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        pen.text((4, gap + row * (height + gap) + height // 2), name, fill=0 if channels == 1 else (0, 0, 0), anchor="lm")
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", provenance: Mapping[str, Any] | None = None, **options: Any) -> bytes:
    """The content of a file of this format. ``provenance`` is JSON in a PNG's text "genfast", and in the comment of a GIF or JPEG."""
    content = io.BytesIO()
    if provenance:
        text = json.dumps(dict(provenance))
        if kind == "PNG":
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("genfast", text)
        elif kind in ("GIF", "JPEG"):
            options["comment"] = text.encode()
    picture.save(content, format=kind, **options)
    return content.getvalue()


def format_of(path: Path, name: str = "--out") -> str | None:
    """The format that Pillow writes under this name, None for a name without an extension, which is a folder's.

    Raises ValueError for another extension, a folder with an extension, and a file where a folder should be.
    """
    if not path.suffix:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name}: got {str(path)!r}, which is a file, supported: a folder, or a picture, such as samples.png")
        return None
    known = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in known or path.is_dir():
        got = f"{str(path)!r}, which is a folder" if path.is_dir() else repr(str(path))
        raise ValueError(f"{name}: got {got}, supported: the name of a picture, such as samples.png, or of a folder, without an extension")
    return known[path.suffix.lower()]


def write(path: Path, x: Tensor, columns: int, rows: Sequence[str], names: Sequence[str], provenance: Mapping[str, Any]) -> None:
    """Write samples ``x`` (B, C, H, W): with an extension one file, a grid with ``rows`` as the names in its margin or, as GIF, one
    sample after another; without an extension a folder with a PNG for each sample, called by ``names``.
    """
    kind = format_of(path)
    folder = path if kind is None else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if kind is None:
        for name, image in zip(names, pixels(x), strict=True):
            write_atomically(folder / f"{name}.png", encoded(_picture(image), "PNG", {**provenance, "sample": name}))
    elif kind == "GIF":
        first, *others = map(_picture, pixels(x).repeat(2, 1).repeat(2, 2))
        write_atomically(path, encoded(first, kind, provenance, save_all=True, append_images=others, duration=250, loop=0))
    else:
        write_atomically(path, encoded(grid(x, columns, rows), kind, provenance))


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
