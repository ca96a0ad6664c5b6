"""What stands in the directory of a run besides its own good files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_gan
import tiny_run
from safetensors import safe_open
from safetensors.torch import save_file

from genfast.files import pack, unpack


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of a short run of each trainer, stopped before its end as far as the files tell."""
    root = tmp_path_factory.mktemp("runs")
    tiny_run.run(root / "diffusion", steps=4, checkpoint_every=2, log_every=1)
    tiny_gan.run(root / "gan", steps=4, checkpoint_every=2, log_every=1)
    return {"diffusion": root / "diffusion", "gan": root / "gan"}


TRAINERS = {"diffusion": tiny_run.run, "gan": tiny_gan.run}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("file", "new", "message"),
    [
        ("log.jsonl", b"step,loss\n1,2\n", r"log: line 1 of .*log.jsonl is damaged or not of a training run; move the file away"),
        ("log.jsonl", b'{"step": 1}\n{"loss": 2}\n{"step": 3}\n', r"log: line 2 of"),
        ("log.jsonl", b'{"step": 1}\n[1, 2]\n', r"log: line 2 of"),
        ("log.jsonl", b'{"step": 1}\n{"step": "two"}\n', r"log: line 2 of"),
        ("log.jsonl", b'{"step": 1}\n\xff\xfe\x00\n{"step": 3}\n', r"log: line 2 of"),
    ],
)
def test_foreign_and_damaged_logs_are_refused_and_nothing_is_written(
    tmp_path: Path, runs: dict[str, Path], trainer: str, file: str, new: bytes, message: str
) -> None:
    out = shutil.copytree(runs[trainer], tmp_path / "run")
    (out / file).write_bytes(new)
    before = content(out)
    with pytest.raises(ValueError, match=message):
        TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)
    assert content(out) == before


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_log_that_a_kill_cut_is_continued(tmp_path: Path, runs: dict[str, Path], trainer: str) -> None:
    out = shutil.copytree(runs[trainer], tmp_path / "run")
    (out / "checkpoint.safetensors").unlink()  # back to step 2
    lines = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(lines[:-7])
    TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)
    tiny_run.assert_same_bits(runs[trainer], out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" not in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_flipped_byte_sends_a_run_back_to_the_checkpoint_before(tmp_path: Path, runs: dict[str, Path], trainer: str) -> None:
    for place in (0.1, 0.6, 0.9):  # of the tensors
        out = shutil.copytree(runs[trainer], tmp_path / str(place))
        path = out / "checkpoint.safetensors"
        damaged = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(damaged[:8], "little")
        damaged[start + int(place * (len(damaged) - start))] ^= 16
        path.write_bytes(damaged)
        with safe_open(path, "pt") as file:  # safetensors itself sees nothing
            assert file.keys()
        with pytest.warns(UserWarning, match=r"checkpoint.safetensors, which is damaged: .* checksum .*; trying the one before it"):
            TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)
        tiny_run.assert_same_bits(runs[trainer], out)
        path.write_bytes(damaged)
        (out / "checkpoint.safetensors.previous").unlink()
        with pytest.raises(ValueError, match=r"checkpoint: got .* which is damaged: .*; delete it to start again"):
            TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, state: state.pop("config"), "not written by a training run"),
        (lambda tensors, state: state.update(step="4"), "not written by a training run"),
        (lambda tensors, state: state.update(config=[]), "not written by a training run"),
        (lambda tensors, state: state["config"].update(task="upscale"), "holds a run of another trainer or version"),
        (lambda tensors, state: tensors.pop(max(tensors)), r"checkpoint: got none for .*, supported by this run: shape"),
        (lambda tensors, state: tensors.update({min(tensors): tensors[min(tensors)][None]}), r"checkpoint: got shape .* for"),
    ],
)
def test_foreign_checkpoints_are_refused(
    tmp_path: Path, runs: dict[str, Path], trainer: str, change: Callable[..., object], message: str
) -> None:
    out = shutil.copytree(runs[trainer], tmp_path / "run")
    path = out / "checkpoint.safetensors"
    tensors, state = unpack(path, "state")
    change(tensors, state)
    path.write_bytes(pack(tensors, "state", state))
    before = content(out)
    with pytest.raises(ValueError, match=message):
        TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)
    assert content(out) == before


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_checkpoint_without_a_checksum_is_continued(tmp_path: Path, runs: dict[str, Path], trainer: str) -> None:
    out = shutil.copytree(runs[trainer], tmp_path / "run")
    tensors, state = unpack(out / "checkpoint.safetensors.previous", "state")
    save_file(tensors, out / "checkpoint.safetensors", {"state": json.dumps(state)})
    (out / "checkpoint.safetensors.previous").unlink()
    TRAINERS[trainer](out, steps=4, checkpoint_every=2, log_every=1)
    tiny_run.assert_same_bits(runs[trainer], out)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_run_of_another_trainer_and_foreign_files_are_left_alone(tmp_path: Path, runs: dict[str, Path], trainer: str) -> None:
    other = "gan" if trainer == "diffusion" else "diffusion"
    out = shutil.copytree(runs[other], tmp_path / "run")
    with pytest.raises(ValueError, match=r"out: got .*run, which holds a run of another trainer or version"):
        TRAINERS[trainer](out, steps=4)
    assert content(out) == content(runs[other])
    for text in ('{"_class_name": "UNet2DModel"}', "[]", "model: unet", "\0"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"out: got .*model, whose config.json belongs to something else"):
            TRAINERS[trainer](tmp_path / "model", steps=4)
        assert content(tmp_path / "model") == {"config.json": text.encode()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, runs: dict[str, Path], trainer: str) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", "log.jsonl"):
        shutil.copy(runs[trainer] / name, tmp_path / "run" / name)
    TRAINERS[trainer](tmp_path / "run", steps=4, checkpoint_every=2, log_every=1)
    tiny_run.assert_same_bits(runs[trainer], tmp_path / "run")


def test_an_entry_of_the_network_is_named_when_it_differs(tmp_path: Path, runs: dict[str, Path]) -> None:
    from dataclasses import replace

    out = shutil.copytree(runs["gan"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"^generator.channels: got 8, but the run in .* has 6; continue it with the same arguments"):
        tiny_gan.run(out, config=replace(tiny_gan.CONFIG, channels=8), steps=4)
