"""StyleGAN2 (Karras et al. 2020): a generator of modulated convolutions with skip connections, and a residual discriminator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genfast.checks import between, settle, whole
from genfast.impl import NAMESPACES, check_impl
from genfast.models import pyramid
from genfast.models.family import Family, from_latents
from genfast.models.pyramid import Pyramid
from genfast.nn.style import EqualizedConv2d, EqualizedLinear, ModulatedConv2d, ResidualDown
from genfast.streams import MODEL_NOISE

USES = 4  # draws d, d + 4, d + 8, ... of one use: latents, the latents mixed in, where they begin, then the layers' noise

RANGES = pyramid.RANGES | {"mapping_layers": whole(1), "mixing": between(0, 1), "stddev_group": whole(1)}


@dataclass(frozen=True)
class StyleGAN2Config(Pyramid):
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights.

    ``channel_base`` 32768 is configuration F of the paper, 16384 the half that is usual at 256; w is as long as z. The mapping, the sum of
    the pictures and the discriminator's last block are wide whatever the ``body``. In float16 activations are clamped to +-256
    (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix D).
    """

    mapping_layers: int = 8  # fully connected layers from z to w
    mixing: float = 0.9  # share of the samples that mix two latents in training
    stddev_group: int = 4  # samples whose spread the discriminator sees

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, RANGES)

    @property
    def styles(self) -> int:
        """How many layers take a w: a convolution at 4, two at each further side, and one to the last picture."""
        return 2 * len(self.sides)

    @property
    def clamp(self) -> float | None:
        return 256.0 if self.body == "float16" else None


class Mapping(nn.Module):
    """Latents z (B, latent) -> w of every layer (B, styles, latent)."""

    average: Tensor

    def __init__(self, config: StyleGAN2Config, impl: str) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        width = config.latent
        # The mapping learns 100 times slower than the synthesis (Karras et al. 2019, appendix C).
        self.layers = nn.Sequential(*(EqualizedLinear(width, width, act="lrelu", lr=0.01, impl=impl) for _ in range(config.mapping_layers)))
        self.register_buffer("average", torch.zeros(width))

    def forward(self, z: Tensor, seeds: Tensor | None = None, draw: int = 0, truncation: float = 1.0) -> Tensor:
        """``seeds`` (B,) int64: mix styles as in training, by the draws of `USES`. ``truncation`` draws w towards its average."""
        config, namespace = self.config, NAMESPACES[self.impl]
        batch = len(z)
        mixed = seeds is not None and config.mixing > 0
        if mixed:
            z = torch.cat([z, namespace.normal(seeds, z.shape, draw=draw + USES, stream=MODEL_NOISE, dtype=z.dtype)])
        w: Tensor = self.layers(namespace.pixel_norm(z))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(w.detach()[:batch].mean(0).to(self.average.dtype), 0.005)
        if truncation != 1:
            w = torch.lerp(self.average, w.to(self.average.dtype), truncation)
        w, others = w[:batch, None], w[batch:, None]
        if not mixed:
            return w.expand(-1, config.styles, -1)
        # The layers from `start` on take the other latents; no layer does where nothing is mixed.
        u = namespace.uniform(seeds, (batch, 2), draw=draw + 2 * USES, stream=MODEL_NOISE)
        start = 1 + (u[:, 1:] * (config.styles - 1)).floor()
        layers = torch.arange(config.styles, device=z.device)
        return torch.where(((u[:, :1] < config.mixing) & (layers >= start))[:, :, None], others, w)


