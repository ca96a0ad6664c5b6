"""What a user can do wrong ends in one sentence and a status; what is wrong in genfast does not hide."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from genfast import cli, failure, models
from genfast.models import UNet
from genfast.models.families import FAMILIES
from genfast.recipes import RECIPES

# The command line on the bars of tiny_run, in a process of its own.
COMMAND = """
import signal, sys, tiny_run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from dataclasses import replace
from genfast import cli, data
from genfast.data import sets
entry = replace(sets.DATASETS["fashion"], read=lambda folder, split: tiny_run.pictures(), classes=("left", "middle", "right"))
data.DATASETS["bars"] = entry
(data.directory() / "bars").mkdir(parents=True, exist_ok=True)
cli.main()
"""
NETWORK = ["--channels", "8", "8", "--blocks", "1", "1", "--attention", "False", "False"]
SMALL = ["--data", "bars", *NETWORK, "--batch", "4", "--warmup", "1", "--validation", "10"]


def command(tmp_path: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parent
    environment = os.environ | {"GENFAST_DATA": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-c", COMMAND, *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def sentences(errors: str) -> list[str]:
    """The lines on stderr that are not the progress bar's."""
    return [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "step" not in line.partition("|")[2]]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, FloatingPointError, ImportError, MemoryError, UnicodeError])
