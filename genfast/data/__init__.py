"""Real data sets that can be had from package mirrors, and their loaders."""

from genfast.data.sets import DATASETS, Dataset, dataset, directory, fetch, hold_out, load

__all__ = ["DATASETS", "Dataset", "dataset", "directory", "fetch", "hold_out", "load"]
