"""``asyppo compare``: a grid of configurations × seeds, run to the end in pieces, as one table and one figure."""

from asyppo.compare.command import compare

__all__ = ["compare"]
