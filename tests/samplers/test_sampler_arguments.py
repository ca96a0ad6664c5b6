"""What a call of a sampler accepts and refuses: generators, scales, masks, dtypes, devices, and things in each other's places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genfast import Sampler, schedules
from genfast.samplers import SOLVERS, AdaptiveSampler, Denoiser, make_plan

VP, VE = schedules.scaled_linear(), schedules.edm()
SHAPE = (3, 2, 4, 4)
SHIFTS = {"cond": torch.tensor([0.1, 0.2, 0.3]), "uncond": torch.tensor([-0.1, 0.0, 0.1])}


def net(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
    """Without any sum over elements or samples."""
    t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    out = x * 0.5 - x.abs() * 0.125 + t * 0.001
    return out if shift is None else out + shift.view(t.shape).to(x.dtype) * x.sign()


DEN = Denoiser(net, "v", noise=VP)


def sampler(solver: str = "euler", **options: object) -> Sampler:
    return Sampler(solver, **{"sigmas": [9.0, 4.0, 1.5, 0.4, 0.0], "progress": False, **options})


# ---- generators --------------------------------------------------------------------------------------------------------------------


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "dpmpp_sde", "ddpm"])
def test_a_generator_for_each_sample_draws_that_sample(solver: str) -> None:
    draw = sampler(solver)
    whole = draw(DEN, SHAPE, generator=generators(5, 6, 7))
    assert draw.last_seeds is None and not torch.equal(whole[0], whole[1])
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(draw(DEN, (1, *SHAPE[1:]), generator=torch.Generator().manual_seed(seed))[0], whole[i])
    assert torch.equal(draw(DEN, SHAPE, generator=tuple(generators(7, 5, 6))), whole[[2, 0, 1]])
    last = draw.memory_format
    draw.memory_format = torch.channels_last
    assert torch.equal(draw(DEN, SHAPE, generator=generators(5, 6, 7)), whole) and last == torch.contiguous_format


def test_the_first_noise_is_that_of_diffusers() -> None:
    randn = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    states = []
    den = Denoiser(lambda x, t: states.append(x.clone()) or net(x, t), "v", noise=VP)
    sampler()(den, SHAPE, generator=generators(1, 2, 3))
    assert torch.equal(states[0], randn(SHAPE, generator=generators(1, 2, 3)))


def test_the_adaptive_sampler_takes_generators() -> None:
    draw = AdaptiveSampler(sigmas=[9.0, 0.1, 0.0], eta=0.5, progress=False)
    one, two = (draw(DEN, SHAPE, generator=generators(1, 2, 3)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (generators(1, 2), "generator: got 2 of them, supported: None, a torch.Generator, or 3, one for each sample"),
        ([], "generator: got 0 of them"),
        (7, "generator: got a int, supported"),
        ([torch.Generator(), 1, 2], "generator: got a list with a int"),
        ([None, None, None], "generator: got a list with a NoneType"),
    ],
)
def test_wrong_generators(generator: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler()(DEN, SHAPE, generator=generator)


# ---- guidance scales ----------------------------------------------------------------------------------------------------------------

SCALES = [1.0, 2.5, -0.5]
MODELS = {
    "v": DEN,
    "edm": Denoiser(net, "edm", noise=VE),
    "16 bit": Denoiser(net, "v", noise=VP, dtype=torch.bfloat16),
}
SHAPING = {
    "plain": {},
    "rescale": {"guidance_rescale": 0.7},
    "threshold": {"threshold": 0.9, "guidance_rescale": 0.3},
    "clip": {"clip": 0.6},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "euler_ancestral_cfg_pp"])
def test_a_scale_for_each_sample_is_that_samples_run(solver: str, impl: str, shaping: str, model: str) -> None:
    """To the bit, at scale 1 too, whatever the others' scales are."""
    options = {"impl": impl, **SHAPING[shaping]}
    whole = sampler(solver, guidance_scale=SCALES, **options)(MODELS[model], SHAPE, seeds=range(3), **SHIFTS)
    for i, g in enumerate(SCALES):
        call = {"seeds": [i], **{name: shift[i : i + 1] for name, shift in SHIFTS.items()}}
        alone = sampler(solver, guidance_scale=g, **options)(MODELS[model], (1, *SHAPE[1:]), **call)
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_equal_scales_are_one_scale(dtype: torch.dtype, layout: torch.memory_format) -> None:
    options = {"dtype": dtype, "memory_format": layout, "guidance_rescale": 0.7}
    call = {"seeds": range(3), **SHIFTS}
    one = sampler(guidance_scale=2.5, **options)(DEN, SHAPE, **call)
    for scales in ([2.5] * 3, torch.full((3,), 2.5), np.full(3, 2.5), lambda sigma: [2.5] * 3):
        assert torch.equal(sampler(guidance_scale=scales, **options)(DEN, SHAPE, **call), one)
    for scale in (torch.tensor(2.5), np.float64(2.5)):
        assert sampler(guidance_scale=scale).guidance_scale == 2.5


