"""``python -m asyppo`` is the command ``asyppo``."""

import sys

from asyppo.cli import main

sys.exit(main())
