"""torchrl: its vectorised GAE."""

from __future__ import annotations

from bench.cases import Case, Inputs, Outputs, Run
from bench.registry import Absent, contender, need


@contender("ensemble_gae", "torchrl vectorised", less="one critic: mean and std are plain torch before it")
def vectorised_gae(case: Case) -> Run:
    """Once, or twice where the two lambdas differ; padding is a trajectory that has ended."""
    if case.options["holes"]:
        raise Absent("knows no masked steps between valid ones")
    function = need("torchrl.objectives.value.functional").vec_generalized_advantage_estimate
    gamma, lam, value_lam = (float(case.options[name]) for name in ("gamma", "lam", "value_lam"))

    def run(inputs: Inputs) -> Outputs:
        mask = inputs["mask"]
        mean, std = (x * mask for x in (inputs["value"].mean(0), inputs["value"].std(0, correction=0)))
        following = mean.roll(-1, dims=1)
        done = ~mask.roll(-1, dims=1)
        done[:, -1] = True
        columns = [x.unsqueeze(-1) for x in (mean, following, inputs["reward"] * mask, done, done)]
        advantage, returns = function(gamma, lam, *columns)
        if value_lam != lam:
            _, returns = function(gamma, value_lam, *columns)
        outputs = {"advantage": advantage.squeeze(-1) * mask, "returns": returns.squeeze(-1) * mask}
        return outputs | {"mean": mean, "std": std}

    return run
