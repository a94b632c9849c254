"""A trainer's environment may have another package called ``tests``, so files here import each other by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
