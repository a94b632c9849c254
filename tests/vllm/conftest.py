"""Tests on vLLM itself, in the environment that ``make test-vllm`` makes; elsewhere there are none."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
