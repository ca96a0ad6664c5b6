"""One row of a solver's plan, in plain torch operations: the executable form of docs/solver-step.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import normal

CHUNK, LANES = 4096, 256
NEXT_C_IN, FIRST_COEF, TERMS, FIRST_HISTORY, NOISE = 4, 8, 10, 3, 9  # csrc/ops/solver_step/params.h; a test compares


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
    """Execute row ``counter[0]`` of the table on the slots, in place (docs/solver-step.md).

    ``ring`` (K, B, \\*sample), or K tensors (B, \\*sample) of one layout; slot 0 is the state. ``cond``, ``uncond`` (B, \\*sample);
    a ``cond`` of (2B, \\*sample) without ``uncond`` holds both, the unconditional half first. ``coef`` (rows, 40) in float32, float64
    with a float64 state; ``index`` (rows, 12) int64; ``counter`` (1,) int64; ``seeds`` (B,) int64, needed by rows that draw noise.
    ``model_input`` (B or 2B, \\*sample) receives ``c_in * state`` where the row asks for it, ``watch`` (B,) int64 the smallest row
    whose first output was not finite. ``rescale`` and ``threshold`` say whether rows may use those two; where False, phi and quantile
    of every row count as 0.
    """
    row = int(counter)
    integers = index[row].tolist()
    n_out, n_history = integers[1:3]
    history, written = integers[3 : 3 + n_history], integers[9 : 9 + n_out]
    outputs = solver_step(
        [ring[0], *(ring[slot] for slot in history)],
        cond,
        coef[row],
        index[row],
        uncond=uncond,
        seeds=seeds,
        outputs=n_out,
        rescale=rescale,
        threshold=threshold,
    )
    for slot, out in zip(written, outputs, strict=True):
        ring[slot].copy_(out)
    c_in = coef[row, NEXT_C_IN].item()
    if model_input is not None and c_in != 0:
        state = ring[written[0]].to(coef.dtype) * c_in
        model_input.copy_(state.repeat(len(model_input) // max(len(state), 1), *[1] * (state.ndim - 1)))
    if watch is not None:
        finite = ring[written[0]].isfinite()[:, None].flatten(1).all(1)
        watch.copy_(torch.where(finite, watch, watch.clamp(max=row)))


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
    in the state's dtype and layout.
    """
    x, *history = inputs
    if coef.requires_grad:
        raise ValueError("coef: got requires_grad=True, supported: coefficients without gradient")
    if uncond is None and len(cond) == 2 * len(x) > 0:
        uncond, cond = cond.chunk(2)
    c, draw = coef.flatten().tolist(), int(index.flatten()[0])
    ax, am, g, clip, _, phi, quantile, max_threshold = c[:FIRST_COEF]
    rows = [c[FIRST_COEF + k * TERMS :][:TERMS] for k in range(outputs)]
    dtype, layout, wide = x.dtype, layout_of(x), torch.float64 if x.dtype == torch.float64 else torch.float32

    x, cond, history = x.to(wide), cond.to(wide), [h.to(wide) for h in history]
    m = cond
    if uncond is not None:
        uncond = uncond.to(wide)
        m = uncond + g * (cond - uncond)
        if rescale and phi != 0 and m.numel():
            m = m * _per_sample(rescale_factor(cond, m, phi, layout).to(wide), m)
    d = _sum([(ax, x), (am, m)], x)
    if clip != 0:
        d = d.clamp(-clip, clip)
    if threshold and quantile != 0 and d.numel():
        s = _per_sample(_quantile_of_magnitude(d, quantile).clamp(1).clamp(max=max_threshold), d)
        d = d.clamp(-s, s) / s
    absent = [x] * (NOISE - FIRST_HISTORY - len(history))
    noise = x
    if any(row[NOISE] != 0 for row in rows):
        if seeds is None:
            raise ValueError(f"seeds: got None, supported: ({len(x)},) int64, because the row draws noise")
        noise = normal(seeds, x.shape, draw=draw, dtype=wide, device=x.device)
    terms = [x, d, m, *history, *absent, noise]
    return [_in_layout(_sum(list(zip(row, terms, strict=True)), x).to(dtype), layout) for row in rows]


def layout_of(x: Tensor) -> torch.memory_format:
    """The storage order of ``x``: C-order unless it is dense in channels_last order only."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None or x.is_contiguous() or not x.movedim(1, -1).is_contiguous():  # the form of the question that vmap answers
        return torch.contiguous_format
    return layout


def _in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous() if layout == torch.contiguous_format else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _sum(weighted: Sequence[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """Left to right over the present terms: a coefficient of exactly zero is a term that is not there."""
    present = [c * t for c, t in weighted if c != 0]
    total = present[0] if present else torch.zeros_like(like)
    for term in present[1:]:
        total = total + term
    return total


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _tree_sum(v: Tensor) -> Tensor:
    """Sum of (B, n) float64 in the fixed order of docs/solver-step.md."""
    chunks = F.pad(v, (0, -v.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK // LANES, LANES))
    lanes = torch.zeros_like(chunks[:, :, 0])
    for j in range(CHUNK // LANES):
        lanes = lanes + chunks[:, :, j]
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    total = torch.zeros_like(v[:, :1].sum(1))
    for chunk in lanes[..., 0].unbind(1):
        total = total + chunk
    return total


def _std(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Unbiased standard deviation of every sample, (B,) float64."""
    v = (x if layout == torch.contiguous_format else x.movedim(1, -1))[:, None].flatten(1).double()
    n = v.shape[1]
    s, q = _tree_sum(v), _tree_sum(v * v)
    return _nearest_sqrt(((q - s * s / n) / (n - 1)).clamp(min=0))


def _nearest_sqrt(v: Tensor) -> Tensor:
    """The square root of float64 rounded to nearest: torch's on the CPU can be one ulp off, so one Newton step with an exact residual."""
    r = v.sqrt()
    high = r * 134217729 - (r * 134217729 - r)  # Dekker 1971: r * r = square + error without rounding
    low, square = r - high, r * r
    error = ((high * high - square) + 2 * high * low) + low * low
    correction = ((v - square) - error) / (2 * r)
    return r + torch.where(correction.isfinite(), correction, 0).detach()  # not finite where v is 0, inf or NaN: r is right there


def rescale_factor(cond: Tensor, guided: Tensor, phi: float, layout: torch.memory_format) -> Tensor:
    """Lin et al. 2024, equations 14 to 16: phi * std(cond) / std(guided) + (1 - phi), (B,) float64."""
    return phi * (_std(cond, layout) / _std(guided, layout)) + (1 - phi)


def _quantile_of_magnitude(d: Tensor, q: float) -> Tensor:
    """quantile(abs(d), q) of every sample, interpolated linearly as torch.quantile does; (B,)."""
    v = d.abs()[:, None].flatten(1).sort(dim=1).values
    n = v.shape[1]
    rank = torch.tensor(q, dtype=d.dtype) * (n - 1)
    low = int(rank)
    w = float(rank - low)
    a, b = v[:, low], v[:, min(low + 1, n - 1)]
    s = a + w * (b - a) if w < 0.5 else b - (b - a) * (1 - w)
    return torch.where(v[:, -1].isnan(), v[:, -1], s)  # sort puts NaN last
