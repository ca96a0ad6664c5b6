"""From samples to files that people open, each with its provenance inside."""

from genfast.media.pictures import encoded, grid, pixels, write

__all__ = ["encoded", "grid", "pixels", "write"]
