"""TRL's GRPOTrainer with its per-token log-probs and entropies from ``linear_logprob``.

The trainer is TRL's own except for one method. TRL 1.16 has a fused head of its own there, which ``pytest bench``
compares with the op; this is the place for the op, or for a loss of yours that needs what the op returns.

Run it: ``python examples/trl_grpo_linear_logprob.py`` trains a tiny model for three steps on a CPU; it needs trl.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from asyppo_kernels import linear_logprob

TESTED = "1.16"


def check_trl(version: str) -> None:
    """Raise ImportError unless ``version`` is one whose method this file knows how to replace."""
    if version.split(".")[:2] != TESTED.split("."):
        raise ImportError(
            f"trl: got {version}, needs {TESTED}.x, since GRPOTrainer._get_per_token_logps_and_entropies is private "
            f"and changes: pip install 'trl=={TESTED}.*', or compare that method with the one here and change TESTED"
        )


check_trl(trl.__version__)


class LinearLogprobGRPOTrainer(trl.GRPOTrainer):
    """GRPOTrainer whose log-probs and entropies come from hidden states, without the logits in memory."""

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(log-probs, entropies or None, None): [B, logits_to_keep], float32, 0 where a token is padding."""
        if compute_aux_loss or any(value is not None for value in multimodal.values()):
            raise NotImplementedError("only text, and no auxiliary loss of a mixture of experts")
        head, softcap = head_of(self.accelerator.unwrap_model(model))
        size = batch_size or len(input_ids)
        logprobs, entropies = [], []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            target = ids.masked_fill(mask == 0, -100)[:, -logits_to_keep:]
            with self.accelerator.autocast():
                hidden = hidden_of(model, head, input_ids=ids, attention_mask=mask)
                amp = torch.is_autocast_enabled(hidden.device.type) and not self.args.cast_lm_head_to_fp32
            # The op computes in the dtypes it is given, whatever autocast says.
            dtype = torch.get_autocast_dtype(hidden.device.type) if amp else head.weight.dtype
            out = linear_logprob(
                # Position t predicts token t + 1.
                hidden[:, -logits_to_keep - 1 : -1].flatten(0, 1).to(dtype),
                head.weight.to(dtype),
                target.flatten(),
                bias=head.bias,
                temperature=self.temperature,
                softcap=softcap,
                entropy=compute_entropy,
            )
            logprobs.append(out.logprob.view_as(target))
            if out.entropy is not None:
                entropies.append(out.entropy.view_as(target))
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None


def head_of(model: Any) -> tuple[nn.Linear, float | None]:
    """The head of a Hugging Face causal language model, and the cap on its logits."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if type(head) is not nn.Linear:  # an adapter, for instance, adds to what the weight says
        raise NotImplementedError(f"head: got {type(head).__name__}, needs a plain nn.Linear")
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) is not None:
            raise NotImplementedError(f"this model scales its logits ({name}); scale the hidden states by as much")
    return head, getattr(config, "final_logit_softcapping", None)


def hidden_of(model: nn.Module, head: nn.Linear, **inputs: Tensor) -> Tensor:
    """What ``model`` hands to its head, [B, T, H]; the head itself gets to see one position only.

    The call goes through whatever wraps the model, such as DistributedDataParallel, which would miss a call around it.
    """
    seen: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, :1],)

    hook = head.register_forward_pre_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklm"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build a model of two small layers."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    """Reward: how much of the completion is the letter a."""
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def main() -> None:
    """Train for three steps; TRL prints its metrics."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LinearLogprobGRPOTrainer(
            model=make_model(tokenizer),
            reward_funcs=share_of_a,
            args=trl.GRPOConfig(
                output_dir=folder,
                max_steps=3,
                learning_rate=1e-2,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=12,
                temperature=0.9,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a", "bcd", "efghij", "klm"]}),
            processing_class=tokenizer,
        )
        trainer.train()


if __name__ == "__main__":
    main()
