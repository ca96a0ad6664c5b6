"""From samples to files that people open, each with its provenance inside."""

from genfast.media.pictures import encoded, format_of, grid, pixels, write

__all__ = ["encoded", "format_of", "grid", "pixels", "write"]
