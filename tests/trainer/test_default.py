"""The embedded default, made smaller: accuracy on held-out prompts rises."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyppo.cli.build import build_trainer
from asyppo.cli.main import parse


@pytest.mark.slow
def test_a_smaller_default_learns(tmp_path: Path) -> None:
    config = parse(["train"])
    config.output_dir = str(tmp_path / "runs")
    config.max_steps, config.eval.every = 60, 0
    config.prompts_per_step, config.num_generations, config.learning_rate = 64, 8, 3e-4
    config.data.task.params = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    config.data.train_size, config.data.eval_size = 2000, 128
    assert config.warm_start is not None
    config.warm_start.cache_dir = str(tmp_path / "cache")
    config.warm_start.steps, config.warm_start.batch_size = 500, 128
    for shape, width in ((config.warm_start.policy, 64), (config.warm_start.critic, 32)):
        shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = width, 3 * width, 2
    result = build_trainer(config).train()
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None
    # Seeds give 0.15 to 0.18; with 512 samples the difference has a standard error of about 0.025.
    assert result.accuracy_after - result.accuracy_before > 0.08, (result.accuracy_before, result.accuracy_after)
