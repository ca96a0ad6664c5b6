"""One row of a solver's plan by one kernel launch (docs/solver-step.md), and how a row is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genfast.reference.solver_step import layout_of

from . import _autograd, _backend
from ._checks import bump_version, check_floating, check_mutable, check_seeds, check_tensor, readable, refusal

# csrc/ops/solver_step/params.h has the same numbers; a test compares.
MAX_SLOTS, MAX_HISTORY, MAX_OUTPUTS, TERMS, ROW_FLOATS, ROW_INTS = 16, 6, 3, 10, 40, 12
AX, AM, GUIDANCE, CLIP, NEXT_C_IN, RESCALE, QUANTILE, MAX_THRESHOLD, COEF = range(9)
DRAW, NUM_OUT, NUM_HIST, HIST_SLOT, OUT_SLOT = 0, 1, 2, 3, 9
NAMED_TERMS = {"x": 0, "d": 1, "m": 2, "noise": 9}
FIRST_HISTORY_TERM = 3


def pack_row(
    *,
    convert: tuple[float, float],
    outputs: Mapping[int, Mapping[str | int, float]],
    guidance: float = 1.0,
    clip: float = 0.0,
    next_c_in: float = 0.0,
    rescale: float = 0.0,
    quantile: float = 0.0,
    max_threshold: float = 1.0,
    draw: int = 0,
) -> tuple[list[float], list[int]]:
    """One row of a plan as the 40 coefficients and 12 integers of csrc/ops/solver_step/params.h.

    ``convert`` is (ax, am) of d = ax * x + am * m. ``outputs`` maps each slot that is written, in order (the first is output 0), to
    its terms: "x", "d", "m", "noise" or the number of a history slot, each with its coefficient; zero means absent. The rest is as
    docs/solver-step.md names it. Raises ValueError for more than 3 outputs, more than 6 distinct history slots or a slot not in 0 .. 15.
    """
    if not 1 <= len(outputs) <= MAX_OUTPUTS:
        raise refusal("outputs", f"{len(outputs)} outputs", f"1 to {MAX_OUTPUTS}")
    if not 0 <= draw < 2**32:
        raise refusal("draw", draw, "an integer in [0, 2^32)")
    if not 0 <= quantile <= 1:
        raise refusal("quantile", quantile, "a number in [0, 1], 0 for none")
    if clip < 0:
        raise refusal("clip", clip, "a number of at least 0, 0 for none")
    scalars = {
        AX: convert[0],
        AM: convert[1],
        GUIDANCE: guidance,
        CLIP: clip,
        NEXT_C_IN: next_c_in,
        RESCALE: rescale,
        QUANTILE: quantile,
        MAX_THRESHOLD: max_threshold,
    }
    floats = [float(scalars[i]) for i in range(COEF)] + [0.0] * (ROW_FLOATS - COEF)
    history: list[int] = []
    for k, (slot, terms) in enumerate(outputs.items()):
        if not 0 <= slot < MAX_SLOTS:
            raise refusal("outputs", f"slot {slot}", f"slots 0 to {MAX_SLOTS - 1}")
        for term, coefficient in terms.items():
            if isinstance(term, str):
                if term not in NAMED_TERMS:
                    raise refusal("outputs", f"term {term!r}", "'x', 'd', 'm', 'noise' or the number of a history slot")
                column = NAMED_TERMS[term]
            else:
                if not 1 <= term < MAX_SLOTS:
                    raise refusal("outputs", f"history slot {term}", f"slots 1 to {MAX_SLOTS - 1} (slot 0 is 'x')")
                if coefficient == 0:
                    continue
                if term not in history:
                    history.append(term)
                column = FIRST_HISTORY_TERM + history.index(term)
            if len(history) > MAX_HISTORY:
                raise refusal("outputs", f"history slots {history}", f"at most {MAX_HISTORY} distinct ones in a row")
            floats[COEF + k * TERMS + column] = float(coefficient)
    integers = [draw, len(outputs), len(history)]
    integers += history + [0] * (MAX_HISTORY - len(history))
    integers += [*outputs] + [0] * (MAX_OUTPUTS - len(outputs))
    return floats, integers


def solver_step_(
    ring: Tensor | Sequence[Tensor],
    cond: Tensor,
    coef: Tensor,
    index: Tensor,
    counter: Tensor,
    *,
    uncond: Tensor | None = None,
    seeds: Tensor | None = None,
    model_input: Tensor | None = None,
    watch: Tensor | None = None,
    rescale: bool = False,
    threshold: bool = False,
) -> None:
    """Execute row ``counter[0]`` of the table on the slots, in place (docs/solver-step.md): the same bits as `genfast.reference`.

    ``ring`` (K, B, \\*sample) with K at most 16, or as many tensors (B, \\*sample) of one layout: contiguous, channels_last or
    channels_last_3d; slot 0 is the state; float32, float64, bfloat16 or float16. ``cond``, ``uncond`` (B, \\*sample) of one dtype,
    copied to the state's layout where theirs differs; a ``cond`` of (2B, \\*sample) without ``uncond`` holds both, the unconditional
    half first. ``coef`` (rows, 40) float32, float64 with a float64 state; ``index`` (rows, 12) int64; ``counter`` (1,) int64;
    ``seeds`` (B,) int64, needed by rows that draw noise. ``model_input`` (B or 2B, \\*sample) receives ``c_in * state`` where the row
    asks for it, ``watch`` (B,) int64 the smallest row whose first output was not finite. ``rescale`` and ``threshold`` say whether
    rows may use those two; where False, phi and quantile of every row count as 0.

    Raises, before anything is written, ValueError for other shapes, dtypes, layouts and devices and for anything that requires a
    gradient (use `solver_step` there), and RuntimeError for a counter or row out of range. What counter, rows and seeds hold is
    checked in host memory only. `torch.ops.genfast.solver_step_` is the same without the checks of this function, for a loop whose
    arguments have passed once.
    """
    stacked = isinstance(ring, Tensor)
    slots = ring.shape[0] if isinstance(ring, Tensor) else len(ring)
    if not 1 <= slots <= MAX_SLOTS:
        raise refusal("ring", f"{slots} slots", f"1 to {MAX_SLOTS}")
    x = ring[0]
    _check_state("ring", x)
    layout = layout_of(x)
    if not x.is_contiguous(memory_format=layout):
        raise refusal("ring", f"slots with strides {x.stride()}", "contiguous, channels_last or channels_last_3d slots")
    if isinstance(ring, Tensor):
        check_mutable("ring", ring)
        if slots > 1 and ring.stride(0) < x.numel():
            raise refusal("ring", f"a stride of {ring.stride(0)} between slots", f"slots that do not overlap: at least {x.numel()}")
    else:
        for k, slot in enumerate(ring):
            check_tensor(f"ring[{k}]", slot, x.shape, x.dtype, x.device)
            check_mutable(f"ring[{k}]", slot)
            if slot.stride() != x.stride():
                raise refusal(f"ring[{k}]", f"strides {slot.stride()}", f"those of ring[0], {x.stride()}")
    cond, uncond = _model_output(x, cond, uncond)
    cond = cond.contiguous(memory_format=layout)
    if uncond is not None:
        uncond = uncond.contiguous(memory_format=layout)
    _check_table(x, coef, index, seeds)
    check_tensor("counter", counter, (1,), torch.int64, x.device)
    if model_input is not None:
        _check_model_input(x, model_input, layout)
    if watch is not None:
        check_tensor("watch", watch, (len(x),), torch.int64, x.device)
    _autograd.refuse_derivatives("solver_step_", (x, cond, uncond, coef), "genfast.ops.solver_step")
    step = _backend.namespace.solver_step_ if stacked else _backend.namespace.solver_step_slots_
    arguments = (ring, cond, uncond, coef, index, counter, seeds, model_input, watch, rescale, threshold)
    if torch.compiler.is_compiling():
        step(*arguments)
        return
    with torch._C._AutoDispatchBelowAutograd():  # what it would look for has been refused
        step(*arguments)
    for written in (ring, model_input, watch) if isinstance(ring, Tensor) else (*ring, model_input, watch):
        if written is not None:
            bump_version(written)


def solver_step(
    inputs: Sequence[Tensor],
    cond: Tensor,
    coef: Tensor,
    index: Tensor,
    *,
    uncond: Tensor | None = None,
    seeds: Tensor | None = None,
    outputs: int = 1,
    rescale: bool = False,
    threshold: bool = False,
) -> list[Tensor]:
    """The same step as a function: one row, new tensors out, differentiable in ``inputs``, ``cond`` and ``uncond``.

    ``inputs`` are the state and then the row's history terms, each (B, \\*sample), in the row's order: the slot numbers in ``index``
    are not used. ``coef`` (40,) or (1, 40), ``index`` (12,) or (1, 12). Returns the row's first ``outputs`` outputs, each (B, \\*sample)
    in the state's dtype and layout. Derivatives are exact or refused: docs/derivatives.md. Raises ValueError as `solver_step_` does.
    """
    if not 1 <= len(inputs) <= 1 + MAX_HISTORY:
        raise refusal("inputs", f"{len(inputs)} tensors", f"1 to {1 + MAX_HISTORY}: the state and its history terms")
    if not 1 <= outputs <= MAX_OUTPUTS:
        raise refusal("outputs", outputs, f"1 to {MAX_OUTPUTS}")
    x, *history = inputs
    _check_state("inputs", x)
    for j, h in enumerate(history):
        check_tensor(f"inputs[{j + 1}]", h, x.shape, x.dtype, x.device)
    cond, uncond = _model_output(x, cond, uncond)
    if coef.numel() != ROW_FLOATS or index.numel() != ROW_INTS:
        raise refusal("coef and index", f"shapes {tuple(coef.shape)} and {tuple(index.shape)}", "one row, (40,) and (12,)")
    _check_table(x, coef.view(1, ROW_FLOATS), index.view(1, ROW_INTS), seeds)
    if readable(index):
        n_history = int(index.view(-1)[NUM_HIST])
        if n_history != len(history):
            raise refusal("inputs", f"{len(history)} history terms", f"{n_history}, as many as the row has")
    result: list[Tensor]
    if _autograd.wanted((*inputs, cond, uncond, coef)):
        result = _autograd.solver_step(inputs, cond, uncond, coef, index, seeds, outputs, rescale, threshold)
    else:
        counter = torch.zeros(1, dtype=torch.int64, device=x.device)
        row = coef.view(1, ROW_FLOATS), index.view(1, ROW_INTS)
        result = torch.ops.genfast.solver_step(inputs, cond, uncond, *row, counter, seeds, outputs, rescale, threshold)
    return result


def _check_state(name: str, x: Tensor) -> None:
    if x.ndim < 1:
        raise refusal(name, "a state without dimensions", "(B, *sample)")
    check_floating(name, x)


def _model_output(x: Tensor, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The two halves of the model output, checked against the state ``x``."""
    batch = x.shape[0]
    if uncond is None and cond.shape != x.shape and batch and cond.shape == (2 * batch, *x.shape[1:]):
        uncond, cond = cond.chunk(2)
    elif cond.shape != x.shape:
        both = (2 * batch, *x.shape[1:])
        raise refusal("cond", f"shape {tuple(cond.shape)}", f"{tuple(x.shape)}; or {both}, both halves, without uncond")
    check_floating("cond", cond)
    if cond.dtype == torch.float64 and x.dtype != torch.float64:
        raise refusal("cond", f"torch.float64 for a state of {x.dtype}", "float32, bfloat16 or float16 for that state")
    if cond.device != x.device:
        raise refusal("cond", f"a tensor on {cond.device}", f"{x.device}, the state's device")
    if uncond is not None:
        check_tensor("uncond", uncond, x.shape, cond.dtype, x.device)
    if x.dtype == torch.float64 and cond.dtype in (torch.bfloat16, torch.float16):
        cond, uncond = cond.float(), None if uncond is None else uncond.float()  # exact; the kernels widen from there
    return cond, uncond


def _check_model_input(x: Tensor, model_input: Tensor, layout: torch.memory_format) -> None:
    one, two = tuple(x.shape), (2 * len(x), *x.shape[1:])
    if model_input.shape not in (one, two):
        raise refusal("model_input", f"shape {tuple(model_input.shape)}", f"{one} or {two}")
    check_floating("model_input", model_input)
    check_tensor("model_input", model_input, model_input.shape, model_input.dtype, x.device)
    check_mutable("model_input", model_input)
    if not model_input.is_contiguous(memory_format=layout):
        raise refusal("model_input", f"strides {model_input.stride()}", f"the state's memory format, {layout}")


def _check_table(x: Tensor, coef: Tensor, index: Tensor, seeds: Tensor | None) -> None:
    rows = max(index.shape[0], 1) if index.ndim else 1
    check_tensor("coef", coef, (rows, ROW_FLOATS), torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
    check_tensor("index", index, (rows, ROW_INTS), torch.int64, x.device)
    if not (coef.is_contiguous() and index.is_contiguous()):
        raise refusal("coef and index", f"strides {coef.stride()} and {index.stride()}", "contiguous tables")
    if seeds is not None:
        check_seeds(seeds, x.shape[0], x.device)
