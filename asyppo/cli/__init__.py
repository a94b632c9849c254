"""The command line: commands, the trainer they build, the memory they plan."""

from asyppo.cli.main import main, parse

__all__ = ["main", "parse"]