def test_what_a_user_can_mend_has_status_2(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise error("steps: got 0,\n   supported: more")

    assert failure.guarded(fails) == 2
    text = capsys.readouterr().err
    assert text.startswith("genfast: ") and text.count("\n") == 1 and "steps: got 0, supported: more" in text


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, AssertionError, IndexError, StopIteration])
def test_a_fault_of_genfast_has_status_1_and_says_where(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise error("odd")

    assert failure.guarded(fails) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"genfast: {error.__name__} in test_failure.py, line ") and text.count("\n") == 1 and "GENFAST_DEBUG=1" in text


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_debug_shows_the_traceback(error: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error("odd")

    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("GENFAST_DEBUG", value)
        failure.guarded(fails)
        text = capsys.readouterr().err
        assert ("Traceback" in text and "in fails" in text) is shown and text.splitlines()[-1].startswith("genfast: ")


def test_errors_of_the_system_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    wrong: dict[str, Callable[[], object]] = {
        f"{tmp_path}/none: no such file or directory": (tmp_path / "none").read_bytes,
        f"{tmp_path}: is a directory": tmp_path.read_bytes,
        f"{tmp_path}/file/below: not a directory": (tmp_path / "file" / "below").read_bytes,
    }
    for text, call in wrong.items():
        assert failure.guarded(call) == 2
        assert capsys.readouterr().err == f"genfast: {text}\n"


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    plain = warnings.formatwarning
    assert failure.guarded(lambda: print(warnings.formatwarning("threads: had 1,\nnow 2", UserWarning, "x.py", 3), end="")) == 0
    assert capsys.readouterr().out == "genfast: warning: threads: had 1, now 2\n" and warnings.formatwarning is plain


def test_a_full_disk_is_a_sentence_and_the_last_good_state_stays(tmp_path: Path) -> None:
    """No file may grow beyond a limit: the checkpoint, the weights, the log, at the first or at a later write."""
    out = tmp_path / "run"
    words = ["train", "fashion-unet", *SMALL, "--out", str(out), "--steps", "4", "--checkpoint-every", "2"]
    for limit in (20_000, 100):
        process = command(tmp_path, *words, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        errors = sentences(process.communicate(timeout=120)[1])
        assert process.returncode == 2 and len(errors) == 1, errors
        assert errors[0].startswith(f"genfast: {out}/") and "too large" in errors[0], errors
        assert not list(out.glob("*.tmp")) and not list(out.glob("*.safetensors")) and not (out / ".lock").exists()
    process = command(tmp_path, *words)
    process.communicate(timeout=120)
    assert process.returncode == 0
    before = (out / "checkpoint.safetensors").read_bytes()
    (out / "ema.safetensors").unlink()
    process = command(tmp_path, *words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert process.communicate(timeout=120)[1] and process.returncode == 2
    assert (out / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("again", [signal.SIGINT, None])
def test_ctrl_c_says_how_to_continue(tmp_path: Path, again: signal.Signals | None) -> None:
    out = tmp_path / "run"
    steps = "1000000" if again else "4"
    words = ["train", "fashion-unet", *SMALL, "--out", str(out), "--steps", steps, "--checkpoint-every", "1"]
    process = command(tmp_path, *words)
    if again:
        while not (out / "checkpoint.safetensors").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(again)
    errors = sentences(process.communicate(timeout=120)[1])
    assert process.returncode == (130 if again else 0)
    assert errors == ([f"genfast: interrupted; the same command continues the run in {out}"] if again else [])
    assert not (out / ".lock").exists()


def test_a_reader_that_goes_is_no_error() -> None:
    code = "import sys; from genfast.failure import guarded; sys.exit(guarded(lambda: [print('x' * 1000) for _ in range(1000)]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --seeds 0-1000000000", "--seeds: got 1000000001 of them, supported: at most 1000 with so many labels"),
        ("sample --seeds 99999999999999999999", "--seeds: got '99999999999999999999', supported: numbers below 2^63"),
        ("sample --device tpu", "--device: got 'tpu', supported on this machine: cpu"),
        ("sample --device meta", "--device: got 'meta', supported on this machine: cpu"),
        ("sample --device cuda:77", "--device: got 'cuda:77', supported on this machine: cpu"),
        ("sample --out {tmp}/x.doc", "--out: got '{tmp}/x.doc', supported: the name of a picture"),
        ("sample --steps 2 --labels 0 --seeds 0 --out /proc/none/x.png", "/proc/none: no such file or directory"),
        ("sample {tmp}", "path: got {tmp}, a directory without ema.safetensors, which a run writes at its end"),
        ("sample {tmp}/none", "{tmp}/none: no such file or directory"),
        ("sample --guidance-scale nan", "guidance_scale: got nan, supported: a finite number; genfast sample --help"),
        ("sample --seads 1", "Unrecognized options: --seads, 1; did you mean --seeds?; genfast sample --help says what there is"),
        ("sample --impl fast", "invalid choice 'fast'"),
        ("train fashion-unet --out {tmp}/o --channels 0 0 0", "channels: got (0, 0, 0), supported: at least one in a tuple, each"),
        ("train fashion-unet --out {tmp}/o --attention 2 0 0", "--attention"),
        ("train fashion-unet --out {tmp}/o --steps 1e3", "--steps: invalid literal for int() with base 10: '1e3'"),
        ("train fashion-unet --out {tmp}/o --steps 50", "warmup: got 200, supported: an integer from 0 to 50"),
        ("train fashion-unet --out {tmp}/o --validation 50", "validation: got 50, supported: an integer from 0 to 49"),
        ("train fashion-unet --out {tmp}/o --data fashionn", "fashionn"),
        ("train fashion-unet --out /proc/none/o --steps 1 --warmup 0 --validation 10", "/proc/none: no such file or directory"),
        ("train fashion-unet --out {tmp}/o --label-drop 0.1", "Unrecognized options: --label-drop, 0.1; did you mean --label-dropout?"),
        ("train fashion-unet --out {tmp}/o --track tensorboards", "--track"),
        ("train fashion-unet --out {tmp}/o --capture --validation 10", "capture: got True, supported: False, because only adversarial"),
        ("train", f"recipe: got '', supported: {', '.join(RECIPES)}"),
        ("train fashion-unett", "recipe: got 'fashion-unett', supported: fashion-unet, .*; did you mean 'fashion-unet'?"),
        ("train fashion-dcgan --out {tmp}/o --size 16384", "size: got 16384, supported: an integer from 1 to 1024"),
        ("train fashion-dcgan --out {tmp}/o --size 4", "size: got 4, supported: 4, 5, 6 or 7 times a power of 2"),
        ("train fashion-dcgan --out {tmp}/o --lr 1e-3 -1", "lr: got (0.001, -1.0), supported: a finite number above 0; or 2"),
        ("train fashion-dcgan --out {tmp}/o --lr 1 2 3", "3"),
        ("train fashion-dcgan --out {tmp}/o --device cuda:99", "--device: got 'cuda:99'"),
        ("train fashion-dcgan --out {tmp}/o --sample-every -1", "sample_every: got -1, supported: an integer from 0"),
        ("train fashion-r3gan --out {tmp}/o --size 33", "size: got 33, supported: a power of 2"),
        ("train fashion-stylegan2 --out {tmp}/o --body fp16", "invalid choice 'fp16'"),
        ("info --wrong", "unrecognized arguments: --wrong; genfast info --help says what there is"),
        ("data list more", "Unrecognized options: more; genfast data list --help says what there is"),
        ("data fetch", "Missing from genfast data fetch: "),
        ("data", "COMMAND: got 'data', supported: data list, data fetch, data check"),
        ("eval {tmp}", "eval"),
        ("trian", "COMMAND: got 'trian', supported: data list, .*did you mean 'train'?"),
        ("", "COMMAND: got none, supported: data list"),
    ],
)
def test_wrong_commands_are_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from genfast.data import sets

    entry = replace(sets.DATASETS["fashion"], read=lambda folder, split: tiny_run.pictures())
    monkeypatch.setitem(sets.DATASETS, "fashion", entry)
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path / "cache"))
    (tmp_path / "cache" / "fashion").mkdir(parents=True)
    try:
        status = cli.main([word.format(tmp=tmp_path) for word in words.split()])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    text = capsys.readouterr().err
    assert status == 2 and text.count("\n") == 1 and text.startswith("genfast: "), text
    begin, _, end = message.format(tmp=tmp_path).partition(".*")
    assert begin in text and end in text, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda words: words["config"].pop("channels") and words["config"].update(widths=[8]), "cannot rebuild .*widths"),
        (lambda words: words["config"].update(channels=[8, 8]), "cannot rebuild .*levels"),
        (lambda words: words["config"].update(channels=[16]), "cannot rebuild .*size mismatch"),
        (lambda words: words["config"].update(channels=[-4]), "cannot rebuild .*channels: got"),
        (lambda words: words.update(config=None), "has no description of its network"),
        (lambda words: words.update(about=[]), "has no description of its network"),
        (lambda words: words.update(family="dots"), f"holds a network of 'dots', supported: {', '.join(FAMILIES)}"),
        (lambda words: words["about"].pop("prediction"), "does not say its prediction"),
        (lambda words: words["about"].update(prediction="score"), "description is wrong .*prediction: got 'score'"),
        (lambda words: words["about"].update(noise_steps=-3), "description is wrong .*noise_steps: got -3"),
        (lambda words: words["about"].update(classes="abc"), "description is wrong .*classes: got 'abc'"),
        (lambda words: words["about"].pop("size"), "does not say its size"),
        (lambda words: words["about"].update(size=[8]), "description is wrong .*size: got"),
    ],
)
def test_weights_that_are_not_as_they_should_be(
    damage: Callable[[Any], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    from dataclasses import asdict

    from genfast.files import pack

    net = UNet(models.UNetConfig(channels=(8,), blocks=(1,), attention=(False,), num_classes=2))
    about = {"prediction": "v", "noise": "cosine", "noise_steps": 1000, "shift": 1.0, "size": [8, 8], "classes": ["a", "b"]}
    words: dict[str, Any] = {"family": "unet", "config": asdict(net.config), "about": about}
    path, picture = tmp_path / "w", tmp_path / "x.png"
    sample = ["sample", str(path), "--out", str(picture), "--steps", "2", "--seeds", "0"]
    path.write_bytes(pack(net.state_dict(), "genfast", words))
    assert cli.main(sample) == 0
    damage(words)
    path.write_bytes(pack(net.state_dict(), "genfast", words))
    picture.unlink()
    capsys.readouterr()
    assert cli.main(sample) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and re.search(message, text) and str(path) in text, text
    assert not picture.exists()


def test_the_demonstration_answers_alike() -> None:
    for words, message in (
        (["--device", "cuda:99"], "--device: got 'cuda:99', supported"),
        (["--sead", "1"], "unrecognized arguments: --sead 1"),
    ):
        done = subprocess.run([sys.executable, "-m", "genfast.demo", *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_help_and_version_import_neither_torch_nor_numpy() -> None:
    for words in (["--help"], ["--version"], ["train", "--help"], ["train", "--list"], ["sample", "--help"], ["data", "fetch", "--help"]):
        code = (
            f"import sys\nsys.argv = ['genfast', *{words}]\nfrom genfast.cli import main\n"
            "try:\n    main()\nfinally:\n    print(sorted({'torch', 'numpy', 'PIL', 'matplotlib'} & sys.modules.keys()), file=sys.stderr)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
        begin = {"--version": "genfast 0.", "--list": "fashion-unet "}.get(words[-1], "usage: genfast")
        assert done.stdout.startswith(begin)


def test_the_package_has_its_names_on_use() -> None:
    code = (
        "import sys, genfast\nassert 'torch' not in sys.modules\n"
        "from genfast.samplers import Sampler\nassert genfast.Sampler is Sampler\n"
        "assert {'Sampler', 'models', '__version__'} <= {*dir(genfast)}\n"
        "from genfast import *\nassert Denoiser is genfast.Denoiser and ops is genfast.ops and __version__ == genfast.__version__\n"
        "assert genfast.train.train_gan and genfast.explain_attention is genfast.ops.explain_attention\n"
        "try:\n    genfast.Sampled\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'genfast' has no attribute 'Sampled'\n", done.stderr
