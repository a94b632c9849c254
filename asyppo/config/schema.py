"""Every setting of a run, as one dataclass tree: what ``asyppo train --help`` prints and a YAML file fills.

Fields that TRL has carry TRL's names. "Our choice" marks what the AsyPPO paper (arXiv 2510.01656) leaves open;
"the paper's" marks what it states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from asyppo.algorithm.algorithms import ALGORITHMS, Algorithm
from asyppo.config.references import resolve
from asyppo.config.setting import check, need, setting


def one_or_list(name: str, value: Any) -> Any:
    """Return the list that a name in its place stands for; ``name`` is the setting's. Other values stay themselves."""
    if not isinstance(value, str):
        return value
    return [] if (name, value) == ("report_to", "none") else [value]


@dataclass
class PolicyConfig:
    """The language model that is trained."""

    model_name_or_path: str | None = setting(None, elsewhere=("model",))
    """Directory or hub name of a Hugging Face causal language model. None needs a ``warm_start``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass. The weights and the optimizer stay float32, so that updates at a
    learning rate of 1e-6 do not round away. ``auto``: bfloat16 on a GPU, float32 on a CPU."""
    attn_implementation: str | None = setting(None, may_change=True)
    """Passed to ``from_pretrained``: ``sdpa``, ``eager``, ``flash_attention_2``; None lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model, of the policy, the critics or the tokenizer."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the policy's backward pass, and compute the rest again: less memory, more time,
    the same gradients."""
    packing: bool | Literal["auto"] = setting("auto", may_change=True)
    """Lay sequences one behind the other in one row a micro-batch, without padding, instead of side by side. ``auto``:
    where attention takes sequences of any length, which is flash attention; others would make a mask of all pairs of
    tokens. A model that cannot (one with a state, or whose attention does not look at position ids) is found out at
    the start, and its micro-batches are padded, with a warning; rows of like length go together then."""
    use_peft: bool = False
    """Train LoRA adapters instead of the weights. The weights under them are kept in ``dtype``, checkpoints hold the
    adapters alone, and the reference of ``beta`` is the model without them. A ``model_name_or_path`` that holds
    adapters goes on training those, whatever is set here."""
    lora_r: int = setting(16, at_least=1)
    """Rank of new adapters (TRL's default)."""
    lora_alpha: int = setting(32, at_least=1)
    """New adapters are scaled by ``lora_alpha / lora_r`` (TRL's default)."""
    lora_target_modules: list[str] | None = None
    """Ends of the names of layers that get adapters, such as ``[q_proj, v_proj]``; None: all linear layers but the
    head. The head gets none: the fused ops read its weight."""


