"""Triton kernels run on CPU here: the interpreter has to be asked for before anything imports triton.

With ASYPPO_TEST_DEVICE=cuda they run on the GPU, and so do the tests of the ops.
"""

import os

from hypothesis import settings

if os.environ.get("ASYPPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same cases in every run; `pytest --hypothesis-profile default` draws new ones.
settings.register_profile("same cases", derandomize=True)
settings.load_profile("same cases")
