"""diffusers' schedulers with every step in one kernel launch: same names, same configuration, same pictures.

``from genfast.compat.diffusers import DPMSolverMultistepScheduler`` class by class, or ``accelerate(pipe)`` for a whole pipeline.
A class that the installed diffusers lacks is not here either. docs/diffusers.md is the page for users.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import diffusers as _diffusers
except ImportError:
    raise ImportError("genfast.compat.diffusers: diffusers is not installed, supported: pip install 'diffusers>=0.31'") from None

from .pipeline import Report, accelerate, restore
from .scheduler import FusedScheduler, fuse

# The traits of every class, see FusedScheduler.
_TRAITS: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": {"scaled": True},
    "CosineDPMSolverMultistepScheduler": {"scaled": True},
    "DDIMInverseScheduler": {"stateless": True},
    "DDIMScheduler": {"stateless": True},
    "DDPMScheduler": {"stateless": True},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": {"scaled": True},
    "DPMSolverSinglestepScheduler": {},
    "EDMDPMSolverMultistepScheduler": {"scaled": True},
    "EDMEulerScheduler": {"scaled": True},
    "EulerAncestralDiscreteScheduler": {"scaled": True},
    "EulerDiscreteScheduler": {"scaled": True},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "HeunDiscreteScheduler": {"scaled": True},
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {"scaled": True},
    "KDPM2DiscreteScheduler": {"scaled": True},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {"scaled": True},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
}


def _lms_coefficient(self: Any, order: int, t: int, current_order: int) -> float:
    """The integral of a Lagrange polynomial over one step, exactly: stock hands the polynomial to an adaptive quadrature."""
    nodes = [float(self.sigmas[t - k]) for k in range(order)]
    others = [node for k, node in enumerate(nodes) if k != current_order]
    basis = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
    integral = (basis / basis(nodes[current_order])).integ()
    return float(integral(float(self.sigmas[t + 1])) - integral(nodes[0]))


def _path(self: Any, model_output: Tensor, sample: Tensor, generator: Any) -> Any:
    """The noise of `DPMSolverSDEScheduler` and `CosineDPMSolverMultistepScheduler`: of one Brownian path, by two sigmas."""
    if self.noise_sampler is None:
        like = sample
        if hasattr(self, "noise_sampler_seed"):
            sigmas, seed = self.sigmas[self.sigmas > 0], self.noise_sampler_seed
            low, high = sigmas.min().item(), sigmas.max().item()
        else:
            seed = [g.initial_seed() for g in generator] if isinstance(generator, list) else generator and generator.initial_seed()
            low, high = self.config.sigma_min, self.config.sigma_max
            like = sample.to(torch.promote_types(sample.dtype, model_output.dtype))  # as the denoised prediction is
        tree = sys.modules[self.stock.__module__].BrownianTreeNoiseSampler  # type: ignore[attr-defined]
        self.noise_sampler = tree(like, low, high, seed)
    return self.noise_sampler


def _exact_lms(stock: type) -> type:
    return type(stock.__name__, (stock,), {"get_lms_coefficient": _lms_coefficient})


def _short_ipndm(stock: Any) -> type:
    """Stock reads its last four outputs and keeps them all."""

    def step(self: Any, *args: Any, **options: Any) -> Any:
        result = stock.step(self, *args, **options)
        self.ets = self.ets[-3:]
        return result

    return type(stock.__name__, (stock,), {"step": step})


CLASSES: dict[str, Any] = {}  # every fused class by its name
__all__ = ["CLASSES", "FusedScheduler", "Report", "accelerate", "restore"]
for _name, _traits in _TRAITS.items():
    _stock = getattr(_diffusers, _name, None)
    if _stock is None or "step" not in vars(_stock):  # not in this release, or a placeholder for a class whose requirements are missing
        continue
    _traits = dict(_traits)
    if _name == "LMSDiscreteScheduler":
        _traits |= {"traced": _exact_lms(_stock)}
    if _name == "IPNDMScheduler":
        _traits |= {"traced": _short_ipndm(_stock)}
    if _name in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
        _traits |= {"_path": _path, "pathwise": True}
    CLASSES[_name] = globals()[_name] = fuse(_stock, **_traits)
    __all__ += [_name]


def __getattr__(name: str) -> Any:
    if name in _TRAITS and hasattr(_diffusers, name):
        raise ImportError(f"genfast.compat.diffusers.{name}: torchsde is not installed, supported: pip install torchsde")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
