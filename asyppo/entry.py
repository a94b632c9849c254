"""The command ``asyppo``, where the distribution may have been installed without what the command needs."""

from __future__ import annotations

import sys

from asyppo.extras import advice


def main() -> int:
    """``asyppo.cli.main``; 2, and one line of what to install, where the extra ``[train]`` is not there."""
    try:
        from asyppo.cli import main as run

        return run()
    except ModuleNotFoundError:
        if not (said := advice("train")):
            raise
        print(f"asyppo: error: {said}", file=sys.stderr)
        return 2
