"""Pictures and labels that come as numpy arrays: what is accepted, and how they become tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_images(name: str, images: Any) -> None:
    """Raises ValueError unless ``images`` are (N, H, W) or (N, C, H, W) uint8, N at least 1. Any strides, writable or not."""
    supported = "a numpy array, uint8 of shape (N, H, W) or (N, C, H, W), N at least 1"
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{name}: got a {type(images).__name__}, supported: {supported}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"{name}: got {images.dtype} of shape {images.shape}, supported: {supported}")


def check_labels(name: str, labels: Any, count: int, classes: int) -> None:
    """Raises ValueError unless ``labels`` are None or integers of shape (count,), each in [0, classes)."""
    if labels is None:
        return
    if not classes:
        raise ValueError(f"labels of {name}: got labels, supported: None, as this network has num_classes=0")
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        got = f"{labels.dtype}" if isinstance(labels, np.ndarray) else f"a {type(labels).__name__}"
        raise ValueError(f"labels of {name}: got {got}, supported: a numpy array of integers")
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= classes:
        extent = f", from {labels.min()} to {labels.max()}" if labels.size else ""
        raise ValueError(
            f"labels of {name}: got shape {labels.shape}{extent}, supported: one an image ({count}), each from 0 to {classes - 1}"
        )


def picture_tensor(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, ...) uint8 of any strides -> (B, ...) float32 in [-1, 1], contiguous."""
    own = np.array(images, order="C")  # torch takes neither negative strides nor, without a warning, read-only memory
    return torch.from_numpy(own).to(device).float() / 127.5 - 1


def label_tensor(labels: NDArray[np.integer[Any]]) -> Tensor:
    """Integers of any dtype and strides -> int64 on the CPU."""
    return torch.from_numpy(np.array(labels, np.int64, order="C"))
