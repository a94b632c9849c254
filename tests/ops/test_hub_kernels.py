"""The ops as ``kernels`` loads them from a repository of the hub: by path, under a name of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".cache" / "hub"  # transformers looks for a package `kernels`, so it is not installed beside it

LOAD = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("asyppo", "asyppo_kernels"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch
from kernels import get_local_kernel

ops = get_local_kernel(Path(sys.argv[1]), backend="cpu")
torch.manual_seed(0)
row, hidden, weight = torch.ones(6), torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
results = []
for backend in ("torch", "triton"):  # in Triton's interpreter
    out = ops.linear_ppo_loss(hidden, weight, torch.arange(6), -2.4 * row, row, row, entropy_coef=0.1, backend=backend)
    logprob = ops.linear_logprob(hidden, weight, torch.arange(6), backend=backend).logprob
    results.append((out.logprob, logprob, *torch.autograd.grad(out.loss + logprob.sum(), hidden)))
for other in results:
    torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)
torch.testing.assert_close(out.logprob, (hidden @ weight.T).log_softmax(-1).diagonal(), atol=1e-5, rtol=1e-5)
std = torch.rand(2, 5)
assert ops.agreement_masks(std, std >= 0, backend="triton").advantage_keep.sum() == 8
gae = ops.ensemble_gae(torch.rand(2, 2, 5), std, std >= 0)
assert gae.advantage.isfinite().all()
assert hasattr(getattr(torch.ops, ops.__name__), "linear_ppo_loss") and not hasattr(torch.ops.asyppo, "linear_ppo_loss")
from kernels._rust import Metadata

for backend in ("cpu", "cuda", "rocm"):
    metadata = Metadata.read_from_file(Path(sys.argv[1]) / "build" / f"torch-{backend}" / "metadata.json")
    assert str(metadata.backend.backend_type).lower().endswith(backend)
print(ops.__name__)
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_kernels", ROOT / "tools" / "hub_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kernels_loads_it_where_asyppo_is_not_installed(script: ModuleType, tmp_path: Path) -> None:
    if not LIBRARY.is_dir():
        pytest.skip("needs the package kernels in .cache/hub: make .cache/hub")
    script.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(LIBRARY), "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("asyppo_kernels_cpu_")


def test_every_file_is_rewritten_or_refused(script: ModuleType, tmp_path: Path) -> None:
    folders = script.build(tmp_path)
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    ids = set()
    for folder in folders:
        texts = [path.read_text() for path in folder.rglob("*.py")]
        assert len(texts) == len(script.sources())
        assert not any("asyppo::" in text or "import asyppo" in text or "from asyppo" in text for text in texts)
        ids.add((folder / "metadata.json").read_text())
    assert len(ids) == 3
    for text in ("import asyppo_kernels", "importlib.import_module(name or 'asyppo_kernels.x')"):
        with pytest.raises(ValueError, match=r"op\.py:1: got 'asyppo_kernels"):
            script.rewritten(text, Path("room/op.py"), "name")
