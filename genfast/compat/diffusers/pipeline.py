"""A whole pipeline accelerated, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention import accelerate_attention, restore_attention
from .scheduler import FusedScheduler

_ORIGINAL = "_genfast_original"  # where an accelerated pipeline keeps what `restore` puts back


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: ``swapped`` and ``left`` map a component's name to what became of it and why."""

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.swapped.items()] + [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no scheduler and no attention found"


def _components(pipe: Any) -> dict[str, Any]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe: got a {type(pipe).__name__}, supported: a diffusers.DiffusionPipeline")
    return components


def _replaced(component: Any) -> str | None:
    """An attribute of the object alone that is a method: a wrapper in the place of its class's, or one bound to this very object."""
    attributes: dict[str, Any] = component.__dict__
    for name, value in attributes.items():
        if callable(value) and (hasattr(type(component), name) or getattr(value, "__self__", None) is component):
            return name
    return None


def accelerate(pipe: Any, seeds: Sequence[int] | Tensor | None = None, attention: bool = True) -> Report:
    """Give every stock scheduler of a diffusers pipeline its fused class, in place, and its networks genfast's attention.

    With ``attention`` the attention modules of the networks (UNet, transformer, VAE) keep their processors, which then get
    `genfast.compat.sdpa.scaled_dot_product_attention` for torch's. The pipeline's guidance arithmetic and all else stay.

    ``seeds``, one integer per sample of the batch, makes the noise of the steps genfast's own (docs/noise.md); None leaves it to the
    pipeline's generator. `restore` undoes it. Calling it again changes the seeds alone. Returns what was swapped and what was left.
    Raises TypeError for an object without components.
    """
    components = _components(pipe)
    from genfast.compat.diffusers import CLASSES

    swapped, left = {}, {}
    originals = pipe.__dict__.setdefault(_ORIGINAL, {})
    for name, component in components.items():
        if isinstance(component, FusedScheduler):
            component.seeds = seeds
            swapped[name] = f"{type(component).__name__}, fused already"
        elif hasattr(component, "step") and hasattr(component, "set_timesteps"):
            fused = CLASSES.get(type(component).__name__)
            if fused is None or fused.stock is not type(component):
                left[name] = f"no fused class for {type(component).__module__}.{type(component).__name__}"
                continue
            if (replaced := _replaced(component)) is not None:
                left[name] = f"its {replaced} is a method of the object alone"
                continue
            scheduler = object.__new__(fused)
            scheduler.__dict__.update({key: list(value) if type(value) is list else value for key, value in component.__dict__.items()})
            scheduler.seeds = seeds
            originals[name] = component
            setattr(pipe, name, scheduler)
            swapped[name] = f"{type(component).__name__}, fused"
        elif attention and isinstance(component, nn.Module):
            done, not_done = accelerate_attention(component)
            swapped |= {name: done} if done else {}
            left |= {name: not_done} if not_done else {}
    return Report(swapped, left)


def restore(pipe: Any) -> None:
    """Undo `accelerate`: every fused scheduler of ``pipe`` makes room for the stock object that it replaced, and attention is torch's.

    One that came from elsewhere (another pipeline's components, the user's own) becomes a stock one of the same configuration; a scheduler
    that is not fused stays. Raises TypeError for an object without components.
    """
    components = _components(pipe)
    originals = pipe.__dict__.pop(_ORIGINAL, {})
    for name, component in components.items():
        if isinstance(component, FusedScheduler):
            original = originals.get(name)
            if original is None:
                original = component.stock.from_config(component.config)  # type: ignore[attr-defined]
            setattr(pipe, name, original)
        elif isinstance(component, nn.Module):
            restore_attention(component)
