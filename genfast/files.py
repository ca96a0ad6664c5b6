"""Files that are whole or absent, and tensors in files that notice their own damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_BLANK = "0" * 64  # stands for the checksum while it is computed


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replace ``path`` by ``content``: after a kill at any moment the file holds the old bytes or the new ones, whole.

    With ``previous`` the old file is kept there. Raises OSError with ``path`` as its file name, and ``path`` is then what it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()  # on a full disk it would stand in the way of everything else
        raise OSError(error.errno, error.strerror, str(path)) from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def pack(tensors: Mapping[str, Tensor], key: str, words: Any) -> bytes:
    """A safetensors file of ``tensors`` whose metadata hold the JSON-able ``words`` under ``key``, with the SHA-256 of the whole file.

    The checksum is that of the file with 64 zeros in the checksum's place.
    """
    text = json.dumps({"sha256": _BLANK, "words": words})
    apart: dict[str, Tensor] = {}
    seen = set()
    for name, t in tensors.items():
        whole = t.detach().contiguous()
        memory = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if memory in seen else whole  # safetensors takes no two names of the same memory, such as tied weights
        seen.add(memory)
    content = save(apart, {key: text})  # one key: safetensors shuffles several
    return content.replace(_BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def unpack(path: Path, key: str, name: str = "path") -> tuple[dict[str, Tensor], Any]:
    """What `pack` packed: (tensors on the CPU, words). The words are None where the file's metadata have nothing under ``key``.

    A file of an older version, without a checksum, is taken as it is. ``name`` is what errors call the file. Raises
    FileNotFoundError if there is no such file, and ValueError if it is not a safetensors file or not what was written.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file():
        raise ValueError(f"{name}: got {path}, which is not a regular file, supported: a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
            tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{name}: got {path}, which is not a safetensors file or is damaged ({error})") from None
    if text is None:
        return tensors, None
    try:
        words = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: got {path}, whose description is damaged ({error})") from None
    if not isinstance(words, dict) or "words" not in words:
        return tensors, words
    if words.get("sha256") != _checksum(path, str(words.get("sha256"))):
        raise ValueError(f"{name}: got {path}, which is damaged: its content does not have the checksum that was written with it")
    return tensors, words["words"]


def _checksum(path: Path, written: str) -> str:
    """The SHA-256 of a file with zeros in the place of the checksum ``written`` in its header."""
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        digest = hashlib.sha256(start + header.replace(written.encode(), _BLANK.encode(), 1))
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
