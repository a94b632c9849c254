"""One rank of the multi-process tests of ``agreement_masks``: ``agreement_rank.py RANK WORLD FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from asyppo_kernels import agreement_masks


def main(rank: int, world: int, folder: Path) -> None:
    """Run every case of ``cases.pt`` on this rank's shards and save what came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = []
    compiled = torch.compile(agreement_masks, fullgraph=True, backend="aot_eager")
    for case in torch.load(folder / "cases.pt"):
        std, mask = case["shards"][rank]
        settings = {**case["fractions"], "group": dist.group.WORLD, "backend": case["backend"]}
        out = agreement_masks(std, mask, **settings)
        if case["compiled"]:
            again = compiled(std, mask, **settings)
            assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
        results.append(tuple(out))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
