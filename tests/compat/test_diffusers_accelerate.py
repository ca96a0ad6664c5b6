"""`accelerate` and `restore`: what they say, what they leave alone, what is saved, copied and called back; seeds through a pipeline."""

from __future__ import annotations

import copy
import io
import json
import pickle
import runpy
import sys
from pathlib import Path

import diffusers
import pytest
import tiny
import torch

import genfast.compat.diffusers as gfd
from genfast.ops import normal

EXAMPLES = Path(tiny.__file__).parent


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


def draw(pipe, **options):
    call = {**tiny.text(), "num_inference_steps": 4, "generator": generator(), "output_type": "pt", **options}
    return pipe(**call).images


def with_scheduler(name, **config):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    return pipe


class Mine(diffusers.EulerDiscreteScheduler):
    """A user's own scheduler."""


def assert_same(got, expected):
    assert expected.std() > 0.02
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [Mine(), diffusers.DPMSolverMultistepInverseScheduler()])
def test_other_classes_are_left_and_named(scheduler):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = scheduler
    report = gfd.accelerate(pipe, attention=False)
    name = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
    assert report.left == {"scheduler": f"no fused class for {name}"} and not report.swapped
    assert pipe.scheduler is scheduler and str(report) == f"scheduler: left, no fused class for {name}"
    gfd.restore(pipe)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("function", [gfd.accelerate, gfd.restore])
def test_what_is_no_pipeline_is_refused(function):
    with pytest.raises(TypeError, match=r"^pipe: got a Linear, supported: a diffusers\.DiffusionPipeline$"):
        function(torch.nn.Linear(2, 2))


def test_twice_and_back():
    pipe = with_scheduler("EulerDiscreteScheduler")
    stock = pipe.scheduler
    assert str(gfd.accelerate(pipe, attention=False)) == "scheduler: EulerDiscreteScheduler, fused"
    fused = pipe.scheduler
    assert str(gfd.accelerate(pipe, seeds=[3], attention=False)) == "scheduler: EulerDiscreteScheduler, fused already"
    assert pipe.scheduler is fused and fused.seeds == [3]
    assert type(stock.config) is type(fused.config) and dict(stock.config) == dict(fused.config)
    gfd.restore(pipe)
    assert pipe.scheduler is stock
    gfd.restore(pipe)
    assert pipe.scheduler is stock


def test_restore_respects_a_later_choice_and_a_shared_scheduler():
    pipe = with_scheduler("EulerDiscreteScheduler")
    gfd.accelerate(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    assert isinstance(other.scheduler, gfd.FusedScheduler)
    gfd.restore(other)
    assert type(other.scheduler) is diffusers.EulerDiscreteScheduler
    chosen = pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert chosen.config.beta_schedule == "scaled_linear"
    gfd.restore(pipe)
    assert pipe.scheduler is chosen


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "PNDMScheduler", "LCMScheduler"])
def test_what_is_saved_names_the_stock_class_and_loads_without_genfast(name, tmp_path):
    pipe = with_scheduler(name)
    expected = draw(pipe)
    gfd.accelerate(pipe)
    draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == name
    absent = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"])
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded.scheduler) is getattr(diffusers, name)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), expected)
    assert type(getattr(gfd, name).from_pretrained(tmp_path, subfolder="scheduler")) is getattr(gfd, name)


