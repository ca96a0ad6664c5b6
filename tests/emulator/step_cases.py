"""Cases of the solver step for a comparison bit for bit: one list for the emulated kernels and for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Terms = tuple[tuple[int, float], ...]  # (term, coefficient): the present terms of one output
COEF, TERMS, NOISE = 8, 10, 9  # csrc/ops/solver_step/params.h


@dataclass(frozen=True)
class Case:
    """One row on one set of tensors. Terms are numbered x, d, m, h0 .. h5, noise."""

    shape: tuple[int, ...] = (2, 4, 8, 8)
    state: torch.dtype = F32
    model: torch.dtype = F32
    input: torch.dtype | None = None
    copies: int = 1
    channels_last: bool = False
    offset: int = 0  # elements by which every tensor starts off an aligned address
    slots: int = 3
    history: tuple[int, ...] = ()
    written: tuple[int, ...] = (0,)
    terms: tuple[Terms, ...] = (((0, 0.75), (1, 0.3)),)
    ax: float = 1.1
    am: float = -0.7
    guidance: float | None = None
    clip: float = 0.0
    rescale: float = 0.0
    quantile: float = 0.0
    max_threshold: float = 1.5
    draw: int = 0
    watch: bool = False
    spoil: float | None = None  # a value put into one element of the state
    scale: float = 1.0
    shift: float = 0.0

    def __str__(self) -> str:
        default = Case()
        own = [f"{k}={v}".replace("torch.", "") for k, v in vars(self).items() if v != getattr(default, k)]
        return ",".join(own).replace(" ", "") or "plain"


@dataclass
class Tensors:
    ring: Tensor
    cond: Tensor
    uncond: Tensor | None
    coef: Tensor
    index: Tensor
    counter: Tensor
    seeds: Tensor | None
    model_input: Tensor | None
    watch: Tensor | None

    def clone(self, device: str = "cpu") -> Tensors:
        # Not .clone(): it would lose the offset into the storage.
        def copy(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            raw = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).to(device, copy=True)
            return torch.empty(0, dtype=t.dtype, device=device).set_(raw.untyped_storage(), t.storage_offset(), t.shape, t.stride())

        return Tensors(**{k: copy(v) for k, v in vars(self).items()})


def dense(shape: tuple[int, ...], dtype: torch.dtype, case: Case, skip: int = 0) -> Tensor:
    """NaN everywhere, in the case's layout; the first ``skip`` dimensions stand before the batch."""
    outer, sample = shape[: skip + 1], shape[skip + 1 :]
    order = (*sample[1:], sample[0]) if case.channels_last else sample
    count = 1
    for n in shape:
        count *= n
    t = torch.full((count + case.offset,), float("nan"), dtype=dtype)[case.offset :].view(*outer, *order)
    return t.movedim(-1, skip + 1) if case.channels_last else t


def tensors_of(case: Case) -> Tensors:
    random = torch.Generator().manual_seed(7)
    batch = case.shape[0]

    def normal(dtype: torch.dtype) -> Tensor:
        t = dense(case.shape, dtype, case)
        return t.copy_(torch.randn(case.shape, generator=random, dtype=F64) * case.scale + case.shift)

    wide = F64 if case.state == F64 else F32
    # The row stands between two others that would give something else.
    coef = torch.full((3, 40), 9.0, dtype=wide)
    index = torch.zeros(3, 12, dtype=torch.int64)
    index[:, 1] = 1
    row = torch.zeros(40, dtype=wide)
    c_in = 0.875 if case.input else 0.0
    scalars = [case.ax, case.am, case.guidance or 0.0, case.clip, c_in, case.rescale, case.quantile, case.max_threshold]
    row[:COEF] = torch.tensor(scalars, dtype=wide)
    for k, terms in enumerate(case.terms):
        for term, c in terms:
            row[COEF + k * TERMS + term] = c
    coef[1] = row
    index[1, :3] = torch.tensor([case.draw, len(case.terms), len(case.history)])
    index[1, 3 : 3 + len(case.history)] = torch.tensor(case.history)
    index[1, 9 : 9 + len(case.written)] = torch.tensor(case.written)
    ring = dense((case.slots, *case.shape), case.state, case, skip=1)
    for k in {0, *case.history}:  # the other slots stay NaN: they must not be read
        ring[k].copy_(normal(case.state))
    if case.spoil is not None:
        ring[0].select(0, batch - 1).flatten(-1)[..., -1] = case.spoil
    return Tensors(
        ring=ring,
        cond=normal(case.model),
        uncond=normal(case.model) if case.guidance is not None else None,
        coef=coef,
        index=index,
        counter=torch.ones(1, dtype=torch.int64),
        seeds=(torch.arange(batch) * 2**40 + 5) if any(term == NOISE for terms in case.terms for term, _ in terms) else None,
        model_input=dense((case.copies * batch, *case.shape[1:]), case.input, case) if case.input else None,
        watch=torch.full((batch,), 2**62) if case.watch else None,
    )


