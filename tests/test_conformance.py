"""The conformance kit finds nothing where stock is compared with itself, finds what is broken, and finds the drop-ins equal to stock."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from genfast.testing.conformance import __main__ as kit
from genfast.testing.conformance import diffusers as schedulers
from genfast.testing.conformance.grid import Choice, cover


def problems(stock, ours):
    return [result for result in schedulers.check_class(stock, ours, quick=True) if result.verdict.problem]


@pytest.mark.parametrize("stock", [DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_stock_equals_itself(stock):
    results = list(schedulers.check_class(stock, stock, quick=True))
    assert not [result for result in results if result.verdict.problem]
    assert sum(result.accepted for result in results) >= 4


def after_step(stock, change):
    """A stock class whose step's result is changed."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **options):
        result = stock.step(self, model_output, timestep, sample, *args, return_dict=True, **options)
        result.prev_sample = change(result.prev_sample, model_output)
        return result if return_dict else tuple(result.values())

    step.__signature__ = inspect.signature(stock.step)
    return type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})


def other_generator(stock):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        generator = torch.Generator().manual_seed(99)
        return stock.step(self, model_output, timestep, sample, generator=generator, return_dict=return_dict)

    return type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})


def swapped_table(stock):
    """A stock class that takes every alpha from the step before."""

    def set_timesteps(self, *args, **options):
        stock.set_timesteps(self, *args, **options)
        self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[:-2], self.sigmas[-1:]])

    set_timesteps.__signature__ = inspect.signature(stock.set_timesteps)
    return type(stock.__name__, (stock,), {"set_timesteps": set_timesteps, "__module__": stock.__module__})


BROKEN = {
    "zeros": after_step(DPMSolverMultistepScheduler, lambda x, m: torch.zeros_like(x)),
    "mean": after_step(DPMSolverMultistepScheduler, lambda x, m: x.mean().expand_as(x).clone()),
    "one element": after_step(DPMSolverMultistepScheduler, lambda x, m: x.index_put((torch.tensor(0),) * 4, x[0, 0, 0, 0] + 1e-2)),
    "coefficient": after_step(FlowMatchEulerDiscreteScheduler, lambda x, m: x + 1e-4 * m),
    "wide": after_step(DPMSolverMultistepScheduler, lambda x, m: x.double()),
    "generator": other_generator(EulerAncestralDiscreteScheduler),
    "table": swapped_table(EulerAncestralDiscreteScheduler),
}


@pytest.mark.parametrize("name", BROKEN)
def test_finds_what_is_broken(name):
    broken = BROKEN[name]
    assert len(problems(broken.__mro__[1], broken)) >= 2


def test_an_error_that_stock_does_not_raise_is_found():
    class Refusing(DDPMScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            if sample.dtype == torch.bfloat16:
                raise ValueError("no")
            return DDPMScheduler.step(self, model_output, timestep, sample, generator, return_dict)

    found = problems(DDPMScheduler, Refusing)
    assert found and all("bfloat16" in result.case and result.verdict.problem.startswith("raised ValueError") for result in found)


@pytest.mark.parametrize("strength", [1, 2])
def test_every_combination_occurs(strength):
    axes = {name: [Choice(str(k)) for k in range(n)] for name, n in (("a", 2), ("b", 3), ("c", 4))}

    def accepts(case):
        labels = {name: choice.label for name, choice in case.choices.items()}
        return labels["a"] != "1" or labels["b"] != "2", labels

    found = list(cover(axes, strength, accepts))
    accepted = [labels for _, good, labels in found if good]
    for a in "01":
        assert strength == 2 or any(labels["a"] == a for labels in accepted)
        for b in "012":
            for c in "0123":
                pairs = [{"a": a, "b": b}, {"a": a, "c": c}, {"b": b, "c": c}] if strength == 2 else [{"b": b}, {"c": c}]
                for pair in pairs:
                    among = accepted if pair != {"a": "1", "b": "2"} else [labels for _, _, labels in found]
                    assert any(pair.items() <= labels.items() for labels in among)
    assert len(found) < 24


def test_the_drop_ins_equal_stock_on_the_quick_grid(capsys):
    status = kit.main(["--library", "diffusers", "--quick"])
    told = capsys.readouterr().out
    assert status == 0, told
    assert told.count(": ok\n") == len(schedulers.classes()) >= 20


@pytest.mark.slow
def test_the_drop_ins_equal_stock_on_the_full_grid(capsys):
    assert kit.main(["--library", "diffusers"]) == 0, capsys.readouterr().out


def test_arguments(capsys, tmp_path, monkeypatch):
    path = tmp_path / "cases.jsonl"
    assert kit.main(["--library", "diffusers", "--filter", "FlowMatchLCM", "--quick", "--json", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert len(lines) > 10 and '"family": "FlowMatchLCMScheduler"' in lines[0]
    assert kit.main(["--filter", "NoSuchClass", "--quick"]) == 1
    assert "conformance: got no case for filter 'NoSuchClass'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    assert kit.main(["--library", "k-diffusion"]) == 1
    assert "supported: pip install k-diffusion" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert kit.main(["--library", "diffusers", "--quick"]) == 1
    assert "supported: pip install 'diffusers>=0.31'" in capsys.readouterr().err
