"""Triton kernels run on CPU here: the interpreter has to be asked for before anything imports triton.

With ASYPPO_TEST_DEVICE=cuda they run on the GPU, and so do the tests of the ops.
"""

import os

if os.environ.get("ASYPPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
