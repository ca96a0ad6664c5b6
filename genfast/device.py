"""Where to run."""

from __future__ import annotations

import torch


def usable(name: str | None, argument: str = "--device") -> str:
    """``name``, once something has been put there; None stands for cuda where torch sees one, else cpu.

    Raises ValueError for a device that torch does not have here, and for one that genfast has no kernels for.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError(f"genfast has no kernels for {name}")
        torch.zeros(1, device=name)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch without CUDA answers with an AssertionError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{argument}: got {name!r}, supported on this machine: {', '.join(there)} ({reason})") from error
    return name
