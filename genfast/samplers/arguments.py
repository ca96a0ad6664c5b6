"""The arguments of a call, looked at before anything is drawn: every refusal is one sentence with what came and what is supported."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .denoiser import Denoiser

Seeds = Sequence[int] | Tensor | None
Generators = torch.Generator | Sequence[torch.Generator] | None
GuidanceScale = float | Sequence[float] | Tensor | Callable[[float], "float | Sequence[float] | Tensor"]
Scale = float | tuple[float, ...]  # of all samples, or of each one


def check_denoiser(den: object) -> None:
    """Raises TypeError for a network, or anything else, in the place of a `Denoiser`."""
    if not isinstance(den, Denoiser):
        wrap = "genfast.Denoiser(net, prediction=..., noise=...), which says what the network returns and which process it was trained on"
        raise TypeError(f"den: got a {type(den).__name__}, supported: {wrap}")


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise ValueError(f"shape: got {shape}, supported: (B, *sample), integers of at least 0")
    return sizes


def check_tensors(shape: tuple[int, ...], tensors: Mapping[str, Tensor | None]) -> None:
    """What starts a run or is known of it: tensors of the samples' shape."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: got a {type(tensor).__name__}, supported: None or a tensor of shape {shape}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, supported: {shape}")
        if tensor.is_complex():
            raise ValueError(f"{name}: got {tensor.dtype}, supported: real numbers")


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """A mask says how much of every element is drawn: from 0, all of it known, to 1."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise ValueError(
            f"mask: got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}, supported: a tensor of real numbers"
        )
    if not _broadcasts(mask, shape):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, supported: one that broadcasts to {shape}")
    values = mask.detach().double()  # also of dtypes that do not compare
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        raise ValueError(f"mask: got {values[~inside][0].item():g}, supported: numbers in [0, 1], 1 where a sample is drawn")


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(mask.shape, shape)) == shape
    except RuntimeError:
        return False


def device_of(den: Denoiser, device: torch.device | str | int | None, impl: str) -> torch.device:
    """Where a run takes place: ``device``, or where the network's parameters are. Raises ValueError where nothing can run there."""
    asked = den.device if device is None else device
    supported = "cpu" + "".join(f", cuda:{k}" for k in range(torch.cuda.device_count()))
    if asked is None:
        raise ValueError(f"device: got a network whose parameters are all on the meta device, supported: device= one of {supported}")
    try:
        chosen = torch.device(asked)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device: got {str(asked)!r} ({str(error).splitlines()[0]}), supported: {supported}") from None
    if chosen.type == "meta" or (impl == "fused" and chosen.type not in ("cpu", "cuda")):
        raise ValueError(f"device: got {str(chosen)!r}, supported: {supported}")
    return chosen


def generators_of(generator: Generators, batch: int) -> torch.Generator | tuple[torch.Generator, ...] | None:
    """One generator for the batch, or one for each sample."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    wrong = f"a {type(generator).__name__}"
    if isinstance(generator, Sequence):
        others = [g for g in generator if not isinstance(g, torch.Generator)]
        if not others and len(generator) == batch:
            return tuple(generator)
        wrong = f"{len(generator)} of them" if not others else f"a list with a {type(others[0]).__name__}"
    raise ValueError(f"generator: got {wrong}, supported: None, a torch.Generator, or {batch}, one for each sample")


def seed_values(seeds: Seeds, batch: int) -> Tensor:
    """The seeds as an int64 tensor on the CPU; drawn with torch where they are None."""
    if seeds is None:
        return torch.randint(0, 2**63 - 1, (batch,), dtype=torch.int64)
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim != 1:
            raise ValueError(f"seeds: got {seeds.dtype} of shape {tuple(seeds.shape)}, supported: torch.int64 ({batch},)")
        values = seeds.tolist()
    else:
        try:
            values = [operator.index(seed) for seed in seeds]
        except TypeError:
            raise ValueError(f"seeds: got {seeds!r}, supported: {batch} integers, one per sample, or None") from None
    if len(values) != batch:
        raise ValueError(f"seeds: got {len(values)}, supported: {batch}, one per sample")
    wrong = [seed for seed in values if not 0 <= seed < 2**63]
    if wrong:
        raise ValueError(f"seeds: got {wrong[0]}, supported: integers in [0, 2^63)")
    return torch.tensor(values, dtype=torch.int64)


def scale_of(value: object) -> Scale:
    """A guidance scale: one number, or a tuple with one for each sample. Raises ValueError for anything else."""
    values = value.tolist() if hasattr(value, "tolist") else value  # of torch and numpy alike
    several = isinstance(values, Sequence) and not isinstance(values, str)
    try:
        scales = tuple(float(v + 0) for v in (values if several else [values]))  # type: ignore[union-attr]  # float() alone takes strings
    except (TypeError, ValueError):
        scales = ()
    if not scales or not all(map(math.isfinite, scales)):
        supported = "a finite number, a list or tensor with one for each sample, or a function of sigma"
        raise ValueError(f"guidance_scale: got {value}, supported: {supported}")
    return scales if several else scales[0]


def check_scales(scales: Sequence[Scale], batch: int) -> None:
    for scale in scales:
        if isinstance(scale, tuple) and len(scale) != batch:
            raise ValueError(f"guidance_scale: got {len(scale)} of them, supported: one number, or {batch}, one for each sample")
