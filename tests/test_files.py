from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from genfast.files import pack, unpack, write_atomically

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.tensor([1, -1]),
    "d": torch.zeros(0, 3),
    "e": torch.tensor([True, False]),
}
WORDS = {"step": 3, "name": "größer", "zeros": "0" * 64}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(t, found[name]) and t.dtype == found[name].dtype for name, t in TENSORS.items()
    )


def test_what_was_packed_comes_back_and_packing_is_a_function(tmp_path: Path) -> None:
    content = pack(TENSORS, "state", WORDS)
    assert content == pack(TENSORS, "state", WORDS)
    (tmp_path / "f").write_bytes(content)
    tensors, words = unpack(tmp_path / "f", "state")
    assert same(tensors) and words == WORDS
    assert unpack(tmp_path / "f", "another key")[1] is None


@pytest.mark.parametrize("bit", [0, 5])
def test_one_wrong_bit_anywhere_is_noticed(tmp_path: Path, bit: int) -> None:
    """A changed file is refused, or has nothing under the key; it never gives other tensors or words."""
    content = pack(TENSORS, "state", WORDS)
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (tmp_path / "f").write_bytes(damaged)
        try:
            _, words = unpack(tmp_path / "f", "state")
        except ValueError as error:
            refused += 1
            assert "f" in str(error) and "\n" not in str(error)
        else:
            assert words is None or ("words" not in words and "step" not in words), (place, words)
    assert refused > 0.95 * len(content)


def test_bytes_exchanged_added_or_cut_are_noticed(tmp_path: Path) -> None:
    content = pack({"x": torch.arange(1000)}, "state", WORDS)
    for damaged in (content[:-1], content + b"\0", content[:-16] + content[-8:] + content[-16:-8], content[:100], b""):
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint: got .*damaged"):
            unpack(tmp_path / "f", "state", "checkpoint")


def test_files_without_a_checksum_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(save({"x": torch.ones(2)}, {"state": json.dumps({"step": 7})}))
    tensors, words = unpack(tmp_path / "old", "state")
    assert tensors["x"].tolist() == [1, 1] and words == {"step": 7}
    (tmp_path / "bare").write_bytes(save({"x": torch.ones(2)}))
    assert unpack(tmp_path / "bare", "state")[1] is None


def test_what_is_no_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        unpack(tmp_path / "none", "state")
    with pytest.raises(ValueError, match="not a regular file"):
        unpack(tmp_path, "state")
    (tmp_path / "words").write_bytes(save({"x": torch.ones(2)}, {"state": "{"}))
    with pytest.raises(ValueError, match="description is damaged"):
        unpack(tmp_path / "words", "state")


def test_a_failed_write_leaves_the_old_files_and_no_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the new content is flushed."""
    path, previous = tmp_path / "file", tmp_path / "file.previous"
    for content in (b"first", b"second"):
        write_atomically(path, content, previous)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr("os.fsync", full)
        write_atomically(path, b"third", previous)
    assert caught.value.filename == str(path)
    assert (path.read_bytes(), previous.read_bytes()) == (b"second", b"first") and len(list(tmp_path.iterdir())) == 2