def test_scales_of_one_evaluate_one_half() -> None:
    sizes = []
    den = Denoiser(lambda x, t, y: sizes.append(len(x)) or net(x, t, y), "v", noise=VP)
    interval = sampler(guidance_scale=lambda sigma: [1.0, 1.0, 4.0] if 1 < sigma < 5 else 1.0)
    got = interval(den, SHAPE, seeds=range(3), **SHIFTS)
    assert sizes == [3, 6, 6, 3]
    sizes.clear()
    plain = sampler(guidance_scale=[1.0, 1.0, 1.0])(den, SHAPE, seeds=range(3), **SHIFTS)
    assert sizes == [3] * 4 and torch.equal(plain, sampler()(den, SHAPE, seeds=range(3), cond=SHIFTS["cond"]))
    assert torch.equal(got[:2], plain[:2]) and not torch.equal(got[2], plain[2])


def test_scales_with_a_mask_and_with_the_adaptive_sampler() -> None:
    known, mask = torch.full(SHAPE, 0.5), torch.tensor([0.0, 1.0, 0.5, 1.0])
    whole = sampler(guidance_scale=SCALES)(DEN, SHAPE, seeds=range(3), known=known, mask=mask, **SHIFTS)
    call = {"cond": SHIFTS["cond"][1:2], "uncond": SHIFTS["uncond"][1:2], "known": known[:1], "mask": mask}
    assert torch.equal(sampler(guidance_scale=2.5)(DEN, (1, *SHAPE[1:]), seeds=[1], **call)[0], whole[1])
    options = {"sigmas": [9.0, 0.1, 0.0], "progress": False}
    one, three = (AdaptiveSampler(guidance_scale=g, **options)(DEN, SHAPE, seeds=range(3), **SHIFTS) for g in (2.5, [2.5] * 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 2.0], "guidance_scale: got 2 of them, supported: one number, or 3, one for each sample"),
        (lambda sigma: [3.0] * 4, "guidance_scale: got 4 of them"),
        (lambda sigma: math.nan, "guidance_scale: got nan"),
        ([1.0, math.inf, 2.0], r"guidance_scale: got \[1.0, inf, 2.0\], supported: a finite number, a list or tensor"),
        ([], r"guidance_scale: got \[\]"),
        ("7.5", "guidance_scale: got 7.5, supported: a finite number"),
        (torch.ones(3, 1), "guidance_scale: got tensor"),
        (None, "guidance_scale: got None"),
    ],
)
def test_wrong_scales(scale: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(guidance_scale=scale)(DEN, SHAPE, seeds=range(3), **SHIFTS)


# ---- masks and states ---------------------------------------------------------------------------------------------------------------


def test_masks_of_every_dtype_that_holds_zero_and_one() -> None:
    known, where = torch.zeros(SHAPE), torch.arange(4) % 2
    results = []
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn):
        results.append(sampler()(DEN, SHAPE, seeds=range(3), known=known, mask=where.to(dtype)))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask": torch.tensor([0, 255, 0, 255], dtype=torch.uint8)}, r"mask: got 255, supported: numbers in \[0, 1\]"),
        ({"mask": torch.tensor([0.0, 1.0, 0.0, -0.01])}, "mask: got -0.01"),
        ({"mask": torch.tensor([0.0, 1.0, 0.0, 1 + 1e-7])}, "mask: got 1, supported"),
        ({"mask": torch.full((4,), math.nan)}, "mask: got nan"),
        ({"mask": torch.full((4,), math.inf)}, "mask: got inf"),
        ({"mask": torch.ones(4, dtype=torch.complex64)}, "mask: got torch.complex64"),
        ({"mask": np.ones(4)}, "mask: got ndarray, supported: a tensor"),
        ({"known": np.zeros(SHAPE), "mask": torch.ones(4)}, "known: got a ndarray, supported: None or a tensor of shape"),
        ({"init": [0.0], "known": None}, "init: got a list"),
        ({"latent": torch.zeros(SHAPE, dtype=torch.complex64), "known": None}, "latent: got torch.complex64, supported: real numbers"),
    ],
)
def test_wrong_masks_and_states(call: dict, message: str) -> None:
    calls = []
    with pytest.raises(ValueError, match=message):
        sampler()(Denoiser(lambda *a: calls.append(a), "v", noise=VP), SHAPE, seeds=range(3), **{"known": torch.zeros(SHAPE), **call})
    assert not calls


