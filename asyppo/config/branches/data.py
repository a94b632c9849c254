"""Settings below ``data``, and of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from asyppo.config.setting import setting


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
