from __future__ import annotations

import inspect
import json
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny_gan
import tiny_run
import torch
from PIL import Image

from genfast import cli, data, models
from genfast.data import sets
from genfast.generate import generate, open_model, overview
from genfast.media import grid, pixels
from genfast.media.pictures import format_of
from genfast.models import UNet, UNetConfig
from genfast.recipes import RECIPES, experiment
from genfast.reference import noise
from genfast.request import Request, SamplingOptions, every
from genfast.train import Objective

SMALL = ["--channels", "8", "16", "--blocks", "1", "1", "--attention", "False", "False"]


@pytest.fixture
def bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched data set "bars" of three classes."""
    entry = replace(sets.DATASETS["fashion"], read=lambda folder, split: tiny_run.pictures(), classes=("left", "middle", "right"))
    monkeypatch.setitem(data.DATASETS, "bars", entry)
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path / "cache"))
    (tmp_path / "cache" / "bars").mkdir(parents=True)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: exactly one line, ours."""
    text = capsys.readouterr().err
    assert text.startswith("genfast: ") and text.count("\n") == 1, text
    return text


def test_train_then_sample(bars: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = f"train fashion-unet --data bars --out {out} --steps 6 --batch 4 --warmup 2 --validation 10".split()
    assert cli.main([*words, *SMALL, "--sample-every", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert {path.name for path in out.glob("*.png")} == {"loss.png", "samples-000003.png", "samples-000006.png"}

    picture = tmp_path / "deep" / "grid.png"
    sample = ["sample", str(out), "--out", str(picture)]
    assert cli.main([*sample, "--labels", "Right,0", "--seeds", "3,5-6", "--steps", "4", "--solver", "euler"]) == 0
    with Image.open(picture) as image:
        assert image.size == (80 + 3 * 18, 2 + 2 * 18)  # 8 pixels, twice as large, with gaps of 2
    folder = tmp_path / "files"
    assert cli.main(["sample", str(out / "ema.safetensors"), "--out", str(folder), "--labels", "1", "--seeds", "4", "--steps", "2"]) == 0
    assert [path.name for path in folder.iterdir()] == ["middle-000004.png"]
    capsys.readouterr()

    assert cli.main([*words, *SMALL, "--lr", "0.5"]) == 2
    assert "lr: got 0.5, but the run in" in sentence(capsys)
    assert cli.main([*sample, "--labels", "up"]) == 2
    assert "--labels: got 'up', supported: 0 (left), 1 (middle), 2 (right)" in sentence(capsys)
    assert cli.main([*sample, "--seeds", "7-3"]) == 2
    assert "--seeds: got '7-3'" in sentence(capsys)


# Options that make the recipes of each family small and short.
TINY = {
    "unet": "--channels 8 --blocks 1 --attention False --warmup 1 --validation 10",
    "dcgan": "--channels 4 --latent 4 --size 8",
    "stylegan2": "--channel-base 64 --channel-max 8 --latent 4 --mapping-layers 2 --size 16",
    "r3gan": "--channel-base 256 --channel-max 8 --latent 4 --size 16",
    "vaegan": "--channels 4 --critic-channels 4 --latent 4 --size 8 --validation 10",
    "progan": "--channel-base 64 --channel-max 8 --latent 4 --size 16",
    "mlp_gan": "--widths 8 16 --latent 4 --size 8",
    "autoencoder": "--channels 4 --latent 4 --size 8 --warmup 1 --validation 10",
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_says_what_it_would_run(name: str, bars: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", name, "--out", str(tmp_path / "run")]
    words += f"--data bars --steps 4 --batch 4 --no-progress {TINY[RECIPES[name].family]}".split()
    before = sorted(tmp_path.iterdir())
    assert cli.main([*words, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["global batch"] == 4 and said["seconds a step"] > 0 and said["samples"] == "50 of shape (1, 8, 8), 3 classes"
    assert said["training"]["steps"] == 4 and said["run"]["out"] == str(tmp_path / "run") and "MiB for weights" in said["memory"]
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    model = open_model(tmp_path / "run")
    assert sum(p.numel() for p in model.net.parameters()) == said["parameters"][0]
    assert cli.main(["sample", str(tmp_path / "run"), "--seeds", "0-1", "--out", str(tmp_path / "x.png"), "--steps", "2"]) == 0


def test_every_option_says_what_it_is() -> None:
    """Each field of what a recipe is made of has its meaning beside it, which is what --help shows."""
    for name in RECIPES:
        kind = experiment(name)
        parts = [kind().setting, kind().model, kind().training, kind().run, getattr(kind().training, "objective", kind().run)]
        names = [field.name for part in parts[:4] for field in fields(part)] + [field.name for field in fields(Objective)]
        assert len(names) == len({*names}), "two options have the same name"
        for part in parts:
            source = "".join(inspect.getsource(base) for base in type(part).__mro__ if base is not object)
            for field in fields(part):
                assert re.search(rf"^    {field.name}: .*  # \w", source, re.MULTILINE), f"{type(part).__name__}.{field.name}"


def test_the_data_decide_the_shape(bars: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "fashion-unet",
        "--data",
        "bars",
        "--out",
        str(tmp_path / "run"),
        *TINY["unet"].split(),
        "--steps",
        "1",
        "--batch",
        "4",
    ]
    assert cli.main([*words, "--num-classes", "5"]) == 2
    assert "num_classes: got 5, supported with this data and these options: 3" in sentence(capsys)
    assert cli.main([*words, "--prediction", "flow"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["network"]["time_scale"] == 1000
    words = [
        "train",
        "fashion-dcgan",
        "--data",
        "bars",
        "--out",
        str(tmp_path / "gan"),
        *TINY["dcgan"].split(),
        "--steps",
        "1",
        "--batch",
        "4",
    ]
    assert cli.main([*words, "--r1", "0.1", "--size", "12"]) == 0
    config = json.loads((tmp_path / "gan" / "config.json").read_text())
    assert config["discriminator"]["discriminator_norm"] is False and config["generator"]["size"] == 12
    capsys.readouterr()
    assert cli.main([*words, "--size", "7"]) == 2
    assert "size: got 7, supported: 4, 5, 6 or 7 times" in sentence(capsys)
    assert cli.main([*words, "--size", "20"]) == 2
    assert "size: got 20" not in sentence(capsys)  # but that the run there has another size


def test_samples_are_those_of_the_label_and_seed(tmp_path: Path) -> None:
    """A sample is the same, whatever else is drawn with it; another label or another seed is another sample."""
    torch.manual_seed(0)
    net = UNet(replace(tiny_run.CONFIG, channels=(8, 8)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    words = {"prediction": "v", "noise": "cosine", "noise_steps": 1000, "shift": 1.0, "size": (8, 8)}
    models.save(net, tmp_path / "net.safetensors", **words)
    model, options = open_model(tmp_path / "net.safetensors"), SamplingOptions("euler", 4, guidance_scale=2.0)
    both = generate(model, every([0, 2], [5, 9], options))
    alone = generate(model, Request([9], [2], options))
    torch.testing.assert_close(both[3:], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, every([0, 2], [5, 9], replace(options, batch=3)))[:3], both[:3])
    assert min((both[i] - both[j]).abs().max() for i in range(4) for j in range(i)) > 1e-2
    for request, message in (
        (Request([1]), "labels: got None, supported: one for each seed, from 0 to 2"),
        (Request([1], [3]), "labels: got 3, supported: from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, request)


@pytest.mark.parametrize("family", ["dcgan", "stylegan2", "r3gan"])
def test_every_family_is_sampled(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the same command and by the network itself: latents are stream 0, draw 0 of their seeds."""
    shape = {"size": 8, "image_channels": 3, "latent": 6}
    config = models.FAMILIES[family].config(**shape, **({"channels": 4} if family == "dcgan" else {"channel_base": 64, "channel_max": 16}))
    torch.manual_seed(0)
    generator = models.FAMILIES[family].build(config, "fused").eval()
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.2 * torch.randn_like(p))
    models.save(generator, tmp_path / "ema.safetensors", data="none")
    folder = tmp_path / "samples"
    assert cli.main(["sample", str(tmp_path), "--seeds", "3,7-8", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["000003.png", "000007.png", "000008.png"]
    with torch.no_grad():
        expected = pixels(generator(noise.normal(torch.tensor([8]), (1, 6))))[0]
    with Image.open(folder / "000008.png") as image:
        assert np.array_equal(np.asarray(image), expected)
        provenance = json.loads(image.text["genfast"])
    assert provenance["seeds"] == "3,7-8" and provenance["weights"] == str(tmp_path / "ema.safetensors")
    assert provenance["sample"] == "000008" and provenance["solver"] == "dpmpp_2m"
    assert cli.main(["sample", str(tmp_path), "--seeds", "0-3", "--out", str(tmp_path / "all.gif")]) == 0
    with Image.open(tmp_path / "all.gif") as image:
        assert image.n_frames == 4 and image.size == (16, 16)
    assert cli.main(["sample", str(tmp_path), "--labels", "0"]) == 2
    assert "--labels: got '0', supported: none" in sentence(capsys)


def test_where_samples_cannot_go(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("precious")
    for name, message in (
        ("folder.png", "which is a folder, supported: the name of a picture, such as samples.png, or of a folder, without an extension"),
        ("file", "which is a file, supported: a folder, or a picture"),
        ("samples.doc", "supported: the name of a picture"),
    ):
        with pytest.raises(ValueError, match=f"--out: got '{tmp_path / name}'.*{message}"):
            format_of(tmp_path / name)
    assert format_of(tmp_path / "new") is None and format_of(tmp_path / "new.JPG") == "JPEG"


def test_previews_of_training_are_what_is_sampled_afterwards(tmp_path: Path) -> None:
    for train, out in ((tiny_run.run, tmp_path / "a"), (tiny_gan.run, tmp_path / "b")):
        train(out, steps=3, sample_every=3)
        model = open_model(out)
        expected = np.asarray(grid(generate(model, overview(len(model.classes))), 8))
        with Image.open(out / "samples-000003.png") as image:
            assert np.array_equal(np.asarray(image), expected)


def test_grid_puts_every_image_in_its_place() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    array = np.asarray(grid(x, columns=2, zoom=1, gap=1))
    assert array.shape == (7, 7)
    assert array[1, 1] == 0 and array[1, 4] == 128 and array[4, 1] == 255 and array[0, 0] == 255


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path))
    assert cli.main(["data", "fetch", "cifar"]) == 2
    assert "name: got 'cifar', supported: 'fashion'" in sentence(capsys)
    assert cli.main(["data", "fetch", "fashion", "--from", str(tmp_path / "none")]) == 2
    assert "which does not exist" in sentence(capsys)
    assert cli.main(["sample", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in sentence(capsys)
    models.save(UNet(UNetConfig(channels=(8,), blocks=(1,), attention=(False,))), tmp_path / "w", noise="betas", prediction="v")
    assert cli.main(["sample", str(tmp_path / "w")]) == 2
    assert "noise process 'betas', supported: 'cosine'" in sentence(capsys)


def test_data_list(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path))
    assert cli.main(["data", "list"]) == 0
    text = capsys.readouterr().out
    assert "Fashion-MNIST" in text and "MIT" in text and "not fetched" in text
    (tmp_path / "fashion").mkdir()
    cli.main(["data", "list"])
    assert f"in {tmp_path / 'fashion'}" in capsys.readouterr().out


def test_what_is_passed_on_and_what_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(cli, "__file__", str(Path(__file__).resolve().parent.parent / "genfast" / "cli.py"))  # also where a wheel is tested
        with pytest.raises(SystemExit, match="3"):
            cli.main(["bench", "--quick", "x"])
    assert commands == [["-m", "benchmarks.run", "--quick", "x"]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "genfast" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "in a checkout of the repository" in sentence(capsys)
    assert cli.main(["data", "list", "--quick"]) == 2
    assert "Unrecognized options: --quick; genfast data list --help says what there is" in sentence(capsys)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--brief"])
    assert "genfast" in capsys.readouterr().out


def test_data_check_reads_all_of_it(bars: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "bars"]) == 0
    assert capsys.readouterr().out.startswith("bars: 50 samples of shape (1, 8, 8), digest ")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    for words, begin in (["train", "--list"], "fashion-unet"), (["train", "--help"], "usage: genfast train RECIPE"):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert text.startswith(begin) and all(name in text and recipe.summary in text for name, recipe in RECIPES.items())
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["data", "-h"]) == 0 and "train" not in capsys.readouterr().out
