"""StyleGAN's own operators and networks as an outside oracle: the same calls with its code and with genfast's.

    python tools/stylegan_oracle.py PATH_TO_STYLEGAN3_CHECKOUT

Values and gradients of the operators and their second derivatives in float64; in float32, which they insist on, the StyleGAN2 and
StyleGAN3 networks with gradients of gradients, and the gradients of the four phases of their training, augmented (R1 and path lengths
included). The checkout's code runs with its plain PyTorch forms (impl="ref"). Exits 1 if an element differs by more than 1e-9
(networks and training: 1e-4) of the largest.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from genfast.compat import stylegan

Results = dict[str, list[Tensor]]
BOUND = {torch.float64: 1e-9, torch.float32: 1e-4}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def derivatives(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The value, the gradients, and the gradients of the squared gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    first = torch.autograd.grad((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum(), leaves, create_graph=True)
    if not any(g.requires_grad for g in first):
        return [y, *first, *(torch.zeros_like(t) for t in leaves)]
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    return [y, *first, *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)]


def operators(impl: str) -> Iterator[tuple[str, list[Tensor]]]:
    bias_act, upfirdn2d, filtered, resample = (
        importlib.import_module(f"torch_utils.ops.{name}") for name in ("bias_act", "upfirdn2d", "filtered_lrelu", "conv2d_resample")
    )
    x, b, w = draw(2, 6, 9, 11), draw(6), draw(4, 6, 3, 3)
    for act, clamp in itertools.product(bias_act.activation_funcs, (None, 0.5)):
        yield (
            f"bias_act {act} {clamp}",
            derivatives(lambda x, b, a=act, c=clamp: bias_act.bias_act(x, b, act=a, clamp=c, impl=impl), [x, b]),
        )
    taps = {"4x4": upfirdn2d.setup_filter([1, 3, 3, 1]), "long": upfirdn2d.setup_filter(list(range(1, 13)))}
    for (name, f), up, down, padding in itertools.product(taps.items(), (1, 2, 4), (1, 2), (0, 3, (2, -1, 4, 1))):
        if 9 * up + 2 * (padding if isinstance(padding, int) else -1) < 12:
            continue
        for flip in (False, True):
            options = {"up": up, "down": down, "padding": padding, "flip_filter": flip, "gain": 4}
            yield f"upfirdn2d {name} {options}", derivatives(lambda x, f=f, o=options: upfirdn2d.upfirdn2d(x, f, **o, impl=impl), [x])
    for up, down, clamp, flip in itertools.product((1, 2, 4), (1, 2), (None, 0.3), (False, True)):
        options = {"up": up, "down": down, "padding": 9, "clamp": clamp, "flip_filter": flip}
        f = taps["long"]
        yield (
            f"filtered_lrelu {options}",
            derivatives(lambda x, b, f=f, o=options: filtered.filtered_lrelu(x, f, f, b, **o, impl=impl), [x, b]),
        )
    for up, down, flip in itertools.product((1, 2), (1, 2), (True, False)):
        options = {"f": taps["4x4"], "up": up, "down": down, "padding": 1, "flip_weight": flip}
        yield f"conv2d_resample {up} {down} {flip}", derivatives(lambda x, w, o=options: resample.conv2d_resample(x, w, **o), [x, w])


def networks(state: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Generators and a discriminator with the parameters in ``state``, which the first caller fills."""
    two, three = (importlib.import_module(f"training.networks_{name}") for name in ("stylegan2", "stylegan3"))
    common = {"z_dim": 8, "c_dim": 0, "w_dim": 8, "img_resolution": 16, "img_channels": 3, "channel_base": 256, "channel_max": 16}
    made = {
        "StyleGAN2": two.Generator(**common, num_fp16_res=0),
        "StyleGAN3-T": three.Generator(**common, num_layers=4, num_critical=1, first_cutoff=1, first_stopband=2**1.1, num_fp16_res=0),
        "StyleGAN3-R": three.Generator(
            **common,
            num_layers=4,
            num_critical=1,
            first_cutoff=1,
            first_stopband=2**1.1,
            num_fp16_res=0,
            conv_kernel=1,
            use_radial_filters=True,
        ),
        "discriminator": two.Discriminator(
            c_dim=0,
            img_resolution=16,
            img_channels=3,
            channel_base=256,
            channel_max=16,
            num_fp16_res=0,
            epilogue_kwargs={"mbstd_group_size": 2},
        ),
    }
    for name, network in made.items():
        network.load_state_dict(state.setdefault(name, {k: v.clone() for k, v in network.state_dict().items()}))
        parameters = [p for p in network.parameters() if p.requires_grad]
        torch.manual_seed(1)
        inputs = (draw(4, 3, 16, 16) if name == "discriminator" else draw(4, 8)).float()
        inputs.requires_grad_()
        if name == "discriminator":
            y = network(inputs, None)
        else:
            y = network(inputs, None, **({"noise_mode": "const"} if name == "StyleGAN2" else {}))
        (slope,) = torch.autograd.grad(
            (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum(), [inputs], create_graph=True
        )
        grads = torch.autograd.grad(slope.square().sum() + y.square().sum(), parameters, allow_unused=True, materialize_grads=True)
        yield name, [y, slope, *grads]


def losses(state: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    """The gradients of each phase of StyleGAN2's training, regularisers and augmentation included."""
    two, loss, augment = (importlib.import_module(f"training.{name}") for name in ("networks_stylegan2", "loss", "augment"))
    common = {"c_dim": 0, "img_resolution": 32, "img_channels": 3, "channel_base": 512, "channel_max": 16, "num_fp16_res": 0}
    networks = {"G": two.Generator(z_dim=16, w_dim=16, **common), "D": two.Discriminator(**common)}
    for name, network in networks.items():
        network.load_state_dict(state.setdefault(f"loss {name}", {k: v.clone() for k, v in network.state_dict().items()}))
        network.requires_grad_(False)
    geometry = dict.fromkeys(("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"), 1)
    colour = dict.fromkeys(("brightness", "contrast", "lumaflip", "hue", "saturation", "imgfilter", "noise", "cutout"), 1)
    pipe = augment.AugmentPipe(**geometry, **colour)
    pipe.p.fill_(0.5)
    step = loss.StyleGAN2Loss(torch.device("cpu"), *networks.values(), augment_pipe=pipe, r1_gamma=1, style_mixing_prob=0.9, pl_weight=2)
    z, c, real = draw(4, 16).float(), torch.zeros(4, 0), draw(4, 3, 32, 32).float()
    for phase in ("Gmain", "Greg", "Dmain", "Dreg"):
        network = networks[phase[0]]
        network.requires_grad_(True)
        torch.manual_seed(2)
        step.accumulate_gradients(phase=phase, real_img=real, real_c=c, gen_z=z, gen_c=c, gain=1, cur_nimg=0)
        yield f"loss {phase}", [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        network.requires_grad_(False)


def run(impl: str, state: dict[str, dict[str, Tensor]]) -> Results:
    torch.manual_seed(0)
    results = dict(operators(impl))
    for whole in (networks, losses):
        torch.manual_seed(0)
        results |= dict(whole(state))
    return results


def forget(*packages: str) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] in packages]:
        del sys.modules[name]


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "torch_utils" / "ops" / "bias_act.py").is_file():
        print(f"checkout: got {sys.argv[1:]}, supported: one path to a checkout of stylegan3, which holds torch_utils/ops")
        return 2
    sys.path.insert(0, sys.argv[1])
    versions = ModuleType("pkg_resources")  # setuptools no longer has it; the checkout asks it for the order of versions
    versions.parse_version = lambda text: tuple(map(int, re.findall(r"\d+", text)[:2]))  # type: ignore[attr-defined]
    sys.modules.setdefault("pkg_resources", versions)
    warnings.simplefilter("ignore")
    state: dict[str, dict[str, Tensor]] = {}
    theirs = run("ref", state)
    forget("torch_utils", "dnnlib", "training")
    stylegan.install()
    ours = run("cuda", state)
    failed = 0
    for name, expected in theirs.items():
        worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in zip(ours[name], expected, strict=True))
        if not worst <= BOUND[expected[0].dtype]:
            failed += 1
            print(f"{name}: differs by {worst:.1e}")
    print(f"{len(theirs)} calls compared, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