@dataclass
class SideConfig:
    """``critic.kind: side``: small networks on hidden states that the policy makes anyway. Ours."""

    network: Literal["transformer", "mlp"] = "transformer"
    """``transformer``: one layer, in which a state sees those before it in its response. ``mlp``: the same layer
    without attention."""
    width: int = setting(64, at_least=32)
    """Of the network: a multiple of 32."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """Layers of the policy whose output is read, counted from 1 or, from the last one back, from -1; of several, side
    by side. Of the last one it is what the head reads, behind the final norm."""
    keep_bytes: int = setting(4 * 2**30, at_least=0, may_change=True)
    """Bytes that a step may keep of the hidden states of its responses, on each process, until the critics are done.
    Those of a batch that would take more are made again where critics read them, by passes of the policy's layers.
    Memory and time only."""


@dataclass
class CriticConfig:
    """The mini-critics. They share the policy's tokenizer and dtype; run one after another, its attention
    implementation, too."""

    kind: Literal["mini", "side"] = "mini"
    """``mini``: language models, much smaller than the policy, that read its tokens (the paper's). ``side``: the small
    networks of ``critic.side``, which read its hidden states. No gradient goes from them to the policy. Ours."""
    side: SideConfig = field(default_factory=SideConfig)
    """Side critics."""
    model_name_or_path: str | list[str] | None = None
    """Directory or hub name of the checkpoint that every critic starts from (the paper's: one checkpoint, new value
    heads): a causal model of any family, made for the policy's tokenizer, which is checked on prompts; its embeddings
    may be padded to another size. Or a list of ``num_critics``, one for each, such as ``critic_0`` and ``critic_1`` of
    an earlier run's checkpoint. None takes the policy's, which is what ``algorithm: ppo`` always does, or those that a
    ``warm_start`` makes. Side critics start from side critics of an earlier run, or with None as new ones."""
    num_critics: int = setting(2, at_least=1)
    """M. The paper's sweet spot is 2. ``algorithm: ppo`` always has 1, ``grpo`` none."""
    share: Literal["disjoint", "all"] = "disjoint"
    """Responses that a critic learns from. ``disjoint``: each prompt's are divided evenly, and none is learned by two
    critics (the paper's). ``all``: every critic learns from all of them, in an order of its own, which takes M times
    the work (the paper's ablation of two critics on the same data)."""
    learning_rate: float = setting(1e-5, above=0, elsewhere=("critic_learning_rate",))
    """AdamW's learning rate of every critic. Our choice."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Critics' learning rate over ``max_steps``: as it is, or falling towards 0. Our choice."""
    max_grad_norm: float = setting(1.0, above=0)
    """Clip each critic's gradient norm, each on its own. Our choice."""
    weight_decay: float = setting(0.0, at_least=0)
    """AdamW's decoupled weight decay. Our choice."""
    num_iterations: int = setting(1, at_least=1)
    """Passes over a critic's responses in one step. Our choice."""
    num_mini_batches: int = setting(1, at_least=1)
    """Optimizer steps a pass. Our choice."""
    value_lambda: float = setting(1.0, at_least=0, at_most=1)
    """λ of the return that critics learn: 1 is the Monte Carlo return, the paper's. Below 1 critic m bootstraps on
    its own V_m, from a value pass before its update."""
    loss: Literal["mse", "bce"] = "mse"
    """What a critic minimises: squared errors (the paper's), or the cross-entropy of a return in [0, 1], of which its
    value, the sigmoid of what its head gives, is the probability. Mean and σ are over values. Ours."""
    cliprange_value: float | None = setting(None, above=0)
    """PPO's value clipping: a value that has moved further than this from that of before the update gains nothing by
    moving on. None does not clip (our choice). It is defined for squared errors."""
    warmup_steps: int = setting(0, at_least=0)
    """First steps that train the critics only, with the policy frozen. Our choice."""
    policy_inputs: list[Literal["logprob", "entropy"]] = field(default_factory=list)
    """What critics read beside tokens or hidden states, by a projection at their input that starts at zero: at the
    position that predicts a token, the policy's ``logprob`` of the token before (0 where that is of the prompt) and its
    ``entropy`` there, both of the pass that gives the old log-probs. Ours; empty, mini-critics read tokens alone, the
    paper's."""
    stacked: bool = True
    """Compute the critics as one model with stacked weights, in the launches of one. False runs them one after
    another, which is also what happens, with a warning, to models that are not Llama, Mistral, Qwen2 or Qwen3."""
    lora_r: int = setting(0, at_least=0, renamed_from=("lora_rank",))
    """r > 0: the critics are LoRA adapters of rank r on every linear layer, and value heads, over one frozen backbone,
    so that M of them take the memory of one; of Llama, Mistral, Qwen2 and Qwen3. 0: each has all weights of its own,
    the paper's."""
    lora_alpha: float = setting(16.0, above=0)
    """The adapters' products are scaled by lora_alpha / lora_r. Our choice."""
    gradient_checkpointing: bool = False
    """Keep one tensor a layer for the backward pass and compute the rest again: less memory, more time."""


@dataclass
class TaskConfig:
    """One reasoning-gym task."""

    name: str = "chain_sum"
    """Name of the task, such as ``chain_sum``; or ``grid_world`` or ``word_guessing``, which are for the
    ``environment`` of that name."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the task's generator, such as ``{min_terms: 3}``."""
    weight: float = setting(1.0, above=0, below=float("inf"))
    """How many rows of a mixture are of this task, in proportion to the other tasks' weights."""


@dataclass
class DataConfig:
    """Where prompts come from: a data set of one's own, or else reasoning-gym tasks. Held-out prompts are never
    trained on."""

    dataset_name: str | None = None
    """A ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a directory (of ``datasets``' ``save_to_disk``, or of
    data files), or a name on the hub. Its column ``prompt`` is text, or chat messages (a list of ``{role, content}``)
    to which the tokenizer's chat template is applied; all other columns reach the reward functions. Without it the
    column ``messages`` is taken, less an answer of the assistant at its end. None: reasoning-gym tasks."""
    dataset_config: str | None = None
    """Configuration of a hub data set, ``name`` of ``datasets.load_dataset``."""
    dataset_train_split: str = "train"
    """Split with the training rows, where the data set has splits."""
    dataset_test_split: str | None = None
    """Split with the held-out rows. None: ``eval_size`` prompts are held out of the training rows."""
    eval_dataset_name: str | None = None
    """File, directory or hub name with the held-out rows, in place of a split; where it has splits,
    ``dataset_test_split`` (None: ``test``) is taken."""
    eval_dataset_config: str | None = None
    """Configuration of ``eval_dataset_name``, where that is a hub data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """New names of a data set's columns, such as ``{question: prompt}``."""
    max_train_rows: int | None = setting(None, at_least=1)
    """Train on at most so many rows of a data set, drawn with ``train_seed``; None: on all. The paper's: 5,000."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The reasoning-gym task of training and held-out prompts."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Several tasks, mixed by ``weight``; where there are any, ``task`` is not used."""
    prompt_suffix: str | None = None
    """Text between a text prompt and the response. None: a line break for tasks, so that the first token of the
    response cannot merge with the question, and nothing for a data set. Chat messages end as their template says."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as ``{enable_thinking: false}``."""
    max_prompt_length: int | None = setting(None, at_least=1)
    """Longest prompt, in tokens. None: what the models' positions leave beside ``max_completion_length``, which binds
    in any case."""
    long_prompts: Literal["error", "skip"] = "error"
    """What becomes of longer prompts: an error that names the rows, or a warning that does, without them."""
    bad_rows: Literal["error", "skip"] = "error"
    """The same for rows that are none: broken JSON, a prompt that is missing, empty, neither text nor chat messages, or
    in tokens that the models do not have, or no column that a reward function needs."""
    train_size: int = setting(20_000, at_least=1)
    """Training rows generated of the tasks; of a data set all are taken. Rows whose prompt is held out are left out."""
    train_seed: int = 1
    """Seed of the generated training rows, and of the draw of ``max_train_rows``."""
    eval_size: int | None = setting(None, at_least=0)
    """Held-out prompts, all different; all that there are where a split or file of held-out rows has fewer. None: 512,
    but of a data set without such rows at most a tenth of its different prompts. 0: none."""
    eval_seed: int = 1_000_003
    """Seed of the held-out rows and of their sampling: the same before and after training."""


@dataclass
class ModelShape:
    """Shape of a small Qwen3 made by the warm start."""

    hidden_size: int = setting(128, at_least=1)
    """Width."""
    num_hidden_layers: int = setting(3, at_least=1)
    """Depth."""
    num_attention_heads: int = setting(4, at_least=1)
    """Query heads."""
    num_key_value_heads: int = setting(2, at_least=1)
    """Key and value heads."""
    intermediate_size: int = setting(384, at_least=1)
    """Width of the MLP."""


@dataclass
class WarmStartConfig:
    """A small policy and a smaller critic made on the spot: a Qwen3 from a config, a tokenizer of its own, and
    supervised steps on worked solutions with mistakes in them, so that it knows the format and starts out fallible.
    The result is cached, and loaded by ``from_pretrained`` like any other model. For the tasks ``chain_sum`` and
    ``gcd``; beside an ``environment`` that ships, from episodes with it."""

    policy: ModelShape = field(default_factory=ModelShape)
    """Shape of the policy."""
    critic: ModelShape = field(default_factory=lambda: ModelShape(64, 2, 4, 2, 192))
    """Shape of the checkpoint the critics start from."""
    steps: int = setting(300, at_least=1)
    """Supervised optimizer steps."""
    batch_size: int = setting(256, at_least=1)
    """Solutions a step."""
    learning_rate: float = setting(3e-3, above=0)
    """AdamW's peak learning rate, reached after 30 steps and decaying to a tenth."""
    noise: float = setting(0.05, at_least=0, at_most=1, noun="probability")
    """Probability that a line of a solution is wrong, and everything after it follows from the wrong value."""
    guess: float = setting(0.5, at_least=0, at_most=1, noun="probability")
    """Probability that a solution leaves the working out and guesses."""
    wrong_rule: float = setting(0.0, at_least=0, at_most=1, noun="probability")
    """Probability that a solution with working keeps to a wrong rule from its first line to its last, so that its
    mistakes are no improbable tokens: in ``chain_sum``, a 9 is taken for a 1 of the other sign."""
    seed: int = 0
    """Seed of weights and noise."""
    cache_dir: str = setting("~/.cache/asyppo", may_change=True)
    """Where the result is kept, under a name made of every setting it depends on."""


@dataclass
class EvalConfig:
    """Accuracy on the held-out prompts, before the first step, after the last and in between."""

    every: int = setting(0, at_least=0, elsewhere=("eval_steps",))
    """Also evaluate every n steps; 0: only before and after."""
    num_generations: int = setting(4, at_least=1)
    """Samples a prompt."""
    temperature: float = setting(1.0, at_least=0)
    """Sampling temperature of the evaluation; 0 takes the likeliest token each time."""
    min_gain: float | None = None
    """Fail the run (exit status 1) when the accuracy rises by less than this fraction. None asks nothing."""


@dataclass
class VLLMConfig:
    """``sampler: vllm``: where the engine runs, and how. See ``docs/vllm.md``."""

    url: list[str] = setting(factory=list)
    """Servers that somebody has started, such as ``http://127.0.0.1:8000``; they take turns with the prompts. Empty: a
    process of its own on this machine, one a rank."""
    python: str | None = None
    """Interpreter of the environment that has vLLM, for the process; None: this one's."""
    gpu_memory_utilization: float = setting(0.3, above=0, at_most=1, elsewhere=("vllm_gpu_memory_utilization",))
    """Fraction of the GPU's memory (of the machine's, on a CPU) that the process may take. TRL's default."""
    tensor_parallel_size: int = setting(1, at_least=1, elsewhere=("vllm_tensor_parallel_size",))
    """GPUs that the process shards the model over."""
    max_model_len: int | None = setting(None, at_least=1, elsewhere=("vllm_max_model_length",))
    """Longest prompt and response together, in tokens. None: ``data.max_prompt_length`` and
    ``max_completion_length``, or without the former what the model's positions allow."""
    sleep_level: Literal[0, 1, 2] = setting(0, elsewhere=("vllm_enable_sleep_mode",))
    """What the process gives back of a GPU's memory while the trainer updates: 0, nothing; 1, the cache, and the
    weights go to the host; 2, both go, and all weights are sent again. On a CPU vLLM does not sleep."""
    enforce_eager: bool | None = None
    """Compile nothing and record no CUDA graphs: a quicker start, slower generation. None: on a CPU."""
    seeded: bool = True
    """Give each request a seed, so that a batch that is drawn again is the same. False leaves chance to the engine,
    which is quicker with many responses at once."""
    weight_transfer: Literal["directory", "nccl"] = "directory"
    """How weights get to servers: by a ``directory`` in shared memory, or over ``nccl`` by vLLM's own weight transfer,
    for which the trainer's environment has vLLM, too, and servers are started with ``--weight-transfer-config
    '{"backend": "nccl"}'``."""
    weight_transfer_address: str | None = None
    """Address of this machine at which servers find the trainer with ``nccl``. None: the one from which it reaches the
    first of them."""
    weights_dir: str | None = None
    """Where directories of weights are made on their way to the engine; servers on other machines need one that they
    share. None: ``/dev/shm``."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM`` for the process, such as ``{kv_cache_memory_bytes: 4294967296}``."""
    start_timeout: float = setting(600.0, above=0, noun="number of seconds")
    """Seconds that the engine may take to start; servers, to be there."""
    timeout: float = setting(1800.0, above=0, noun="number of seconds")
    """Seconds that it may take for a batch of responses, or for new weights; then it counts as hung, and the run ends
    with an error, saved."""

    def __post_init__(self) -> None:
        """One address in place of a list of them is that list."""
        self.url = one_or_list("url", self.url)


@dataclass
class MonteCarloConfig:
    """Values from continuations (``advantage_values: monte_carlo``, ``algorithm: vineppo``; VinePPO, arXiv
    2410.01679): from states that the responses go through, the policy goes on K times, and the mean of what it gets is
    the state's value. It costs so many times the sampling that it is a ceiling to hold critics against rather than a
    way to train: ``monte_carlo/tokens_per_response_token`` says how many."""

    num_continuations: int = setting(9, at_least=1)
    """K. The paper's: 9."""
    every: int = setting(8, at_least=1)
    """A state every so many tokens, from the first on. Tokens between two states share the first one's value and
    advantage. Our choice."""
    boundaries: list[str] = field(default_factory=list)
    """Texts after which a state begins, in place of ``every``: ``["\\n"]`` for VinePPO's steps of a solution."""

    @property
    def sparse(self) -> bool:
        """Whether an action may be of several tokens."""
        return self.every > 1 or bool(self.boundaries)


@dataclass
class EnvironmentConfig:
    """What answers the policy's turns, so that a response has several: an environment, or tools. See
    ``docs/environments.md``."""

    name: str | None = setting(None, elsewhere=("environment_factory",))
    """``calculator``, ``grid_world``, ``word_guessing`` or ``second_try``, which ship; or one's own, ``module:name`` or
    ``path.py:name`` of a class, or of a function that makes one: of the text protocol (``reset`` and ``step``), or in
    TRL's form (``reset``, public methods as tools, and perhaps ``get_reward``). None: there is none, and a response is
    one turn."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments it is made with, such as ``{slip: 0.2}``."""
    tools: list[str] = field(default_factory=list)
    """Functions that the policy may call, ``module:function`` or ``path.py:function``, with type hints and docstrings
    that say what they do, as TRL's ``tools``."""
    max_turns: int = setting(8, at_least=1, elsewhere=("max_tool_calling_iterations", "max_assistant_turns"))
    """Turns of the policy; an episode that has not ended by then is cut off, after the last answer."""
    max_turn_length: int | None = setting(None, at_least=1)
    """Longest turn, in tokens; one that is cut off is not answered, and ends its episode. None: what
    ``max_completion_length``, which counts the tokens of both sides, leaves."""
    timeout: float | None = setting(60.0, above=0, noun="number of seconds")
    """Seconds that an answer may take. Instead of one that takes longer the policy sees an error, and
    ``environment/timeouts`` counts it; an environment, unlike a tool, is not called again, so its episode ends.
    None: no limit."""
    waves: int = setting(1, at_least=1)
    """Parts that the episodes of a step are divided into: while the sampler writes for one, the environments of the
    others answer. 2 hides answers that take about as long as a turn, and has the sampler write half as many at once."""
    max_parallel: int = setting(16, at_least=1)
    """Answers that are made at once, each in a thread. 1, with no ``timeout``: one after another, in the trainer's."""

    @property
    def given(self) -> bool:
        """Whether there is an environment or a tool."""
        return self.name is not None or bool(self.tools)


@dataclass
class DistributedConfig:
    """Several processes, one a GPU, started by ``torchrun``; weights are sharded over them with FSDP2."""

    replicate: int = setting(1, at_least=1)
    """Copies of the sharded weights (HSDP): neighbouring ranks share a copy, and gradients are summed over the copies.
    The number of nodes keeps the gathering of weights within a node. 1: one copy over all ranks."""
    shard_single: bool = False
    """Wrap the models with FSDP2 in a single process, too. It shards nothing there; with bfloat16 compute it keeps the
    compute weights of one layer at a time instead of all of them."""
    timeout_s: int = setting(1800, at_least=1)
    """Seconds that a rank waits for the others before it ends the run with an error. Longer than the longest
    difference between ranks, which is that of their sampling and rewarding."""


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
    with a copy of the policy's weights in it, 2 bytes a parameter. ``vllm``: vLLM, see ``vllm``. Or one's own,
    ``module:factory`` or ``path.py:factory``: called with the policy, the tokenizer and the configuration, it returns a
    ``Sampler``. Before the first step, and before an evaluation, each has to show that it samples from the policy."""
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
    goes through alone. A CPU takes at most 4,096 for each of its threads, of which less is padding. The gradient is the
    same for any value."""
    gradient_accumulation_steps: int = setting(1, at_least=1, may_change=True)
    """Least number of micro-batches a minibatch is cut into. Memory only: the gradient is the same for any value."""
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
        algorithm = self.resolved_algorithm
        need(
            self.critic.lora_r == 0 or self.critic.stacked,
            "critic.lora_r",
            self.critic.lora_r,
            "0 with critic.stacked False: adapters share a backbone, which is computed for all of them at once",
        )
        self._validate_side_critics()
        need(
            self.critic.cliprange_value is None or self.critic.loss == "mse",
            "critic.cliprange_value",
            self.critic.cliprange_value,
            "none with critic.loss 'bce', whose gradient is bounded as it is",
        )
        need(
            sorted(self.critic.policy_inputs) in ([], ["entropy"], ["entropy", "logprob"], ["logprob"]),
            "critic.policy_inputs",
            self.critic.policy_inputs,
            "a list of logprob, entropy, each at most once",
        )
        need(
            self.delta is None or self.delta > 1 + self.epsilon_high,
            "delta",
            self.delta,
            f"more than 1 + epsilon_high = {1 + self.epsilon_high:g}, or none",
        )
        need(
            self.beta > 0 or not self.use_kl_in_reward,
            "use_kl_in_reward",
            self.use_kl_in_reward,
            f"a beta above 0, got {self.beta}",
        )
        need(
            self.overlong_buffer_len < self.max_completion_length,
            "overlong_buffer_len",
            self.overlong_buffer_len,
            f"less than max_completion_length = {self.max_completion_length}",
        )
        need(
            self.scale_rewards == "group" or algorithm.scales_rewards,
            "scale_rewards",
            self.scale_rewards,
            f"an algorithm that scales rewards, such as grpo; {self.algorithm} does not",
        )
        need(
            self.length_adaptive_alpha is None or self.num_critics > 0,
            "length_adaptive_alpha",
            self.length_adaptive_alpha,
            f"a critic, algorithm {self.algorithm} has none",
        )
        need(
            algorithm.values is None or algorithm.critics == "none",
            "algorithm",
            self.algorithm,
            f"values of its own or {algorithm.critics} critics, not both",
        )
        masks = self.num_critics > 0 or algorithm.values is not None or self.algorithm not in ALGORITHMS
        for name in ("advantage_mask", "advantage_mask_skip"):
            got = getattr(self, name)
            need(
                masks or got == getattr(AsyPPOConfig, name),
                name,
                got,
                f"a critic, algorithm {self.algorithm} has none and masks nothing",
            )
        need(
            self.advantage_values == "after"
            or self.num_critics >= (2 if self.advantage_values == "cross_fit" else 1)
            or (self.monte_carlo_values and (algorithm.monte_carlo or self.algorithm not in ALGORITHMS)),
            "advantage_values",
            self.advantage_values,
            f"{'two critics' if self.advantage_values == 'cross_fit' else 'a critic'}, "
            f"algorithm {self.algorithm} has {self.num_critics} here"
            + ("; vineppo takes values from continuations without any" if self.monte_carlo_values else ""),
        )
        need(
            self.gamma == 1 or not self.monte_carlo_values or not self.monte_carlo.sparse,
            "gamma",
            self.gamma,
            "1 for values from continuations, or monte_carlo.every 1: it would count states, not tokens",
        )
        need(
            self.advantage_values != "cross_fit" or self.critic.share == "disjoint",
            "advantage_values",
            self.advantage_values,
            f"critic.share 'disjoint', got {self.critic.share!r}: it leaves out the critic that learned from a "
            "response, and here all did",
        )
        need(
            all(self.monte_carlo.boundaries),
            "monte_carlo.boundaries",
            self.monte_carlo.boundaries,
            "texts that are not empty",
        )
        self._validate_data()
        need(
            self.environment_credit == "keep" or self.num_critics > 0,
            "environment_credit",
            self.environment_credit,
            f"a critic, algorithm {self.algorithm} has none that knows what was to be expected",
        )
        need(
            bool(self.reward_funcs) or self.environment.given,
            "reward_funcs",
            self.reward_funcs,
            "at least one, or an environment that gives rewards",
        )
        if self.environment.given:
            self.check_environment()
        need(
            self.num_generations >= self.num_critics or self.critic.share == "all",
            "num_generations",
            self.num_generations,
            f"at least critic.num_critics = {self.num_critics}, so that every critic sees every prompt",
        )
        need(
            self.num_generations >= 2 or not algorithm.compares_group,
            "num_generations",
            self.num_generations,
            f"at least 2 for algorithm {self.algorithm}, which compares the responses of one prompt",
        )
        need(
            self.num_generations >= 2 or not self.dynamic_sampling,
            "dynamic_sampling",
            self.dynamic_sampling,
            "num_generations of at least 2: one response has no reward to compare with",
        )
        need(
            not (self.async_generation and self.dynamic_sampling),
            "async_generation",
            self.async_generation,
            "0 with dynamic_sampling, which samples again by the rewards of a batch",
        )
        need(
            not (self.async_generation and self.vllm.sleep_level),
            "async_generation",
            self.async_generation,
            "vllm.sleep_level 0: the engine samples while the trainer updates",
        )
        need(
            self.num_mini_batches <= self.prompts_per_step * self.num_generations,
            "num_mini_batches",
            self.num_mini_batches,
            "at most prompts_per_step * num_generations",
        )
        need(
            self.eval.min_gain is None or self.data.eval_size != 0,
            "data.eval_size",
            self.data.eval_size,
            "at least 1 held-out prompt for eval.min_gain",
        )

    def check_environment(self) -> None:
        """Raise ConfigError where a setting cannot work beside an environment."""
        need(
            self.async_generation == 0,
            "async_generation",
            self.async_generation,
            "0 with an environment, whose answers come between the turns",
        )
        need(
            not self.monte_carlo_values,
            "advantage_values" if self.advantage_values == "monte_carlo" else "algorithm",
            self.advantage_values if self.advantage_values == "monte_carlo" else self.algorithm,
            "values of critics or of groups with an environment: its state cannot be gone back to for continuations",
        )
        need(
            self.max_completion_length >= 3,
            "max_completion_length",
            self.max_completion_length,
            "at least 3 with an environment: a token of a turn, one of an answer and one of the next turn",
        )

    def _validate_side_critics(self) -> None:
        critic = self.critic
        need(
            critic.side.width % 32 == 0,
            "critic.side.width",
            critic.side.width,
            "a multiple of 32: it has four heads, and attention on GPUs takes multiples of 8 in each",
        )
        need(len(critic.side.layers) > 0, "critic.side.layers", critic.side.layers, "a list of at least one layer")
        if critic.kind == "mini":
            return
        algorithm = self.resolved_algorithm.critics
        need(
            algorithm != "policy",
            "critic.kind",
            critic.kind,
            f"'mini' for algorithm {self.algorithm}, whose critic is of the policy's size",
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

    def _validate_data(self) -> None:
        data = self.data
        for name, other, there in (
            ("dataset_config", "dataset_name", data.dataset_name),
            ("eval_dataset_config", "eval_dataset_name", data.eval_dataset_name),
            ("dataset_test_split", "dataset_name", data.dataset_name or data.eval_dataset_name),
        ):
            got = getattr(data, name)
            need(got is None or there is not None, f"data.{name}", got, f"a data.{other} beside it")
        need(data.dataset_name is None or not data.tasks, "data.tasks", data.tasks, "none beside data.dataset_name")