# ---- dtypes and devices -------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Parameters of these dtypes, in this order; the network notes the dtype it is fed."""

    def __init__(self, *dtypes: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(2, 2, device=device).to(d), requires_grad=False) for d in dtypes)
        self.fed: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.fed.append(x.dtype)
        return torch.tanh(x)


F8, BF16, F16, F32, INT8 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.int8


@pytest.mark.parametrize(
    ("dtypes", "fed"),
    [
        ((F8, BF16), BF16),
        ((torch.float8_e5m2, F8, F16, F32), F16),
        ((INT8, torch.uint8, BF16), BF16),
        ((torch.complex64, F16), F16),
        ((INT8,), F32),
        ((), F32),
    ],
)
def test_the_networks_dtype_is_one_it_computes_in(dtypes: tuple[torch.dtype, ...], fed: torch.dtype) -> None:
    model = Mixed(*dtypes)
    sampler()(Denoiser(model, "v", noise=VP), SHAPE, seeds=range(3))
    assert set(model.fed) == {fed}


def test_a_network_stored_in_float8_needs_its_dtype() -> None:
    with pytest.raises(
        ValueError, match=r"dtype: got None for a network that stores its parameters in torch.float8.*supported: Denoiser\(dtype"
    ):
        sampler()(Denoiser(Mixed(F8, INT8), "v", noise=VP), SHAPE, seeds=range(3))
    model = Mixed(F8)
    sampler()(Denoiser(model, "v", noise=VP, dtype=BF16), SHAPE, seeds=range(3))
    assert set(model.fed) == {BF16}


def test_a_network_on_meta_needs_a_device() -> None:
    den = Denoiser(Mixed(F16, device="meta"), "v", noise=VP)
    with pytest.raises(ValueError, match="device: got a network whose parameters are all on the meta device, supported: device="):
        sampler()(den, SHAPE, seeds=range(3))
    sampler()(den, SHAPE, seeds=range(3), device="cpu")
    assert set(den.net.fed) == {F16}
    partly = nn.ModuleList([Mixed(F16, device="meta"), Mixed(BF16)])
    assert Denoiser(partly, "v", noise=VP).device == torch.device("cpu")
    assert Denoiser(nn.BatchNorm2d(2, affine=False), "v", noise=VP).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nowhere", "xpu", -3, 1.5])
def test_devices_where_nothing_can_run(device: object) -> None:
    with pytest.raises(ValueError, match=r"device: got .*, supported: cpu"):
        sampler()(DEN, SHAPE, seeds=range(3), device=device)


