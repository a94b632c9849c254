"""Importing this turns ``asyppo_kernels.integrations.verl`` on: ``VERL_USE_EXTERNAL_MODULES`` imports what it names.

As an entry point of ``verl.plugins`` it waits to be named in ``VERL_USE_EXTERNAL_PLUGINS``: that asyppo is installed
beside verl is no reason to change what verl computes. verl swallows a plugin's error, so this prints it, too.
"""

from __future__ import annotations

import os
import sys

from asyppo_kernels.integrations import verl

NAME = "asyppo"  # of the entry point


def _named(variable: str, name: str) -> bool:
    return name in (part.strip() for part in os.environ.get(variable, "").split(","))


if _named("VERL_USE_EXTERNAL_PLUGINS", NAME) or _named("VERL_USE_EXTERNAL_MODULES", __name__):
    try:
        verl.enable()
    except Exception as error:
        print(f"asyppo_kernels: off in verl: {error}", file=sys.stderr)
        raise
