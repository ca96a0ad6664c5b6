"""Real data sets that can be had from package mirrors, their loaders, and data of your own as samples for a trainer."""

from genfast.data.samples import ArraySamples, Batch, PaddedSamples, Samples, open_samples
from genfast.data.sets import DATASETS, Dataset, dataset, directory, fetch, hold_out, load

__all__ = [
    "DATASETS", "ArraySamples", "Batch", "Dataset", "PaddedSamples", "Samples", "dataset", "directory", "fetch", "hold_out", "load",
    "open_samples",
]  # fmt: skip