def test_number_zero_is_a_device_and_not_the_default() -> None:
    if torch.cuda.is_available():
        assert sampler()(DEN, SHAPE, seeds=range(3), device=0).device == torch.device("cuda", 0)
    else:
        with pytest.raises(ValueError, match="device: got '0'"):
            sampler()(DEN, SHAPE, seeds=range(3), device=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, "float32"])
def test_states_and_inputs_have_dtypes_that_the_kernels_compute_in(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype: got .*, supported: torch.float32, torch.float64, torch.bfloat16, torch.float16"):
        sampler(dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype: got .*, supported: torch.float32"):
        Denoiser(net, "v", noise=VP, dtype=dtype)


def test_outputs_of_other_dtypes_and_devices() -> None:
    with pytest.raises(ValueError, match=r"net: returned torch.int64, supported: torch.float32"):
        sampler()(Denoiser(lambda x, t: x.long(), "v", noise=VP), SHAPE, seeds=range(3))
    with pytest.raises(ValueError, match=r"net: returned a tensor on meta, supported: cpu, the input's device \(a sampler's device="):
        sampler()(Denoiser(lambda x, t: x.to("meta"), "v", noise=VP), SHAPE, seeds=range(3))


# ---- things in each other's places --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [nn.Linear(2, 2), net, VP, None, "dpmpp_2m", sampler()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("draw", [sampler(), AdaptiveSampler()], ids=["fixed", "adaptive"])
def test_something_in_the_denoisers_place(draw: Sampler, other: object) -> None:
    with pytest.raises(TypeError, match=rf"den: got a {type(other).__name__}, supported: genfast.Denoiser\(net"):
        draw(other, SHAPE, seeds=range(3))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_plan_of_the_denoiser_is_what_it_runs(solver: str) -> None:
    draw = sampler(solver)
    assert draw.plan(DEN).table() == draw.plan(VP).table()


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, "cosine", 1000])
def test_a_plan_of_something_else(other: object) -> None:
    with pytest.raises(TypeError, match=rf"noise: got a {type(other).__name__}, supported: a Denoiser, or its NoiseSchedule"):
        sampler().plan(other)
    with pytest.raises(TypeError, match=rf"grid: got a {type(other).__name__}, supported: a Grid"):
        make_plan("euler", other)


def test_a_network_that_writes_into_the_state() -> None:
    """Where its input is the state itself, silently another run; where it is a buffer of its own, nobody's business."""

    def hasty(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return x.clamp_(-1, 1) * 0.5

    with pytest.raises(ValueError, match="net: wrote into its input, which is the state of the run, supported: networks that leave it"):
        sampler()(Denoiser(hasty, "v", noise=VP), SHAPE, seeds=range(3))
    sampler(guidance_scale=3.0)(Denoiser(hasty, "v", noise=VP), SHAPE, seeds=range(3), **SHIFTS)
    with torch.inference_mode():
        sampler()(DEN, SHAPE, seeds=range(3))


@pytest.mark.parametrize("sigma", [torch.ones(3), "1.0", None, [1.0, 2.0]])
def test_a_denoiser_is_asked_at_one_sigma(sigma: object) -> None:
    assert torch.equal(DEN(torch.ones(SHAPE), torch.tensor(1.5)), DEN(torch.ones(SHAPE), 1.5))
    with pytest.raises(ValueError, match=r"sigma: got .*, supported: a number"):
        DEN(torch.ones(SHAPE), sigma)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), VP])
def test_a_plan_compiled_for_something_else(other: object) -> None:
    with pytest.raises(TypeError, match="den: got a"):
        sampler().plan(DEN).compile(other)


@pytest.mark.parametrize("other", [VP, None, DEN, "unet"])
def test_a_denoiser_of_something_else(other: object) -> None:
    with pytest.raises(ValueError, match=rf"net: got a {type(other).__name__}, supported: a network"):
        Denoiser(other, "v", noise=VP)
