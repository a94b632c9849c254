"""AsyPPO's policy loss on a policy head."""

from asyppo_kernels.linear_ppo_loss.op import linear_ppo_loss
from asyppo_kernels.linear_ppo_loss.reference import linear_ppo_loss_reference
from asyppo_kernels.linear_ppo_loss.result import LinearPPOLoss

__all__ = ["LinearPPOLoss", "linear_ppo_loss", "linear_ppo_loss_reference"]