def run_operator(step: Callable[..., None], case: Case, t: Tensors) -> None:
    step(t.ring, t.cond, t.uncond, t.coef, t.index, t.counter, t.seeds, t.model_input, t.watch, case.rescale != 0, case.quantile != 0)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits; any NaN equals any NaN."""
    if a is None or b is None:
        return a is b
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.dtype == b.dtype and bool((same | (a.isnan() & b.isnan())).all())


def differing(got: Tensors, want: Tensors) -> list[str]:
    return [name for name in ("ring", "model_input", "watch") if not same_bits(getattr(got, name), getattr(want, name))]


_EULER_A = (((0, 0.9), (1, 0.2), (NOISE, 0.35)),)
_UNIPC = (((0, 1.25), (1, -0.5), (3, 0.125), (4, 0.3)), ((1, 1.0),), ((0, 0.5), (2, -0.25), (3, 1.5)))
_BASE = [
    Case(),
    Case(ax=0.0),
    Case(am=0.0),
    Case(ax=0.0, am=0.0),
    Case(terms=(((0, 1.5),),)),
    Case(terms=(((2, 1.0),),)),
    Case(terms=((),), ax=0.0, am=0.0),
    Case(clip=0.5),
    Case(clip=0.5, spoil=float("nan"), watch=True),
    Case(spoil=float("inf"), watch=True),
    Case(watch=True, input=F32),
    Case(guidance=3.5),
    Case(guidance=1.0),
    Case(terms=_EULER_A, draw=3),
    Case(terms=(((NOISE, 14.6),),), draw=2**32 - 1),
    Case(terms=_UNIPC, slots=5, history=(2, 4), written=(0, 1, 3), guidance=7.5, clip=1.0),
    Case(
        terms=(
            tuple((k, 0.1 * (k + 1)) for k in range(TERMS)),
            tuple((k, -0.2 * (k + 1)) for k in range(TERMS)),
            tuple((k, 0.01 * (k + 1)) for k in range(TERMS)),
        ),
        slots=16,
        history=(15, 3, 4, 9, 2, 7),
        written=(3, 0, 15),
        guidance=2.0,
        draw=9,
    ),
    Case(terms=_UNIPC[:2], slots=4, history=(1, 2), written=(2, 0), input=F16, copies=2),
    Case(shape=(3, 3, 16, 16), guidance=5.0, rescale=0.7),
    Case(shape=(2, 3, 48, 48), guidance=5.0, rescale=0.7, clip=1.0),
    Case(shape=(3, 3, 16, 16), quantile=0.995),
    Case(shape=(2, 3, 16, 16), quantile=0.5, max_threshold=100.0, scale=30.0),
    Case(shape=(2, 3, 20, 20), quantile=0.95, guidance=4.0, rescale=0.3, max_threshold=3.0, input=BF16, copies=2, watch=True),
    Case(shape=(2, 1, 3, 5), quantile=1.0, max_threshold=10.0, scale=4.0),
    Case(shape=(2, 5, 5), quantile=0.9, spoil=float("nan"), watch=True),
    Case(shape=(2, 5, 5), quantile=0.9, spoil=float("inf")),
    Case(shape=(2, 7, 9), quantile=0.8, ax=0.0, am=0.0),
    # A mean far from zero: the variance cancels, so the last bit of every sum shows.
    Case(shape=(3, 3, 45, 45), state=F64, model=F64, guidance=5.0, rescale=1.0, shift=100.0),
    Case(shape=(3, 3, 45, 45), guidance=5.0, rescale=1.0, shift=1e6),
    Case(shape=(1030, 1, 20, 27), terms=_EULER_A),  # more samples than the grid is high
    Case(rescale=0.5),
]
_SHAPES: list[dict[str, object]] = [
    {"shape": (1, 1)},
    {"shape": (5, 2)},
    {"shape": (2, 3, 7, 9)},
    {"shape": (2, 4, 6, 6), "channels_last": True},
    {"shape": (2, 3, 5, 7), "channels_last": True},
    {"shape": (1, 2, 2, 3, 4), "channels_last": True},
    {"shape": (2, 3, 40, 40)},
    {"shape": (2, 4, 8, 8), "offset": 1},
    {"shape": (600, 1)},
]
_DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64), (F64, F32)]
_EVERYTHING = Case(
    terms=(((0, 0.9), (1, 0.2), (3, -0.4), (NOISE, 0.35)), ((1, 1.0),)),
    slots=4,
    history=(2,),
    written=(0, 3),
    guidance=3.0,
    clip=1.0,
    draw=4,
    watch=True,
    copies=2,
)


def cases() -> list[Case]:
    listed = list(_BASE)
    for shape in _SHAPES:
        listed += [replace(_EVERYTHING, **shape), replace(Case(input=F32, guidance=2.0), **shape)]  # type: ignore[arg-type]
    for state, model in _DTYPES:
        for dtype in (F32, BF16, F16) if state != F64 else (F64, F32):
            listed.append(replace(_EVERYTHING, state=state, model=model, input=dtype))
        odd = replace(_EVERYTHING, state=state, model=model, input=model, shape=(2, 3, 5, 7))
        listed += [odd, replace(odd, channels_last=True, shape=(2, 3, 6, 4))]
        listed.append(Case(shape=(2, 3, 12, 12), state=state, model=model, guidance=3.0, rescale=0.6, quantile=0.9, max_threshold=4.0))
    return list(dict.fromkeys(listed))
