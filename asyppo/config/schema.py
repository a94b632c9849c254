"""Every setting of a run, as one dataclass tree: what ``asyppo train --help`` prints and a YAML file fills. The
branches of the tree stand in ``branches/``, what has to hold between settings in ``rules``.

Fields that TRL has carry TRL's names. "Our choice" marks what the AsyPPO paper (arXiv 2510.01656) leaves open;
"the paper's" marks what it states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from asyppo.algorithm.algorithms import ALGORITHMS, Algorithm
from asyppo.config import rules
from asyppo.config.branches.critic import CriticConfig, SideConfig
from asyppo.config.branches.data import DataConfig, TaskConfig
from asyppo.config.branches.distributed import DistributedConfig
from asyppo.config.branches.environment import EnvironmentConfig
from asyppo.config.branches.evaluation import EvalConfig
from asyppo.config.branches.monte_carlo import MonteCarloConfig
from asyppo.config.branches.policy import PolicyConfig
from asyppo.config.branches.vllm import VLLMConfig
from asyppo.config.branches.warm_start import ModelShape, WarmStartConfig
from asyppo.config.references import resolve
from asyppo.config.setting import check, one_or_list, setting

__all__ = [
    "AsyPPOConfig",
    "CriticConfig",
    "DataConfig",
    "DistributedConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "ModelShape",
    "MonteCarloConfig",
    "PolicyConfig",
    "SideConfig",
    "TaskConfig",
    "VLLMConfig",
    "WarmStartConfig",
]


@dataclass
class AsyPPOConfig:
    """A training run."""

    algorithm: str = "asyppo"
    """``asyppo``: mini-critics on disjoint shares. ``ppo``: one critic of the policy's size. Without a critic:
    ``grpo``, the reward normalised within each prompt's group; ``rloo``, less the mean of the group's others;
    ``reinforce++``, normalised over the batch; ``vineppo``, with values from continuations (``monte_carlo``). Or one's
    own, ``module:name`` or ``path.py:name``: a function from ``Outcome`` and ``AdvantageOptions`` to a
    ``LearningSignal``, or an ``Algorithm``, which may have critics."""
    seed: int = 0
    """Seed of everything random in training. Evaluation has its own."""
    max_steps: int = setting(100, at_least=1, may_change=True, elsewhere=("num_train_epochs", "total_training_steps"))
    """Training steps; each samples one batch of responses."""
    output_dir: str = setting("runs", may_change=True)
    """Directory in which each run makes its own."""
    run_name: str | None = setting(None, may_change=True)
    """Name of the run's directory; None makes a unique one."""
    resume: bool = False
    """Go on with the run named ``run_name`` from its last checkpoint; without such a run, start it."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", may_change=True)
    """``auto`` takes a GPU if there is one."""
    save_steps: int = setting(0, at_least=0, may_change=True)
    """Save a checkpoint every n steps; 0: only at the end, and when a signal stops the run."""
    save_total_limit: int | None = setting(None, at_least=1, may_change=True)
    """Checkpoints kept: the last n, and the one with the best ``eval/accuracy`` among those saved at a step that was
    also evaluated. None keeps all."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", may_change=True)
    """Precision of the models in a checkpoint. ``auto``: bfloat16 where the weights came from bfloat16, or else
    float32. What training goes on from is float32 in any case."""
    save_async: bool = setting(True, may_change=True)
    """Write checkpoints while training goes on, from a copy in the host's memory (pinned, of what is on a GPU): 12
    bytes a parameter that is trained, and the models in ``save_dtype``. One at a time; the last is waited for. False:
    the next step waits until it is written."""
    logging_samples: int = setting(16, at_least=0, may_change=True)
    """Samples written to ``samples.jsonl`` each step, spread over its prompts, with the values, advantages and
    log-probs of each token."""
    log_completions: bool = setting(True, may_change=True)
    """Print samples of a step with their rewards as a table, as TRL's ``log_completions``; of those that
    ``logging_samples`` writes."""
    log_completions_steps: int = setting(10, at_least=1, may_change=True)
    """Print them after the first step and every n steps."""
    num_completions_to_print: int | None = setting(1, at_least=1, may_change=True)
    """Samples a table, TRL's ``num_completions_to_print``; None: all that are written."""
    diagnostics_steps: int = setting(0, at_least=0, may_change=True)
    """Every n steps also measure what fraction of the policy gradient's norm each mask removes, by four more backward
    passes; 0: never. Our choice."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        factory=lambda: ["tensorboard"], may_change=True
    )
    """Where metrics go besides ``metrics.jsonl``. ``wandb`` and ``trackio`` have to be installed."""
    max_skipped_steps: int = setting(3, at_least=1, may_change=True)
    """Stop with an error, after saving a checkpoint, when so many steps in a row had a non-finite loss or gradient, or
    responses that were not sampled from the policy (``sampling_logp_tolerance``)."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """An environment or tools, for responses of several turns."""
    reward_funcs: list[str] = setting(factory=lambda: ["reasoning_gym"])
    """Reward functions: ``reasoning_gym``, ``exact_match``, ``math_verify``, one's own as ``module:function`` or
    ``path.py:function``, in TRL's signature, or a sequence classifier by directory or hub name. Right, for the
    accuracy, is what gets a 1 from the first of them that has a reward for it (None is none). What an ``environment``
    gives is added, with weight 1, as if by a last function; beside it there may be no other, ``[]``."""
    reward_weights: list[float] | None = None
    """Weight of each function in the sum of rewards. None: 1 each."""
    reward_timeout: float | None = setting(None, above=0, noun="number of seconds")
    """Seconds a reward function may take for one sample; where it takes longer, it is cut off, has no reward for that
    sample, and ``rewards/{name}/timeouts`` counts it. With a limit each function runs in a process of its own, one
    sample at a time. None: no limit, one call for the whole batch."""
    warm_start: WarmStartConfig | None = None
    """Make small models here instead of loading the policy and the critics from ``model_name_or_path``."""
    eval: EvalConfig = setting(factory=EvalConfig, may_change=True)
    """Evaluation on held-out prompts."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""

    prompts_per_step: int = setting(
        64, at_least=1, elsewhere=("per_device_train_batch_size", "rollout_batch_size", "train_batch_size")
    )
    """Prompts sampled a step; the batch is this times ``num_generations``. The paper's: 1,024 responses at 14B."""
    num_generations: int = setting(8, at_least=1, elsewhere=("n_samples_per_prompt",))
    """G, the responses of one prompt. The paper finds 32 best; 8 is our choice for small machines."""
    max_completion_length: int = setting(256, at_least=1, elsewhere=("max_new_tokens", "max_response_length"))
    """Longest response, in tokens, the end-of-sequence token included."""
    temperature: float = setting(1.0, above=0)
    """Sampling temperature; log-probs and entropies are those of the tempered distribution."""
    dynamic_sampling: bool = False
    """Drop prompts whose responses all have the same reward, and sample others for them, as often as
    ``dynamic_sampling_max_batches`` allows (DAPO, arXiv 2503.14476). Dropped ones fill what is missing then."""
    dynamic_sampling_max_batches: int = setting(10, at_least=1)
    """Times a step may sample, its own prompts included. DAPO's scripts set 10."""
    sampler: str = "auto"
    """What generates responses. ``generate``: a decoding loop that reads each prompt once and drops responses as they
    end, or, for models whose cache is of another kind, transformers' ``generate``. ``continuous``: transformers'
    continuous batching, which is at its best with ``policy.attn_implementation`` ``flash_attention_2`` or ``_3``.
    ``auto``: continuous on a GPU with such attention, where the model can, or else generate. In bfloat16 each decodes
    with a copy of the policy's weights in it, 2 bytes a parameter while it samples. ``vllm``: vLLM, see ``vllm``. Or
    one's own, ``module:factory`` or ``path.py:factory``: called with the policy, the tokenizer and the configuration,
    it returns a ``Sampler``. Before the first step, and before an evaluation, each has to show that it samples from the
    policy."""
    sampling_logp_tolerance: float | None = setting(None, at_least=0, may_change=True)
    """Nats by which the log-probs of the sampler and of the trainer may differ, in the mean over tokens: what is beyond
    it is not sampled from the policy. At the start that is an error, or ``auto`` samples in another way; in a step, a
    warning, and after ``max_skipped_steps`` such steps in a row an error, too. None: 1e-4 in float32; in bfloat16 0.1,
    and at the start, or wherever short responses are compared, six times what the trainer's own log-probs of them move
    in float32, but for adapters and for sharded models, which cannot compute in it. Our choice."""
    sampling_check_steps: int = setting(0, at_least=0, may_change=True)
    """Every n steps let the sampler draw a few short responses, and compare their log-probs in the same way; 0: never.
    One that has a copy of the weights is compared after the first update in any case."""
    generation_batch_size: int = setting(512, at_least=1, may_change=True)
    """Sequences generated side by side; bounds the memory of the key-value cache."""
    vllm: VLLMConfig = setting(factory=VLLMConfig, may_change=True)
    """vLLM."""
    async_generation: Literal[0, 1] = 0
    """1: the next step's responses are sampled while the policy is updated on this one's. They are of the policy before
    that update, which ``importance_sampling_clip_max`` accounts for; ``sampling/age`` counts the updates between. Needs
    a sampler with an engine of its own, such as ``vllm``. 0: one after the other."""

    learning_rate: float = setting(1e-6, above=0, elsewhere=("lr", "actor_learning_rate"))
    """AdamW's learning rate of the policy. The paper's for 14B: 1e-6."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the policy's learning rate rises linearly to ``learning_rate``, counted from its first one.
    Our choice."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """The policy's learning rate after that: as it is, or falling towards 0 until ``max_steps``. Our choice."""
    weight_decay: float = setting(0.0, at_least=0)
    """AdamW's decoupled weight decay of the policy. Our choice."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """Optimizer of the policy. ``adamw``: with moments in float32. ``adamw_8bit``: those of tensors of 4096 numbers or
    more in 8 bits, which takes 2 bytes a parameter in place of 8 (arXiv 2110.02861; by bitsandbytes, which has to be
    installed). Our choice."""
    max_grad_norm: float = setting(1.0, above=0)
    """Clip the policy's gradient norm. Our choice."""
    num_iterations: int = setting(1, at_least=1, elsewhere=("num_ppo_epochs", "ppo_epochs"))
    """Passes of the policy over one batch. ``num_iterations * num_mini_batches`` is the paper's update-to-data ratio
    (4 there); whether that counts passes or minibatches is open."""
    num_mini_batches: int = setting(4, at_least=1)
    """Optimizer steps of the policy a pass. Our choice: 4 minibatches in one pass."""
    old_per_token_logps: Literal["auto", "compute"] = setting(
        "auto", elsewhere=("use_rollout_log_probs", "bypass_mode")
    )
    """Log-probs that ratios are taken of, π_old's. ``compute``: by a pass over the whole batch before the update.
    ``auto``: without that pass where it can be spared. With one optimizer step a batch (``num_iterations`` and
    ``num_mini_batches`` 1) the update finds them itself, exactly, as in TRL, and nothing is lost. With several they are
    the sampler's where those agree with the trainer's to 1e-4 nats, in the check before the first step and in the step
    before: in float32, hardly in bfloat16. Then metrics of the entropy and ``sampling/sampling_logp_difference`` are of
    the responses of the first optimizer step alone, and ``samples.jsonl`` has, of the others, the sampler's log-prob
    and the entropy at their first update. ``use_kl_in_reward``, ``importance_sampling_clip_max``,
    ``critic.policy_inputs``, ``critic.kind: side``, ``mask_truncated_completions`` and the steps of
    ``critic.warmup_steps`` need the pass."""
    max_tokens_per_micro_batch: int = setting(
        16_384, at_least=1, may_change=True, elsewhere=("ppo_max_token_len_per_gpu",)
    )
    """Upper bound on the tokens, padding included, of one forward and backward pass; a single longer sequence still
    goes through alone. A CPU takes at most 832 for each of its threads: more are hardly faster, and take memory. The
    gradient is the same for any value."""
    gradient_accumulation_steps: int = setting(1, at_least=1, may_change=True)
    """Least number of micro-batches a minibatch is cut into. Memory only: the gradient is the same for any value."""
    offload: Literal["none", "optimizer", "all"] = setting(
        "none", may_change=True, elsewhere=("optimizer_offload", "param_offload")
    )
    """What lies in the host's pinned memory instead of the GPU's while it is not needed. ``optimizer``: moments, which
    are needed while their optimizer steps. ``all``: weights, too, of models that do not compute; critics' and the
    reference's while the policy does, the policy's while critics do. Results are the same to the bit. On a CPU nothing
    moves."""
    loss_aggregation: Literal["sequence-mean", "token-mean"] = setting("sequence-mean", elsewhere=("loss_agg_mode",))
    """``sequence-mean``: mean over responses of the mean over tokens (the paper's 1/|o|). ``token-mean``: mean over
    tokens. A token dropped by a mask stays in the denominator (our choice)."""
    policy_loss: str = "ppo"
    """What the policy maximises at each token: ``ppo``, the clipped surrogate (the paper's, in one fused op); ``cispo``
    (arXiv 2506.13585); ``gspo``, one ratio a response (arXiv 2507.18071). Or one's own, ``module:function`` or
    ``path.py:function``, from ``PolicyTokens`` to a ``Surrogate``."""
    epsilon: float = setting(0.2, at_least=0, below=1, elsewhere=("clip_ratio", "cliprange", "eps_clip"))
    """Lower clip: the ratio is clipped below at 1 - epsilon. Our choice."""
    epsilon_high: float = setting(0.28, at_least=0, elsewhere=("clip_ratio_high",))
    """Upper clip: the ratio is clipped above at 1 + epsilon_high (clip-higher). Our choice."""
    entropy_coef: float = setting(1e-3, at_least=0, elsewhere=("entropy_coeff",))
    """β of the paper, whose value is not stated: weight of the entropy bonus. Our choice."""
    beta: float = setting(0.0, at_least=0, elsewhere=("kl_coef",))
    """Coefficient of the KL penalty to the initial policy, TRL's ``beta``. With 0 there is no reference model."""
    use_kl_in_reward: bool = False
    """Take the penalty, log π_old - log π_ref at each token, off the reward, where critics and advantages see it
    (PPO of arXiv 2203.02155). Otherwise it is a term of the policy's loss (k3; GRPO of arXiv 2402.03300)."""
    use_bias_correction_kl: bool = True
    """Multiply that term by the ratio that the policy loss clips, with the gradient of both, so that its gradient is
    that of the KL divergence (DeepSeek-V3.2, arXiv 2512.02556; TRL's name and default). False: plain k3, whose gradient
    is another even on-policy. A penalty in the reward has none of either."""
    delta: float | None = None
    """Dual clip (arXiv 1912.09729): where the advantage is negative, the ratio counts up to this bound, which is above
    1 + epsilon_high. None does not bound it (our choice)."""
    importance_sampling_clip_max: float | None = setting(None, above=0)
    """Truncated importance sampling: weight each token's surrogate by π_old / π_sampler, at most this much, where the
    sampler's numerics, or with ``async_generation`` its policy, differ from the trainer's (TRL's
    ``vllm_importance_sampling_clip_max``, mode ``token_truncate``). None weights nothing; with ``async_generation`` it
    is 3, TRL's default."""

    mask_truncated_completions: bool = False
    """Leave responses that the length limit cut off out of the losses of policy and critics: how they would have ended
    is unknown (DAPO, arXiv 2503.14476). They weigh 0 but still count in the mean over responses, and their reward in
    GRPO's mean over a group."""
    overlong_buffer_len: int = setting(0, at_least=0)
    """Soft punishment of length (DAPO, arXiv 2503.14476): over the last so many tokens before
    ``max_completion_length`` the reward falls linearly, by ``overlong_penalty_factor`` at the limit. 0 turns it off."""
    overlong_penalty_factor: float = setting(1.0, at_least=0)
    """What a response of ``max_completion_length`` tokens loses where ``overlong_buffer_len`` is above 0."""

    gamma: float = setting(1.0, at_least=0, at_most=1)
    """Discount γ. Our choice."""
    lam: float = setting(0.95, at_least=0, at_most=1, elsewhere=("lambd",))
    """λ of the policy's advantage. Our choice."""
    length_adaptive_alpha: float | None = setting(None, above=0)
    """α of a λ that follows the response's length l, 1 - 1 / (α l), in place of ``lam`` (VAPO, arXiv 2504.05118, whose
    α is 0.05). None: one λ for all."""
    whiten: Literal["none", "batch", "group"] = "batch"
    """Whitening of advantages over the response tokens of the batch or of each prompt's group, before masking. Our
    choice. GRPO's advantages are normalised by its own rule instead."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What GRPO divides a reward less its group's mean by: the standard deviation of the group's rewards
    (arXiv 2402.03300), of the batch's, or nothing (Dr. GRPO, arXiv 2503.20783)."""
    advantage_values: Literal["after", "before", "cross_fit", "monte_carlo"] = "after"
    """Values that advantages and masks are made of. ``after``: of the critics after their update (the paper's order).
    ``before``: of the critics before it, which have not seen these responses. ``cross_fit``: after it, but a
    response's mean value leaves out the critic trained on it; σ is over all critics. ``monte_carlo``: of no critic, but
    of continuations (``monte_carlo``), at the cost of sampling them; masks still come from the critics' σ."""
    monte_carlo: MonteCarloConfig = field(default_factory=MonteCarloConfig)
    """Values from continuations."""
    environment_credit: Literal["keep", "drop"] = "keep"
    """What becomes of the luck that an ``environment`` brings. ``keep``: GAE across its tokens, which are skipped; a
    turn's reward is that of the turn's last token. ``drop``: the difference across an answer, its reward plus the value
    after it less the value before it, is left out of the advantages of the turns before. Where critics are right its
    expectation is 0 whatever the policy did, so that only variance goes (a control variate, as in AIVAT, arXiv
    1612.06915). But a turn's reward then counts only as far as the values around it tell, so that critics' errors no
    longer vanish at ``lam`` 1. Ours."""
    advantage_mask: Literal["sigma", "random", "none"] = "sigma"
    """Tokens whose advantage is masked. ``sigma``: those where critics agree most (the paper's). ``random``: as many,
    whichever, by the seed and the step: the control of a claim about the mask. ``none``: none."""
    advantage_mask_fraction: float = setting(0.2, at_least=0, below=1, noun="fraction")
    """k: fraction of tokens whose advantage is masked. The paper's. 0 masks none, either."""
    advantage_mask_skip: int = setting(0, at_least=0)
    """First tokens of each response that the advantage mask leaves alone: critics agree there, since they have nothing
    to go by yet. They do not count: k is a fraction of the others. 0 is the paper's."""
    entropy_filter_fraction: float = setting(0.2, at_least=0, below=1, noun="fraction")
    """h: fraction of tokens, those where critics disagree most, left out of the entropy bonus. The paper's."""
    quantile_scope: Literal["batch", "sequence", "position"] = "batch"
    """What k and h are fractions of: the batch's response tokens (our choice), each response's, or those at the same
    position of all responses, which compares a σ with what is usual as far along."""

    def __post_init__(self) -> None:
        """One name in place of a list of them is that list, as in TRL; ``report_to`` "none" is an empty one."""
        for name in ("reward_funcs", "report_to"):
            setattr(self, name, one_or_list(name, getattr(self, name)))

    @property
    def kl_in_loss(self) -> float:
        """Coefficient of the KL penalty in the policy's loss."""
        return 0.0 if self.use_kl_in_reward else self.beta

    @property
    def monte_carlo_values(self) -> bool:
        """Whether advantages are made of values from continuations."""
        return self.advantage_values == "monte_carlo" or self.resolved_algorithm.monte_carlo

    @property
    def rollout_weight_max(self) -> float | None:
        """Upper bound of π_old / π_sampler; None: there are no such weights."""
        given = self.importance_sampling_clip_max
        return 3.0 if self.async_generation and given is None else given

    @property
    def resolved_algorithm(self) -> Algorithm:
        """The entry that ``algorithm`` names. Raises ConfigError."""
        found = resolve(
            "algorithm", self.algorithm, ALGORITHMS, lambda found: callable(found) or isinstance(found, Algorithm)
        )
        return found if isinstance(found, Algorithm) else Algorithm(found)

    @property
    def num_critics(self) -> int:
        """M of the chosen algorithm."""
        return self.resolved_algorithm.num_critics(self.critic.num_critics)

    def validate(self) -> None:
        """Raise ConfigError naming the first setting that cannot work: by itself, as its field declares, or beside
        others."""
        check(self)
        rules.check_rules(self)