class Synthesis(nn.Module):
    """w of every layer (B, styles, latent) -> images (B, image_channels, size, size)."""

    def __init__(self, config: StyleGAN2Config, impl: str) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        self.constant = nn.Parameter(torch.randn(1, config.channels(4), 4, 4))
        self.convolutions, self.to_images = nn.ModuleList(), nn.ModuleList()
        for side in config.sides:
            c, clamp, style = config.channels(side), config.clamp, config.latent
            if side > 4:
                self.convolutions.append(ModulatedConv2d(config.channels(side // 2), c, style, 3, up=2, clamp=clamp, impl=impl))
            self.convolutions.append(ModulatedConv2d(c, c, style, 3, clamp=clamp, impl=impl))
            self.to_images.append(ModulatedConv2d(c, config.image_channels, style, 1, noise=False, clamp=clamp, impl=impl))
        for i in range(len(self.convolutions)):  # the noise of each layer where none is drawn
            side = 4 << (i + 1) // 2
            self.register_buffer(f"noise{i}", torch.randn(1, 1, side, side))
        self.register_buffer("taps", NAMESPACES["fused"].setup_filter([1, 3, 3, 1]), persistent=False)

    def forward(self, w: Tensor, seeds: Tensor | None = None, draw: int = 0) -> Tensor:
        """``seeds`` (B,) int64: the noise of each layer is drawn from them (`USES`); None: it is the constant one."""
        config, namespace = self.config, NAMESPACES[self.impl]
        wide, batch, number = self.constant.dtype, len(w), 0
        x = self.constant.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image: Tensor | None = None
        for side, to_image in zip(config.sides, self.to_images, strict=True):
            x = x.to(config.dtype(side, wide))
            for _ in range(1 if side == 4 else 2):
                noise = getattr(self, f"noise{number}")
                if seeds is not None:
                    shape, own = (batch, 1, side, side), draw + (3 + number) * USES
                    noise = namespace.normal(seeds, shape, draw=own, stream=MODEL_NOISE, dtype=wide)
                x = self.convolutions[number](x, w[:, number], noise)
                number += 1
            picture = to_image(x, w[:, number]).to(wide)
            image = picture if image is None else namespace.upsample2d(image, self.taps) + picture
        assert image is not None
        return image


class Generator(nn.Module):
    """Latents (B, latent) -> images (B, image_channels, size, size), about in [-1, 1] once trained.

    ``seeds`` (B,) int64, one a sample, draw what training leaves to chance: the noise of the layers and the mixing of styles, by
    docs/noise.md, so that nothing waits for the device and a sample does not depend on its batch. ``draw`` (0 to 3) tells
    several uses of the same seeds apart. Without seeds nothing is mixed and the noise is constant.
    """

    seeded = True  # `genfast.train.AdversarialStep` hands it seeds

    def __init__(self, config: StyleGAN2Config = StyleGAN2Config(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        check_impl(impl)
        self.mapping, self.synthesis = Mapping(config, impl), Synthesis(config, impl)

    def forward(self, z: Tensor, seeds: Tensor | None = None, draw: int = 0, truncation: float = 1.0) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {self.config.latent})")
        images: Tensor = self.synthesis(self.mapping(z, seeds, draw, truncation), seeds, draw)
        return images


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,). The batch is 1 to ``stddev_group`` samples, or a multiple of that."""

    def __init__(self, config: StyleGAN2Config = StyleGAN2Config(), impl: str = "fused") -> None:
        super().__init__()
        self.config, self.impl = config, check_impl(impl)
        c = config.channels
        self.from_image = EqualizedConv2d(config.image_channels, c(config.size), 1, act="lrelu", clamp=config.clamp, impl=impl)
        downwards = config.sides[:0:-1]
        self.blocks = nn.ModuleList(ResidualDown(c(side), c(side // 2), clamp=config.clamp, impl=impl) for side in downwards)
        self.last = EqualizedConv2d(c(4) + 1, c(4), 3, act="lrelu", impl=impl)
        self.hidden = EqualizedLinear(c(4) * 16, c(4), act="lrelu", impl=impl)
        self.logit = EqualizedLinear(c(4), 1, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        config, wide = self.config, self.logit.weight.dtype
        x = self.from_image(x.to(config.dtype(config.size, wide), memory_format=torch.channels_last))
        for side, block in zip(config.sides[:0:-1], self.blocks, strict=True):
            x = block(x.to(config.dtype(side, wide)))
        x = NAMESPACES[self.impl].minibatch_stddev(x.to(wide), config.stddev_group)
        logits: Tensor = self.logit(self.hidden(self.last(x).flatten(1)))
        return logits[:, 0].to(wide)


FAMILY = Family(
    StyleGAN2Config,
    Generator,
    lambda model, request: from_latents(model, request, truncation=request.options.truncation),
    critic=Discriminator,
)