def saved_and_loaded(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_copies_go_on_with_the_trajectory(name, how):
    scheduler = getattr(gfd, name)()
    scheduler.set_timesteps(6)
    x, trajectories = torch.randn(2, 4, 8, 8, generator=generator()), []
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
    for s in (scheduler, how(scheduler)):
        y = x
        for t in s.timesteps[3:]:
            options = {"generator": generator()} if name.startswith("Euler") else {}
            y = s.step(torch.tanh(s.scale_model_input(y, t)), t, y, **options).prev_sample
        assert type(s) is getattr(gfd, name) and s.fallback is None
        trajectories.append(y)
    assert torch.equal(*trajectories) and not torch.equal(trajectories[0], x)


@pytest.mark.parametrize("before", [2, 5, 8])
def test_ipndm_leaves_its_outputs_to_the_next_trajectory(before):
    """Stock empties them in `set_timesteps` alone: after `_step_index = None` the first step is of the order that they allow."""
    states = []
    for module in (diffusers, gfd):
        s = module.IPNDMScheduler()
        s.set_timesteps(8)
        for count in (before, 3):
            x = torch.randn(2, 4, 8, 8, generator=generator(), dtype=torch.float64)
            for t in s.timesteps[:count]:
                x = s.step(torch.tanh(x + t), t, x).prev_sample
            states.append(x)
            s._step_index = None
    for expected, got in zip(states[:2], states[2:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_copied_pipeline():
    pipe = with_scheduler("DPMSolverMultistepScheduler")
    expected = draw(pipe)
    gfd.accelerate(pipe)
    draw(pipe)
    twin = copy.deepcopy(pipe)
    assert twin.scheduler is not pipe.scheduler
    assert_same(draw(twin), expected)
    gfd.restore(twin)
    assert type(twin.scheduler) is diffusers.DPMSolverMultistepScheduler and isinstance(pipe.scheduler, gfd.FusedScheduler)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "SASolverScheduler"])
def test_generators_and_images_per_prompt(name):
    pipe = with_scheduler(name)
    lists = {**tiny.text(2), "num_images_per_prompt": 2}
    expected = draw(pipe, **lists, generator=[generator(k) for k in range(4)])
    gfd.accelerate(pipe)
    got = draw(pipe, **lists, generator=[generator(k) for k in range(4)])
    assert pipe.scheduler.fallback is None and got.shape[0] == 4
    assert_same(got, expected)


def test_callback_on_step_end():
    seen = {}

    def record(kind):
        def callback(pipe, step, timestep, values):
            seen.setdefault(kind, []).append((step, int(timestep), values["latents"].clone()))
            return {"latents": values["latents"] * 0.9 if step == 1 else values["latents"]}

        return callback

    pipe = with_scheduler("DPMSolverMultistepScheduler")
    expected = draw(pipe, callback_on_step_end=record("stock"))
    gfd.accelerate(pipe)
    got = draw(pipe, callback_on_step_end=record("fused"))
    assert_same(got, expected)
    for (i, t, x), (j, u, y) in zip(seen["stock"], seen["fused"], strict=True):
        assert (i, t) == (j, u)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_with_seeds_a_sample_is_the_same_alone_and_in_a_batch(name):
    pipe = with_scheduler(name)
    prompts = tiny.text(3)
    seeds = torch.tensor([5, 2, 9])
    gfd.accelerate(pipe, seeds=seeds)
    together = draw(pipe, **prompts, latents=normal(seeds, (3, 4, 16, 16)), generator=None)
    for i, seed in enumerate(seeds):
        gfd.accelerate(pipe, seeds=seed[None])
        prompt = {key: value[i : i + 1] for key, value in prompts.items()}
        alone = draw(pipe, **prompt, latents=normal(seed[None], (1, 4, 16, 16)), generator=None)
        assert_same(alone[0], together[i])
    gfd.accelerate(pipe, seeds=seeds + 1)
    assert (draw(pipe, **prompts, latents=normal(seeds, (3, 4, 16, 16)), generator=None) - together).abs().max() > 0.01


@pytest.mark.parametrize("seeds, got", [([1, 2], r"torch\.int64 \(2,\)"), ([-1], "-1"), ([1.5], r"torch\.float32")])
def test_wrong_seeds_are_refused(seeds, got):
    pipe = with_scheduler("EulerAncestralDiscreteScheduler")
    gfd.accelerate(pipe, seeds=seeds)
    with pytest.raises(ValueError, match=rf"^seeds: got {got}.*, supported: "):
        draw(pipe)


def run(monkeypatch, name, *arguments):
    """An example's variables at its end."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_example_text_to_image(monkeypatch, tmp_path):
    end = run(monkeypatch, "text_to_image", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "out.png"))
    assert_same(end["fused"], end["stock"])
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_example_class_by_class(monkeypatch, capsys):
    end = run(monkeypatch, "class_by_class", "--steps", "4")
    assert capsys.readouterr().out.count("fallback: None") == 3
    stock = tiny.stable_diffusion()
    stock.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(end["pipe"].scheduler.config)
    assert_same(end["image"], draw(stock, generator=generator(0))[0])


def test_example_fine_tune(monkeypatch):
    end = run(monkeypatch, "fine_tune", "--steps", "6")
    unet, x = end["unet"], end["start"]
    got = [p.grad.clone() for p in unet.parameters()]
    stock = diffusers.DDIMScheduler.from_config(end["sampling"].config)
    stock.set_timesteps(2)
    for t in stock.timesteps:
        x = stock.step(unet(x, t, end["text"]).sample, t, x).prev_sample
    unet.zero_grad()
    (-x.square().mean()).backward()
    expected = [p.grad for p in unet.parameters()]
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


def test_example_own_loop(monkeypatch):
    end = run(monkeypatch, "own_loop", "--steps", "4")
    torch.testing.assert_close(end["alone"], end["together"], rtol=1e-4, atol=1e-4)
    assert float((end["together"][0] - end["together"][1]).abs().max()) > 1
