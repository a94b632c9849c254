"""``python -m asyppo`` is the command ``asyppo``."""

import os
import sys
import traceback

from asyppo.entry import main

if "TORCHELASTIC_RUN_ID" not in os.environ:
    sys.exit(main())

from asyppo.distributed.processes import leave

try:
    status = main()
except Exception:
    traceback.print_exc()
    status = 1
leave(status)
