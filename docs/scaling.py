"""Write the tables of docs/scaling.md: ``python docs/scaling.py``. Nothing in them is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from asyppo.cli.main import parse
from asyppo.cli.plan import GIB, fits_table, make_plan
from asyppo.config import AsyPPOConfig

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- tables: begin, written by docs/scaling.py -->\n", "<!-- tables: end -->\n"

CONFIGURATIONS = ("qwen3-4b", "qwen3-8b", "qwen3-14b")
GPUS = (1, 8, 64)
GPUS_A_NODE = 8
PROMPT = 1024  # tokens

# What the seconds are computed with: a GPU's rate in bfloat16 matrix products as training reaches it, and what one GPU
# receives within a node and from other nodes.
FLOPS = 400e12
WITHIN, BETWEEN = 300e9, 40e9  # bytes a second
FITS = """## What fits where

GiB that each GPU needs, 10 % of it left free, and what has to be set for that beside how the policy and the critics are
trained: 8-bit moments are `optim: adamw_8bit`; LoRA is `policy.use_peft` and `critic.lora_r`, both of rank 16; QLoRA
adds `load_in_4bit` to both, and each GPU has all that is frozen. `offload` and `shard_single`
(`distributed.shard_single`) leave results as they are, the latter up to bfloat16's rounding; "at once" is
`generation_batch_size`, by which the key-value cache grows. What costs least time is tried first. `asyppo plan --fits`
prints the table of a configuration, `asyppo plan --gpus N --memory GIB` says what to set for a machine.
"""

ELEMENT, FLOAT = 2, 4  # bytes of compute weights and of gradients' sums


@dataclass(frozen=True)
class Traffic:
    """What one GPU receives in one step, in bytes, and the arithmetic it does, generation aside."""

    within: float
    """From the GPUs that hold one copy of the weights with it."""
    between: float
    """From other copies."""
    batch: float
    """Of the batch: log-probs and values of all responses."""
    flop: float

    def seconds(self, gpus: int) -> float:
        """Of communication, one thing after another."""
        far = BETWEEN if gpus > GPUS_A_NODE else WITHIN
        return self.within / WITHIN + (self.between + self.batch) / far

    @property
    def arithmetic(self) -> float:
        """Seconds of arithmetic."""
        return self.flop / FLOPS


def traffic(config: AsyPPOConfig, policy: int, critic: int, gpus: int) -> Traffic:
    """Count one step of ``config``, every response as long as it may be, for models of so many parameters.

    A forward pass gathers each weight once, a backward pass gathers it again and sums its gradient; both are done for
    every micro-batch.
    """
    replicas, critics = max(1, gpus // GPUS_A_NODE), config.num_critics
    shards = gpus // replicas
    responses = config.prompts_per_step * config.num_generations
    tokens = responses * (PROMPT + config.max_completion_length) / gpus

    def micro_batches(passes: int, tokens: float) -> int:
        return passes * max(1, math.ceil(tokens / passes / config.max_tokens_per_micro_batch))

    def ring(parts: int) -> float:  # the part of a tensor that a GPU receives to gather it, or to sum it
        return (parts - 1) / parts

    minibatches = config.num_iterations * config.num_mini_batches
    own_minibatches = config.critic.num_iterations * config.critic.num_mini_batches
    scoring = micro_batches(1, tokens) * (2 if config.beta else 1)
    updating = micro_batches(minibatches, config.num_iterations * tokens)
    values = micro_batches(1, tokens * critics) if critics else 0
    fitting = micro_batches(own_minibatches, config.critic.num_iterations * tokens) if critics else 0
    update = 2 * ELEMENT + FLOAT
    within = policy * (ELEMENT * (1 + scoring) + update * updating)
    within += critics * critic * (ELEMENT * values + update * fitting)
    sums = 2 * FLOAT * (policy * minibatches + critics * critic * own_minibatches) / shards
    grids = 2 + (2 if config.beta else 0) + critics
    recompute = 2 if config.policy.gradient_checkpointing else 0
    flop = 2 * policy * (1 + bool(config.beta)) + (6 + recompute) * policy * config.num_iterations
    if critics:
        recompute = 2 if config.critic.gradient_checkpointing else 0
        flop += 2 * critics * critic + (6 + recompute) * critic * config.critic.num_iterations
    return Traffic(
        within=ring(shards) * within,
        between=ring(replicas) * sums,
        batch=2 * ring(gpus) * FLOAT * grids * responses * config.max_completion_length,
        flop=tokens * flop,
    )


def tables() -> str:
    """Return the tables as Markdown."""
    fits = []
    memory = [
        "| policy and critics | GPUs | copies × shards | peak | in the phase |",
        "|---|---|---|---|---|",
    ]
    communication = [
        "| policy and critics | GPUs | received within a node | between nodes | communication | arithmetic "
        "| communication's part |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CONFIGURATIONS:
        config = parse(["train", "--config", name])
        fits += [f"### `{name}`", "", *fits_table(config, prompt_length=PROMPT), ""]
        for gpus in GPUS:
            replicas = max(1, gpus // GPUS_A_NODE)
            config = replace(config, distributed=replace(config.distributed, replicate=replicas))
            plan = make_plan(config, gpus=gpus, prompt_length=PROMPT)
            policy, critic = (model.parameters for model in plan.models)
            phase, peak = plan.peak
            memory.append(f"| `{name}` | {gpus} | {replicas} × {gpus // replicas} | {peak / GIB:.0f} GiB | {phase} |")
            if gpus == 1:
                continue
            found = traffic(config, policy, critic, gpus)
            far = found.between + (found.batch if replicas > 1 else 0)
            near = found.within + (found.batch if replicas == 1 else 0)
            part = found.seconds(gpus) / (found.seconds(gpus) + found.arithmetic)
            communication.append(
                f"| `{name}` | {gpus} | {near / GIB:,.0f} GiB | {far / GIB:,.0f} GiB | {found.seconds(gpus):,.0f} s "
                f"| {found.arithmetic:,.0f} s | {100 * part:.0f} % |"
            )
    return "\n".join([*memory, "", *communication, "", FITS, "", *fits])


def with_tables(text: str) -> str:
    """Return the page's text with the tables between the two marks as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE.name} lacks its marks"
    return before + BEGIN + "\n" + tables() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
