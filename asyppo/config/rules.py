"""What has to hold between settings: the errors of a configuration whose fields are each allowed by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyppo.algorithm.algorithms import ALGORITHMS
from asyppo.config.setting import need

if TYPE_CHECKING:
    from asyppo.config.schema import AsyPPOConfig


def check_rules(config: AsyPPOConfig) -> None:
    """Raise ConfigError naming the first setting that cannot work beside others."""
    _check_critics(config)
    _check_losses(config)
    _check_signal(config)
    _check_data(config)
    _check_rewards(config)
    _check_groups(config)
    _check_steps(config)


def _check_critics(config: AsyPPOConfig) -> None:
    need(
        config.critic.lora_r == 0 or config.critic.stacked,
        "critic.lora_r",
        config.critic.lora_r,
        "0 with critic.stacked False: adapters share a backbone, which is computed for all of them at once",
    )
    _check_side_critics(config)
    need(
        config.critic.lora_r > 0 or not config.critic.load_in_4bit,
        "critic.load_in_4bit",
        config.critic.load_in_4bit,
        "False without critic.lora_r: weights in 4 bits are not trained, adapters on them are",
    )
    need(
        config.critic.cliprange_value is None or config.critic.loss == "mse",
        "critic.cliprange_value",
        config.critic.cliprange_value,
        "none with critic.loss 'bce', whose gradient is bounded as it is",
    )
    need(
        sorted(config.critic.policy_inputs) in ([], ["entropy"], ["entropy", "logprob"], ["logprob"]),
        "critic.policy_inputs",
        config.critic.policy_inputs,
        "a list of logprob, entropy, each at most once",
    )


def _check_side_critics(config: AsyPPOConfig) -> None:
    critic = config.critic
    need(
        critic.side.width % 32 == 0,
        "critic.side.width",
        critic.side.width,
        "a multiple of 32: it has four heads, and attention on GPUs takes multiples of 8 in each",
    )
    need(len(critic.side.layers) > 0, "critic.side.layers", critic.side.layers, "a list of at least one layer")
    if critic.kind == "mini":
        return
    algorithm = config.resolved_algorithm.critics
    need(
        algorithm != "policy",
        "critic.kind",
        critic.kind,
        f"'mini' for algorithm {config.algorithm}, whose critic is of the policy's size",
    )
    need(
        critic.lora_r == 0,
        "critic.lora_r",
        critic.lora_r,
        "0 with critic.kind 'side': such critics are small themselves",
    )
    need(
        critic.stacked,
        "critic.stacked",
        critic.stacked,
        "True with critic.kind 'side': such critics are computed together",
    )


def _check_losses(config: AsyPPOConfig) -> None:
    algorithm = config.resolved_algorithm
    need(
        config.delta is None or config.delta > 1 + config.epsilon_high,
        "delta",
        config.delta,
        f"more than 1 + epsilon_high = {1 + config.epsilon_high:g}, or none",
    )
    need(
        config.beta > 0 or not config.use_kl_in_reward,
        "use_kl_in_reward",
        config.use_kl_in_reward,
        f"a beta above 0, got {config.beta}",
    )
    need(
        config.overlong_buffer_len < config.max_completion_length,
        "overlong_buffer_len",
        config.overlong_buffer_len,
        f"less than max_completion_length = {config.max_completion_length}",
    )
    need(
        config.scale_rewards == "group" or algorithm.scales_rewards,
        "scale_rewards",
        config.scale_rewards,
        f"an algorithm that scales rewards, such as grpo; {config.algorithm} does not",
    )


def _check_signal(config: AsyPPOConfig) -> None:
    algorithm = config.resolved_algorithm
    need(
        config.length_adaptive_alpha is None or config.num_critics > 0,
        "length_adaptive_alpha",
        config.length_adaptive_alpha,
        f"a critic, algorithm {config.algorithm} has none",
    )
    need(
        algorithm.values is None or algorithm.critics == "none",
        "algorithm",
        config.algorithm,
        f"values of its own or {algorithm.critics} critics, not both",
    )
    masks = config.num_critics > 0 or algorithm.values is not None or config.algorithm not in ALGORITHMS
    for name in ("advantage_mask", "advantage_mask_skip"):
        got = getattr(config, name)
        need(
            masks or got == getattr(type(config), name),
            name,
            got,
            f"a critic, algorithm {config.algorithm} has none and masks nothing",
        )
    need(
        config.advantage_values == "after"
        or config.num_critics >= (2 if config.advantage_values == "cross_fit" else 1)
        or (config.monte_carlo_values and (algorithm.monte_carlo or config.algorithm not in ALGORITHMS)),
        "advantage_values",
        config.advantage_values,
        f"{'two critics' if config.advantage_values == 'cross_fit' else 'a critic'}, "
        f"algorithm {config.algorithm} has {config.num_critics} here"
        + ("; vineppo takes values from continuations without any" if config.monte_carlo_values else ""),
    )
    need(
        config.gamma == 1 or not config.monte_carlo_values or not config.monte_carlo.sparse,
        "gamma",
        config.gamma,
        "1 for values from continuations, or monte_carlo.every 1: it would count states, not tokens",
    )
    need(
        config.advantage_values != "cross_fit" or config.critic.share == "disjoint",
        "advantage_values",
        config.advantage_values,
        f"critic.share 'disjoint', got {config.critic.share!r}: it leaves out the critic that learned from a "
        "response, and here all did",
    )
    need(
        all(config.monte_carlo.boundaries),
        "monte_carlo.boundaries",
        config.monte_carlo.boundaries,
        "texts that are not empty",
    )


def _check_data(config: AsyPPOConfig) -> None:
    data = config.data
    for name, other, there in (
        ("dataset_config", "dataset_name", data.dataset_name),
        ("eval_dataset_config", "eval_dataset_name", data.eval_dataset_name),
        ("dataset_test_split", "dataset_name", data.dataset_name or data.eval_dataset_name),
    ):
        got = getattr(data, name)
        need(got is None or there is not None, f"data.{name}", got, f"a data.{other} beside it")
    need(data.dataset_name is None or not data.tasks, "data.tasks", data.tasks, "none beside data.dataset_name")


def _check_rewards(config: AsyPPOConfig) -> None:
    need(
        config.environment_credit == "keep" or config.num_critics > 0,
        "environment_credit",
        config.environment_credit,
        f"a critic, algorithm {config.algorithm} has none that knows what was to be expected",
    )
    need(
        bool(config.reward_funcs) or config.environment.given,
        "reward_funcs",
        config.reward_funcs,
        "at least one, or an environment that gives rewards",
    )
    if config.environment.given:
        check_environment(config)


def check_environment(config: AsyPPOConfig) -> None:
    """Raise ConfigError where a setting cannot work beside an environment."""
    need(
        config.async_generation == 0,
        "async_generation",
        config.async_generation,
        "0 with an environment, whose answers come between the turns",
    )
    need(
        not config.monte_carlo_values,
        "advantage_values" if config.advantage_values == "monte_carlo" else "algorithm",
        config.advantage_values if config.advantage_values == "monte_carlo" else config.algorithm,
        "values of critics or of groups with an environment: its state cannot be gone back to for continuations",
    )
    need(
        config.max_completion_length >= 3,
        "max_completion_length",
        config.max_completion_length,
        "at least 3 with an environment: a token of a turn, one of an answer and one of the next turn",
    )


def _check_groups(config: AsyPPOConfig) -> None:
    need(
        config.num_generations >= config.num_critics or config.critic.share == "all",
        "num_generations",
        config.num_generations,
        f"at least critic.num_critics = {config.num_critics}, so that every critic sees every prompt",
    )
    need(
        config.num_generations >= 2 or not config.resolved_algorithm.compares_group,
        "num_generations",
        config.num_generations,
        f"at least 2 for algorithm {config.algorithm}, which compares the responses of one prompt",
    )
    need(
        config.num_generations >= 2 or not config.dynamic_sampling,
        "dynamic_sampling",
        config.dynamic_sampling,
        "num_generations of at least 2: one response has no reward to compare with",
    )


def _check_steps(config: AsyPPOConfig) -> None:
    need(
        all(url.startswith(("http://", "https://")) for url in config.vllm.url),
        "vllm.url",
        config.vllm.url,
        "addresses such as http://127.0.0.1:8000",
    )
    need(
        not (config.async_generation and config.dynamic_sampling),
        "async_generation",
        config.async_generation,
        "0 with dynamic_sampling, which samples again by the rewards of a batch",
    )
    need(
        not (config.async_generation and config.vllm.sleep_level),
        "async_generation",
        config.async_generation,
        "vllm.sleep_level 0: the engine samples while the trainer updates",
    )
    need(
        config.num_mini_batches <= config.prompts_per_step * config.num_generations,
        "num_mini_batches",
        config.num_mini_batches,
        "at most prompts_per_step * num_generations",
    )
    need(
        config.eval.min_gain is None or config.data.eval_size != 0,
        "data.eval_size",
        config.data.eval_size,
        "at least 1 held-out prompt for eval.min_gain",
    )
    need(
        config.eval.min_gain is None or config.eval.on_start,
        "eval.min_gain",
        config.eval.min_gain,
        "eval.on_start, which it is the gain over",
    )
