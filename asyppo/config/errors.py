"""The error that a setting, a file or an argument gets which cannot work."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, what it got and what it needs."""

    exit_status = 2
    """What the command line returns for it, after one line; errors without this attribute show their traceback."""
