from __future__ import annotations

import json
import subprocess
from dataclasses import replace
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
from genfast.reference import noise
from genfast.request import Request, SamplingOptions, every

SMALL = ["--channels", "8", "16", "--blocks", "1", "1", "--attention", "0", "0"]


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
    arguments = [
        "train",
        "diffusion",
        "--data",
        "bars",
        "--out",
        str(out),
        "--steps",
        "6",
        "--batch",
        "4",
        "--warmup",
        "2",
        "--validation",
        "10",
    ]
    assert cli.main([*arguments, *SMALL, "--sample-every", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert {path.name for path in out.glob("*.png")} == {"loss.png", "samples-000003.png", "samples-000006.png"}

    picture = tmp_path / "deep" / "grid.png"
    weights = ["--weights", str(out / "ema.safetensors"), "--out", str(picture)]
    assert cli.main(["sample", *weights, "--labels", "Right,0", "--seeds", "3,5-6", "--steps", "4", "--solver", "euler"]) == 0
    with Image.open(picture) as image:
        assert image.size == (80 + 3 * 18, 2 + 2 * 18)  # 8 pixels, twice as large, with gaps of 2
    capsys.readouterr()

    assert cli.main([*arguments, *SMALL, "--lr", "0.5"]) == 2
    assert "lr: got 0.5, but the run in" in sentence(capsys)
    assert cli.main(["sample", *weights, "--labels", "up"]) == 2
    assert "--labels: got 'up', supported: 0 (left), 1 (middle), 2 (right)" in sentence(capsys)
    assert cli.main(["sample", *weights, "--seeds", "7-3"]) == 2
    assert "--seeds: got '7-3'" in sentence(capsys)


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
    assert cli.main(["sample", "--weights", str(tmp_path), "--seeds", "3,7-8", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["000003.png", "000007.png", "000008.png"]
    with torch.no_grad():
        expected = pixels(generator(noise.normal(torch.tensor([8]), (1, 6))))[0]
    with Image.open(folder / "000008.png") as image:
        assert np.array_equal(np.asarray(image), expected)
        provenance = json.loads(image.text["genfast"])
    assert provenance["seeds"] == "3,7-8" and provenance["weights"] == str(tmp_path / "ema.safetensors")
    assert provenance["sample"] == "000008" and provenance["solver"] == "dpmpp_2m"
    assert cli.main(["sample", "--weights", str(tmp_path), "--seeds", "0-3", "--out", str(tmp_path / "all.gif")]) == 0
    with Image.open(tmp_path / "all.gif") as image:
        assert image.n_frames == 4 and image.size == (16, 16)
    assert cli.main(["sample", "--weights", str(tmp_path), "--labels", "0"]) == 2
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
    assert cli.main(["sample", "--weights", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in sentence(capsys)
    models.save(UNet(UNetConfig(channels=(8,), blocks=(1,), attention=(False,))), tmp_path / "w", noise="betas", prediction="v")
    assert cli.main(["sample", "--weights", str(tmp_path / "w")]) == 2
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
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "list", "--quick"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--brief"])
    assert "genfast" in capsys.readouterr().out
