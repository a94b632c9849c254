"""TRL 1.16: GRPO, RLOO and AsyncGRPO, and the references of DPO and KTO, take their log-probs from the op.

``add_fused_lm_head`` of TRL calls one autograd function with hidden states and the head's weight, after FSDP2 has
gathered the weight and outside of what PEFT and mixtures of experts wrap. That function is what is replaced.
"""

from __future__ import annotations

from torch import Tensor

from asyppo_kernels.integrations._head import head_log_probs
from asyppo_kernels.integrations._patching import Patches, check_version

TESTED = "1.16"
OURS = {"log_probs", "entropy"}

_patches = Patches()
PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def enable() -> None:
    """Put ``linear_logprob`` in the place of TRL's ``ChunkedLogProbFunction``; a second call changes nothing.

    Raises:
        ImportError: unless TRL 1.16 is installed.
    """
    check_version("trl", TESTED)
    import trl.trainer.utils as utils

    if _patches:
        return
    trls = utils._ChunkedLogProbFunction

    class LinearLogprobFunction:
        """TRL calls ``apply`` and nothing else."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> PerToken:
            """(log-probs, entropies or None, None, None, None), [N] float32, of ``targets`` [N] int64.

            TRL's own function runs where the op has no answer: for ``log_sum_sq_probs``, ``mean_logits`` or
            ``is_top1``, for a logit scale that is not above 0, and for a head that DeepSpeed ZeRO-3 has partitioned,
            which a backward has to gather again.
            """
            if not set(outputs) <= OURS or logit_scale <= 0 or hasattr(weight, "ds_id"):
                return trls.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            return log_probs(
                hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, "entropy" in outputs
            )

    _patches.replace(utils, "_ChunkedLogProbFunction", LinearLogprobFunction)


def disable() -> None:
    """Give TRL its own function back."""
    _patches.undo()


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
) -> PerToken:
    """What TRL's function returns.

    The logits are ``softcap(s (hidden weight^T + bias)) / temperature`` with s the logit scale, which the op takes as
    a cap and a temperature smaller by s.
    """
    out = head_log_probs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature / logit_scale,
        softcap=None if softcap is None else softcap / logit_scale,
        entropy=entropy,
    )
    return out.logprob, out.entropy, None, None, None
