"""Build information and host-side noise of genfast (pybind11)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str
cuda_archs: str
nvcc_version: str
compiler: str
torch_target: str

def kernels() -> list[dict[str, Any]]: ...
def normal(seed: int, count: int, draw: int = 0, stream: int = 0, start: int = 0) -> NDArray[np.float32]: ...
def uniform(seed: int, count: int, draw: int = 0, stream: int = 0, start: int = 0) -> NDArray[np.float32]: ...
