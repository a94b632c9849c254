"""What to set for a configuration to fit, and a table of what fits where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from asyppo.cli.plan.estimate import GIB, Plan, make_plan
from asyppo.config import AsyPPOConfig
from asyppo.models.optimizers import Optim

Level = Literal["none", "optimizer", "all"]

FREE = 0.9
"""What is left of a GPU's memory by what the plan does not count."""
CARDS = (24, 48, 80, 141)
"""GiB of the GPUs in the table."""
GPUS = (1, 2, 4, 8)
FEWEST = 4
"""Responses under way, at the least, in what is proposed."""

KINDS = ("full", "8-bit moments", "LoRA", "QLoRA")
"""Ways to train, of policy and critics alike, the most exact first."""
RANK = 16
"""Of adapters where the configuration has none."""


@dataclass(frozen=True)
class Way:
    """Settings with which a configuration fits, and its plan with them."""

    kind: str
    settings: dict[str, object]
    """Those that differ from the configuration's, by name."""
    plan: Plan


def of_kind(config: AsyPPOConfig, kind: str) -> AsyPPOConfig:
    """Return ``config`` trained in one of ``KINDS``, with the adapters that it has, if any."""
    optim: Optim = "adamw_8bit" if kind == "8-bit moments" else "adamw"
    adapted, in_4_bits = kind in ("LoRA", "QLoRA"), kind == "QLoRA"
    rank = config.policy.lora_r if config.policy.use_peft or not adapted else RANK
    policy = replace(config.policy, use_peft=adapted, lora_r=rank, load_in_4bit=in_4_bits)
    rank = (config.critic.lora_r or RANK) if adapted else 0
    critic = replace(config.critic, optim=None, lora_r=rank, load_in_4bit=in_4_bits)
    return replace(config, optim=optim, policy=policy, critic=critic)


def kind_of(config: AsyPPOConfig) -> str:
    """Return which of ``KINDS`` the configuration is of, by its policy."""
    if config.policy.use_peft:
        return "QLoRA" if config.policy.load_in_4bit else "LoRA"
    return "8-bit moments" if config.optim == "adamw_8bit" else "full"


def fitting(config: AsyPPOConfig, kind: str, *, gpus: int, gib: float, prompt_length: int = 1024) -> Way | None:
    """Return the settings of least cost in time with which ``config``, trained in this ``kind``, fits GPUs of ``gib``
    GiB; None where there are none. What leaves results as they are is tried: ``offload``, weights that are gathered a
    layer at a time (``distributed.shard_single``), gradient checkpointing, and fewer responses at once."""
    wanted = config if kind == kind_of(config) else of_kind(config, kind)
    for changed in _cheapest_first(wanted, gpus):
        plan = make_plan(changed, gpus=gpus, prompt_length=prompt_length)
        if plan.peak[1] <= FREE * gib * GIB:
            return Way(kind, _differences(config, changed), plan)
    return None


def _cheapest_first(config: AsyPPOConfig, gpus: int) -> Iterator[AsyPPOConfig]:
    """Variants of ``config``, from the one that costs least time to the one that needs least memory: what moves takes
    seconds a step, fewer responses at once make as many more passes of a response's length."""
    single = [False, True] if gpus == 1 and not config.policy.use_peft else [config.distributed.shard_single]
    levels: list[Level] = ["none", "optimizer", "all"]
    most = config.generation_batch_size
    halves = [most >> n for n in range(most.bit_length()) if most >> n >= min(FEWEST, most)]
    for checkpointing in dict.fromkeys([config.policy.gradient_checkpointing, True]):
        policy = replace(config.policy, gradient_checkpointing=checkpointing)
        critic = replace(config.critic, gradient_checkpointing=checkpointing or config.critic.gradient_checkpointing)
        trained = replace(config, policy=policy, critic=critic)
        for together, offload, shard_single in product(halves, levels[levels.index(config.offload) :], single):
            distributed = replace(config.distributed, shard_single=shard_single)
            yield replace(trained, offload=offload, distributed=distributed, generation_batch_size=together)


def _differences(one: object, other: object, prefix: str = "") -> dict[str, object]:
    """Settings of ``other`` that differ from those of ``one``, by name."""
    found: dict[str, object] = {}
    for name, value in vars(other).items():
        before = getattr(one, name)
        if hasattr(value, "__dataclass_fields__") and before is not None:
            found |= _differences(before, value, f"{prefix}{name}.")
        elif value != before:
            found[prefix + name] = value
    return found


def advice(config: AsyPPOConfig, *, gpus: int, gib: float, prompt_length: int = 1024) -> str:
    """Return what to set for ``config`` to fit GPUs of ``gib`` GiB, each way to train on a line."""
    own = kind_of(config)
    here = f"{gpus} GPU{'s' * (gpus > 1)} of {gib:g} GiB"
    as_is = make_plan(config, gpus=gpus, prompt_length=prompt_length).peak[1]
    if as_is <= FREE * gib * GIB:
        return f"fits {here}: {as_is / GIB:.1f} GiB, and 10 % are left"
    lines = [f"does not fit {here}, of which 10 % are left free; it does with"]
    for kind in [own, *(k for k in KINDS if k != own)]:
        way = fitting(config, kind, gpus=gpus, gib=gib, prompt_length=prompt_length)
        if way is None:
            lines.append(f"  {kind}: nothing that is known here")
            continue
        settings = "  ".join(f"{name}: {str(value).lower()}" for name, value in way.settings.items())
        lines.append(f"  {kind}: {settings}  ({way.plan.peak[1] / GIB:.1f} GiB)")
    return "\n".join(lines)


def fits_table(config: AsyPPOConfig, *, prompt_length: int = 1024, cards: Sequence[int] = CARDS) -> list[str]:
    """Return a Markdown table of what fits where: ways to train, by GPUs and their memory."""
    rows = ["| trained | GiB of a GPU | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |"]
    rows.append("|---" * (2 + len(GPUS)) + "|")
    for kind in KINDS:
        for gib in cards:
            cells = [cell_of(config, kind, gpus=n, gib=gib, prompt_length=prompt_length) for n in GPUS]
            rows.append(f"| {kind} | {gib} | " + " | ".join(cells) + " |")
    return rows


def cell_of(config: AsyPPOConfig, kind: str, *, gpus: int, gib: float, prompt_length: int) -> str:
    """Return what a cell of the table says: the peak and what was set for it, or a dash."""
    way = fitting(config, kind, gpus=gpus, gib=gib, prompt_length=prompt_length)
    if way is None:
        return "—"
    said = [f"{way.plan.peak[1] / GIB:.0f}"]
    if "offload" in way.settings:
        said.append(f"offload {way.settings['offload']}")
    if way.settings.get("distributed.shard_single"):
        said.append("shard_single")
    if "generation_batch_size" in way.settings:
        said.append(f"{way.settings['generation_batch_size']} at once")
    return ", ".join(said)
