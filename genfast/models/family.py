"""What every family of models tells the rest of the house about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genfast.impl import NAMESPACES
from genfast.streams import SAMPLING

if TYPE_CHECKING:
    from genfast.request import Request


@dataclass(frozen=True)
class Model:
    """A trained network, ready to be asked for samples."""

    net: Any  # the network, in eval mode; or any module whose family is told beside it
    about: dict[str, Any]  # what training said of it: "classes", "size", the noise process, ...
    family: Family
    path: Path | None = None  # the file that it came from

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; empty for a model without classes."""
        count = getattr(getattr(self.net, "config", None), "num_classes", 0)
        return tuple(self.about.get("classes", map(str, range(count)))) if count else ()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.net.parameters()).device
        return device


@dataclass(frozen=True)
class Family:
    """``config`` is a frozen dataclass, ``build(config, impl)`` makes the network that samples come from, ``generate(model, request)``
    draws samples (B, C, H, W) with values about in [-1, 1], ``kind`` is what they are. Adversarial families have a ``critic(config,
    impl)`` too, which maps samples to logits (B,).
    """

    config: type[Any]
    build: Callable[[Any, str], nn.Module]
    generate: Callable[[Model, Request], Tensor]
    kind: str = "image"
    critic: Callable[[Any, str], nn.Module] | None = None

    def networks(self, config: Any, impl: str = "fused") -> tuple[nn.Module, ...]:
        """What a trainer trains: the network, and of an adversarial family generator and discriminator."""
        makers = (self.build,) if self.critic is None else (self.build, self.critic)
        return tuple(make(config, impl) for make in makers)


def from_latents(model: Model, request: Request, **options: Any) -> Tensor:
    """What a generator makes of latents (B, config.latent), each standard normal by its seed (stream 0, draw 0)."""
    seeds = torch.tensor(request.seeds, device=model.device)
    z = NAMESPACES[request.options.impl].normal(seeds, (len(seeds), model.net.config.latent), stream=SAMPLING)
    samples: Tensor = model.net(z, **options)
    return samples
