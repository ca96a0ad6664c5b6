"""Networks as trainers see them: any torch module, called in one way and described in the run's configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genfast.checks import plain, shown

# Calls a network: (net, x, t, y) -> what it predicts, like x; y is None where the samples have no labels.
Call = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def call_network(net: Any, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """net(x, t, y), or net(x, t) without labels; of diffusers' networks the field ``sample`` of what they return."""
    output = net(x, t) if y is None else net(x, t, y)
    prediction: Tensor = getattr(output, "sample", output)
    return prediction


class Called(nn.Module):
    """A network behind a call: ``Called(net, call)(x, t, y)`` is call(net, x, t, y)."""

    def __init__(self, net: nn.Module, call: Call | None) -> None:
        super().__init__()
        self.net, self.call = net, call or call_network

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.call(self.net, x, t, y)


def check_module(name: str, net: Any) -> torch.device:
    """Where a network is. Raises ValueError unless it is a torch module with parameters."""
    if not isinstance(net, nn.Module) or (parameter := next(net.parameters(), None)) is None:
        raise ValueError(f"{name}: got a {type(net).__name__}, supported: a torch module with parameters")
    return parameter.device


@torch.no_grad()
def probe(name: str, net: nn.Module, call: Callable[[], Any], shape: tuple[int, ...], supported: str) -> None:
    """Call a network once, in eval mode. Raises ValueError with what is ``supported`` if it fails or returns another shape."""
    training = net.training
    net.eval()
    try:
        got = call()
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(f"{name}: it does not take what it is given ({shown(error)}), supported: {supported}") from error
    finally:
        net.train(training)
    if not isinstance(got, Tensor) or got.shape != shape:
        returned = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else f"a {type(got).__name__}"
        raise ValueError(f"{name}: it returns {returned}, supported: {supported}")


def description(net: nn.Module) -> dict[str, Any]:
    """What a run remembers of a network: its configuration where it has one, else its class and the shapes of its state."""
    config = getattr(net, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    shapes = str([(name, tuple(t.shape)) for name, t in net.state_dict().items()])
    own = {str(key): plain(value) if _json(value) else str(value) for key, value in config.items()} if isinstance(config, Mapping) else {}
    return {"class": f"{type(net).__module__}.{type(net).__qualname__}", "state": hashlib.sha256(shapes.encode()).hexdigest(), **own}


def gradients_and_buffers(net: nn.Module) -> list[Tensor]:
    """What the ranks of a run average after each backward pass: running statistics go with the gradients."""
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None] + buffers


def _json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or (isinstance(value, list | tuple) and all(map(_json, value)))
