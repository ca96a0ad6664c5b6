"""What a trained model has learned, as pictures: interpolations, traversals, reconstructions, mixed styles, nearest training pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from genfast.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from genfast.data import Samples
    from genfast.models.family import Model

# Heavy imports (torch) happen inside the functions, so that the command line's help does not pay for them.

STEPS = 8  # pictures in a row
MOST_SEARCHED = 60_000  # training pictures that the nearest are looked for in


def interpolations(model: Model, seeds: list[int]) -> Tensor:
    """Samples (N * STEPS, C, H, W) along great circles from the latent of each seed to that of the next one.

    Latents in many dimensions lie near a sphere, which a straight line leaves (White 2016). For families whose samples come from one
    latent, ``model.net(z)`` with z (B, config.latent).
    """
    import torch

    from genfast import ops
    from genfast.streams import SAMPLING

    z = ops.normal(torch.tensor([*seeds, seeds[0]]), (len(seeds) + 1, model.net.config.latent), stream=SAMPLING).double()
    share = torch.linspace(0, 1, STEPS, dtype=torch.float64)[None, :, None]
    first, second = z[:-1, None], z[1:, None]
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=2).clamp(-1, 1)[:, :, None]
    angle = cosine.arccos().clamp(min=1e-6)
    between = (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()
    return _from_latents(model, between.flatten(0, 1).float())


def traversals(model: Model, seed: int, dimensions: int = 10, reach: float = 2.5) -> Tensor:
    """Samples (rows * STEPS, C, H, W): each row moves one of the first latent dimensions of a seed's sample from -reach to reach."""
    import torch

    from genfast import ops
    from genfast.streams import SAMPLING

    latent = model.net.config.latent
    z = ops.normal(torch.tensor([seed]), (1, latent), stream=SAMPLING).expand(min(dimensions, latent), STEPS, latent).clone()
    for dimension in range(len(z)):
        z[dimension, :, dimension] = torch.linspace(-reach, reach, STEPS)
    return _from_latents(model, z.flatten(0, 1))


def reconstructions(model: Model, samples: Samples, count: int = 32) -> Tensor:
    """Rows of STEPS pictures (C, H, W), each followed by a row of their reconstructions from the means of their latents."""
    import numpy as np
    import torch

    x = samples.batch(np.arange(min(count, len(samples))), 0).x.to(model.device).float() / 127.5 - 1
    with torch.no_grad():
        z, _ = model.net.bottleneck(x, torch.zeros(len(x), *model.net.noise_shape, device=model.device))
        again = model.net.images(model.net.decode(z))
    pairs = zip(x.split(STEPS), again.split(STEPS), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def nearest(model: Model, samples: Samples, seeds: list[int]) -> Tensor:
    """A row for each seed: its sample, then the training pictures nearest to it by the Euclidean distance of pixels, the nearest first.

    A model that copies its data shows the same picture twice.
    """
    import numpy as np
    import torch

    from genfast.generate import generate

    classes = len(model.classes)
    drawn = generate(model, Request(seeds, [seed % classes for seed in seeds] if classes else None)).cpu().clamp(-1, 1)
    distances, batch, count = [], 2000, min(len(samples), MOST_SEARCHED)
    for start in range(0, count, batch):
        x = _data(samples, np.arange(start, min(start + batch, count)), drawn.shape)
        distances.append(torch.cdist(drawn.flatten(1), x.flatten(1)))
    places = torch.cat(distances, 1).topk(STEPS - 1, largest=False).indices
    found = _data(samples, places.flatten().numpy(), drawn.shape).unflatten(0, places.shape)
    return torch.cat([drawn[:, None], found], 1).flatten(0, 1)


def mixed_styles(model: Model, seeds: list[int], coarse: int = 4) -> Tensor:
    """A table of samples: each row takes the first ``coarse`` styles of a seed, each column the others of another (Karras et al. 2019)."""
    import torch

    from genfast import ops
    from genfast.streams import SAMPLING

    half = len(seeds) // 2
    z = ops.normal(torch.tensor(seeds, device=model.device), (len(seeds), model.net.config.latent), stream=SAMPLING)
    with torch.no_grad():
        w = model.net.mapping(z)
        rows, columns = w[:half], w[half : 2 * half]
        layers = torch.arange(w.shape[1], device=w.device)[:, None] < coarse
        table = torch.where(layers, rows[:, None], columns[None])
        first = torch.cat([torch.zeros_like(w[:1]), columns])[None]
        whole = torch.cat([first, torch.cat([rows[:, None], table], 1)]).flatten(0, 1)
        images: Tensor = model.net.synthesis(whole)
    images[0] = 1  # the corner is empty
    return images


def explore(model: Positional[Path], out: Path | None = None, seeds: str = "0-7", device: str | None = None) -> None:
    """Show what a model has learned: interpolations, traversals, reconstructions, mixed styles, nearest training pictures.

    Args:
        model: a run's directory, or a file that training saved.
        out: a folder for the pictures; "explore" beside the weights when not given.
        seeds: seeds of the samples, such as 0-7.
        device: where to run; cuda if torch sees one, else cpu, when not given.
    """
    from genfast import media
    from genfast.data import open_samples
    from genfast.files import write_atomically
    from genfast.generate import open_model, seed_numbers

    numbers = seed_numbers(seeds, 64)
    found = open_model(model, device)
    folder = out or (model if model.is_dir() else model.parent) / "explore"
    made: dict[str, tuple[Tensor, int]] = {}
    if hasattr(found.net.config, "latent"):
        made["interpolations"] = interpolations(found, numbers), STEPS
    if hasattr(found.net, "bottleneck"):
        made["traversals"] = traversals(found, numbers[0]), STEPS
    if hasattr(found.net, "mapping") and len(numbers) > 1:
        made["mixed-styles"] = mixed_styles(found, numbers), len(numbers) // 2 + 1
    if "data" in found.about:
        options: dict[str, Any] = found.about.get("data_options", {})
        made["nearest"] = nearest(found, open_samples(found.about["data"], **options), numbers), STEPS
        if hasattr(found.net, "bottleneck"):
            made["reconstructions"] = reconstructions(found, open_samples(found.about["data"], "test", **options)), STEPS
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, columns) in made.items():
        provenance = {"weights": str(found.path), "seeds": seeds, "picture": name}
        write_atomically(folder / f"{name}.png", media.encoded(media.grid(x, columns), "PNG", provenance))
        print(folder / f"{name}.png")


def _from_latents(model: Model, z: Tensor, batch: int = 256) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([model.net(part.to(model.device)) for part in z.split(batch)])


def _data(samples: Samples, numbers: Any, shape: Any) -> Tensor:
    """Training pictures in [-1, 1], with a border of zeros where the model draws larger ones (`genfast.data.PaddedSamples`)."""
    import torch

    x = samples.batch(numbers, 0).x
    border = (shape[-1] - x.shape[-1]) // 2
    return torch.nn.functional.pad(x, (border,) * 4).float() / 127.5 - 1
