"""What a network is told besides the state and the time: tensors, and mappings of tensors in any nesting of dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .denoiser import Condition


def check_condition(name: str, cond: Condition) -> None:
    """Raises ValueError for anything but a tensor, a mapping with names for keys, or None."""
    if isinstance(cond, Mapping):
        wrong = [key for key in cond if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{name}: got the key {wrong[0]!r}, supported: names, because they become keyword arguments of the network")
    elif cond is not None and not isinstance(cond, Tensor):
        raise ValueError(f"{name}: got {kind_of(cond)}, supported: a tensor, a mapping of keyword arguments, or None")


def stack(uncond: Condition, cond: Condition, batch: int) -> Condition:
    """Both halves' condition as one, the unconditional first. Tensors are stacked along the batch, leaf by leaf; the rest must be the same.

    Raises ValueError naming the leaf, such as cond['added']['time_ids'], where the halves do not fit together.
    """
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return _stack_tensors("cond", uncond, cond, batch)
    if not (isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys()):
        got = f"{kind_of(uncond)} with cond {kind_of(cond)}"
        raise ValueError(f"uncond: got {got}, supported: two tensors, or two mappings with the same keys")
    return {key: _stack_trees(f"cond[{key!r}]", uncond[key], value, batch) for key, value in cond.items()}


def _stack_trees(name: str, uncond: Any, cond: Any, batch: int) -> Any:
    leaves, spec = _pytree.tree_flatten_with_path(cond)
    try:
        others = spec.flatten_up_to(uncond)
    except ValueError:
        raise ValueError(f"un{name}: got {_outline(uncond)} with cond {_outline(cond)}, supported: the same nesting in both") from None
    stacked = []
    for (path, leaf), other in zip(leaves, others, strict=True):
        where = name + _pytree.keystr(path)
        if isinstance(leaf, Tensor) and isinstance(other, Tensor):
            stacked.append(_stack_tensors(where, other, leaf, batch))
        elif _same(leaf, other):
            stacked.append(leaf)
        else:
            raise ValueError(f"un{where}: got {_shown(other)} with cond {_shown(leaf)}, supported: two tensors, or equal values")
    return _pytree.tree_unflatten(stacked, spec)


def _stack_tensors(name: str, uncond: Tensor, cond: Tensor, batch: int) -> Tensor:
    if cond.shape[:1] != (batch,):
        raise ValueError(f"{name}: got shape {tuple(cond.shape)}, supported: ({batch}, ...), one entry per sample")
    if uncond.shape != cond.shape:
        if uncond.shape[1:] != cond.shape[1:] or uncond.shape[:1] != (1,):
            raise ValueError(f"un{name}: got shape {tuple(uncond.shape)}, supported: {tuple(cond.shape)}, or 1 for its batch")
        uncond = uncond.expand_as(cond)
    if uncond.device != cond.device:
        raise ValueError(f"un{name}: got a tensor on {uncond.device}, supported: {cond.device}, that of {name}")
    return torch.cat([uncond, cond])


def tensors_of(cond: Condition) -> list[Tensor]:
    """The tensors of a condition, in order."""
    return [leaf for leaf in _flatten(cond)[0] if isinstance(leaf, Tensor)]


def clone(cond: Condition) -> Condition:
    """The same condition with tensors of its own."""
    leaves, spec = _flatten(cond)
    copied: Condition = _pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    return copied


def signature(cond: Condition) -> list[object]:
    """What a recorded step keeps of a condition: its nesting and the leaves that are not tensors. Equal where a recording serves both."""
    leaves, spec = _flatten(cond)
    plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    return [spec, *(leaf if isinstance(leaf, (str, int, float, type(None))) else id(leaf) for leaf in plain)]


def kind_of(cond: object) -> str:
    return f"a mapping of {sorted(map(str, cond))}" if isinstance(cond, Mapping) else f"a {type(cond).__name__}"


def _flatten(cond: Condition) -> tuple[list[Any], Any]:
    # The network gets a mapping's items as keyword arguments, so any mapping may stand for the dict
    return _pytree.tree_flatten(dict(cond) if isinstance(cond, Mapping) else cond)


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, RuntimeError, TypeError):  # arrays and the like, which compare element by element
        return False


def _shown(leaf: object) -> str:
    return repr(leaf) if isinstance(leaf, (str, int, float, type(None))) else f"a {type(leaf).__name__}"


def _outline(tree: object) -> str:
    """A tree's own level in words."""
    if isinstance(tree, Mapping):
        return f"a {type(tree).__name__} of {sorted(map(str, tree))}"
    return f"a {type(tree).__name__}" + (f" of {len(tree)}" if isinstance(tree, (list, tuple)) else "")
