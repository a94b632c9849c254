"""One rank of the fast multi-process test: ``communication_rank.py FOLDER``, under torchrun."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asyppo.config import ConfigError, DistributedConfig
from asyppo.distributed.processes import (
    agreed,
    divided,
    from_main,
    leave,
    make_mesh,
    own_randomness,
    processes,
    rank,
    sum_over_ranks,
    world_size,
)


def error_of(function: Callable[[], Any]) -> str:
    """What ``function`` raises."""
    try:
        return f"returned {function()!r}"
    except ConfigError as error:
        return str(error)


def only_on(number: int) -> str:
    """Fail on one rank."""
    if rank() == number:
        raise ConfigError(f"rank {number} failed")
    return f"rank {rank()} is well"


def failing_work(part: slice) -> list[str]:
    return [only_on(1)] * (part.stop - part.start)


def draw() -> float:
    return float(torch.rand(()))


def main(folder: Path) -> None:
    """Communicate, and write what was heard."""
    config = DistributedConfig(timeout_s=60)
    with processes(config):
        mesh = make_mesh(config, torch.device("cpu"))
        assert mesh is not None
        calls: list[int] = []
        torch.manual_seed(3)
        with own_randomness():
            own = draw()
        heard = {
            "mesh": [mesh.size(), *mesh.mesh_dim_names],
            "sum": sum_over_ranks(torch.tensor([1.0, float(rank())])).tolist(),
            "divided": divided(lambda part: [f"{i}@{rank()}" for i in range(7)[part]], "aabbbcc"),
            "few": divided(lambda part: [f"{i}@{rank()}" for i in range(3)[part]], "aaa"),
            "none": divided(lambda part: [1 / 0], ""),
            "work fails": error_of(lambda: divided(failing_work, "abcd")),
            "from main": from_main(lambda: calls.append(rank()) or f"from {rank()}"),
            "called": calls,
            "main fails": error_of(lambda: from_main(lambda: only_on(0))),
            "agreed": agreed(lambda: only_on(world_size())),
            "one fails": error_of(lambda: agreed(lambda: only_on(1))),
            "own numbers": own,
            "common numbers": draw(),
        }
        (folder / f"rank{rank()}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
