"""Phalanx for Python: plans as dicts, journals of runs as dicts, prepared data as numpy arrays.

The program itself is installed beside it as ``phalanx``; see ``phalanx --help``.
"""

from ._phalanx import Dataset, Tokens, read_journal
from ._program import decide, inference, path, plan, run

__all__ = ["Dataset", "Tokens", "decide", "inference", "path", "plan", "read_journal", "run"]
