"""Responses of several turns: whose tokens are whose, what critics learn between the turns, and whose luck counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo.algorithm.advantage import critics_advantage, group_advantage
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import Outcome
from asyppo.algorithm.turns import Turns, returns_after_turns
from asyppo.data.batch import Batch, make_batch, micro_batch
from asyppo.trainer import AsyPPOTrainer

POLICY = [[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1]]
"""Two answers, the last at the end; two, the last of two tokens; none."""


def batch_of(policy: list[list[int]] = POLICY, scores: list[Any] | None = None, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    responses = [torch.randint(3, 19, (len(row),), generator=generator) for row in policy]
    drawn = [torch.tensor(row).bool() for row in policy]
    return make_batch(
        [torch.randint(3, 19, (2 + i % 2,), generator=generator) for i in range(len(policy))],
        responses,
        [-torch.rand(len(row), generator=generator) * mask for row, mask in zip(policy, drawn, strict=True)],
        scores or [1.0] * len(policy),
        [False] * len(policy),
        [0] * len(policy),
        pad_token_id=0,
        device=torch.device("cpu"),
        policy_tokens=drawn,
    )


def test_whose_tokens_are_whose() -> None:
    at_tokens = torch.tensor([0.5, 0.0, 0.0, 0.25, 0.0, 1.0, 2.0])
    batch = batch_of(scores=[at_tokens, 4.0, 8.0])
    assert batch.mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    # One more position after a turn's last token, also where the answer is the end.
    assert batch.value_mask.int().tolist() == [[1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    # A reward at an environment's token, and one for the whole, is that of the last token of the turn before.
    assert batch.reward.tolist() == [[0.5, 0.25, 0, 0, 0, 3, 0], [0, 0, 4, 0, 0, 0, 0], [0, 0, 8, 0, 0, 0, 0]]
    assert batch.turns is not None
    assert batch.turns.reward.tolist() == [[0, 0.25, 0, 0, 0, 3, 0], [0, 0, 4, 0, 0, 0, 0], [0] * 7]
    assert batch.score.tolist() == [3.75, 4, 8]
    for way in ({}, {"packed": True}, {"shared": True}):
        micro = micro_batch(batch, [1, 0], **way)
        wrote = [batch.tokens[b, batch.prompt_length[b] :][: len(POLICY[b])] for b in (1, 0)]
        drawn = torch.tensor(POLICY[1] + POLICY[0]).bool()
        assert torch.equal(micro.targets, torch.cat(wrote).where(drawn, -100))


@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_the_policy_learns_from_its_own_tokens(
    algorithm: str, tiny_trainer: Callable[..., AsyPPOTrainer], tiny_config: Callable[..., Any]
) -> None:
    """The gradient is that of a loss written down in plain torch over the policy's tokens alone."""
    config = tiny_config(algorithm=algorithm, entropy_coef=0.1, whiten="none", max_completion_length=8)
    trainer = tiny_trainer(config, lambda prompts, completions, **_: [0.0] * len(prompts))
    policy, batch = trainer.policy, batch_of()
    old = policy.logprobs(batch, trainer._micro_batches(batch))
    assert not bool(old.logprob[~batch.mask].any())
    assert not bool(old.entropy[~batch.mask].any())
    values = torch.rand(2, *batch.reward.shape) if trainer.critics is not None else None
    outcome = Outcome(batch.reward, batch.mask, batch.learned, batch.group, values, turns=batch.turns)
    signal = trainer.advantage(outcome, AdvantageOptions.of(config))
    assert not bool((signal.advantage_keep | signal.entropy_keep)[~batch.mask].any())
    expected = torch.zeros(())
    for b, drawn in enumerate(POLICY):
        tokens = batch.tokens[b, : int(batch.length[b])]
        logprobs = policy.model(tokens[None]).logits[0].float().log_softmax(-1)
        start = int(batch.prompt_length[b])
        for t in [t for t, own in enumerate(drawn) if own]:
            of = logprobs[start + t - 1]
            entropy = -(of.exp() * of).sum()
            gained = of[tokens[start + t]] * signal.advantage[b, t] * signal.advantage_keep[b, t]
            expected -= (gained + 0.1 * entropy * signal.entropy_keep[b, t]) / sum(drawn) / len(POLICY)
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    objective = trainer._objective(batch, signal, old.logprob)
    for micro in trainer._micro_batches(batch):
        policy(micro, replace(objective, targets=objective.targets.at(micro.grid))).loss.backward()
    for p, grad in zip(policy.parameters(), wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_critics_learn_in_the_states_after_turns_too(
    tiny_trainer: Callable[..., AsyPPOTrainer], tiny_config: Callable[..., Any]
) -> None:
    config = tiny_config(critic={"share": "all"}, max_completion_length=8, gamma=0.5)
    trainer = tiny_trainer(config, lambda prompts, completions, **_: [0.0] * len(prompts))
    batch = batch_of(scores=[torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0, 8.0, 0.0]), 4.0, 8.0])
    assert trainer.critics is not None
    own = [torch.arange(3)] * 2
    returns, _ = trainer._critic_targets(batch, own)
    # Steps are the policy's tokens. A state after a turn has the return of the turn's last token.
    first = [3.0, 6.0, 6.0, 0.0, 4.0, 8.0, 8.0]
    assert returns.tolist() == [[first, [2, 2, 4, 4, 0, 0, 0], [2, 4, 8, 0, 0, 0, 0]]] * 2
    values = trainer.critics.values(batch, 10_000)
    wanted = ((values - returns).square() * batch.value_mask).sum(dim=(1, 2)) / batch.value_mask.sum()
    row = trainer.update_critics(batch, None, torch.Generator().manual_seed(0))
    assert [row["critic/0/vf_loss"], row["critic/1/vf_loss"]] == pytest.approx(wanted.tolist(), rel=1e-5)


V = [0.5, 0.75, 0.25, 9.0, 0.5, 1.0, 0.375]
"""At the first row of POLICY: of its states, 0.25 and 0.375 after turns; 9 is of an answer's inside, which is no
state."""


@pytest.mark.parametrize(
    ("credit", "lam", "expected"),
    [
        # Differences: 0.25 at the first token; across the first answer 2 + 0.5 - 0.75; 0.5; across the last 4 - 1.
        ("keep", 1.0, [0.25 + 1.75 + 0.5 + 3, 1.75 + 0.5 + 3, 0, 0, 0.5 + 3, 3, 0]),
        ("keep", 0.5, [0.25 + 0.875 + 0.125 + 0.375, 1.75 + 0.25 + 0.75, 0, 0, 0.5 + 1.5, 3, 0]),
        # Up to the states after turns: 0.25 - 0.75 and 0.375 - 1.
        ("drop", 1.0, [0.25 - 0.5 + 0.5 - 0.625, -0.5 + 0.5 - 0.625, 0, 0, 0.5 - 0.625, -0.625, 0]),
        ("drop", 0.5, [0.25 - 0.25 + 0.125 - 0.078125, -0.5 + 0.25 - 0.15625, 0, 0, 0.5 - 0.3125, -0.625, 0]),
    ],
)
def test_credit_by_hand(credit: Any, lam: float, expected: list[float]) -> None:
    rewards = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 4.0, 0.0])
    batch = batch_of(POLICY[:1], [rewards])
    values = torch.tensor([[V], [V]]) + torch.tensor([-0.125, 0.125])[:, None, None]  # their mean is V
    outcome = Outcome(batch.reward, batch.mask, batch.learned, batch.group, values, turns=batch.turns)
    options = AdvantageOptions(lam=lam, whiten="none", environment_credit=credit)
    signal = critics_advantage(outcome, options)
    torch.testing.assert_close(signal.raw_advantage, torch.tensor([expected]))
    torch.testing.assert_close(signal.returns, torch.tensor([[6.0, 6, 6, 0, 4, 4, 4]]))
    torch.testing.assert_close(signal.value, torch.tensor([[0.5, 0.75, 0.25, 0, 0.5, 1.0, 0.375]]))
    # What others go by is the sum.
    of_group = group_advantage(replace(outcome, values=None), AdvantageOptions(scale_rewards="none"))
    assert of_group.returns[0, 0] == 6


def test_a_penalty_is_the_tokens_own() -> None:
    """What shaping takes off a turn's last token is no luck: it stays under ``drop``, and is over after the turn."""
    batch = batch_of(POLICY[:1], [torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 4.0, 0.0])])
    reward = batch.reward - 0.5 * batch.mask
    outcome = Outcome(reward, batch.mask, batch.learned, batch.group, torch.tensor([[V]]), turns=batch.turns)
    signal = critics_advantage(outcome, AdvantageOptions(lam=0.0, whiten="none", environment_credit="drop"))
    torch.testing.assert_close(signal.raw_advantage, torch.tensor([[-0.25, -1.0, 0, 0, 0.0, -1.125, 0]]))
    assert batch.turns is not None
    returns = returns_after_turns(torch.tensor([[4.0, 4.5, 0, 0, 3, 3.5, 0]]), reward, batch.turns)
    assert returns.tolist() == [[4.0, 4.5, 5.0, 0, 3, 3.5, 4.0]]


def test_dropped_luck_changes_no_expectation() -> None:
    """Over everything that can happen in two turns of two tokens, with an environment that answers by chance: under an
    exact V the expected policy gradient is the true one, with either credit and any λ; and without luck it varies
    less."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)  # turn, answer heard (0: none yet), first token or none
    logits.requires_grad_(True)
    chance = torch.rand(2, 2, 2, dtype=torch.float64) * 0.8 + 0.1  # of answer 1, by turn, and the turn's two tokens
    gain = torch.rand(2, 2, 2, 2, dtype=torch.float64)  # by turn, its two tokens, and the answer

    def policy(turn: int, heard: int, first: int | None, token: int) -> Tensor:
        place = 0 if first is None else 1
        return logits[turn, heard, place, first or 0].log_softmax(-1)[token]

    def answer(turn: int, a: int, b: int, said: int) -> float:
        p = float(chance[turn, a, b])
        return p if said else 1 - p

    def after_turn(turn: int, a: int, b: int) -> float:
        return sum(
            answer(turn, a, b, said)
            * (float(gain[turn, a, b, said]) + (before_turn(1, said + 1) if turn == 0 else 0.0))
            for said in (0, 1)
        )

    def after_token(turn: int, heard: int, a: int) -> float:
        return sum(float(policy(turn, heard, a, b).detach().exp()) * after_turn(turn, a, b) for b in (0, 1))

    def before_turn(turn: int, heard: int) -> float:
        return sum(float(policy(turn, heard, None, a).detach().exp()) * after_token(turn, heard, a) for a in (0, 1))

    drawn = torch.tensor([[1, 1, 0, 1, 1, 0]]).bool()
    after = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    found: dict[tuple[str, float], list[tuple[float, Tensor]]] = {}
    true = torch.zeros((), dtype=torch.float64)
    for a, b, said, c, d, heard in product((0, 1), repeat=6):
        logprobs = [policy(0, 0, None, a), policy(0, 0, a, b), policy(1, said + 1, None, c), policy(1, said + 1, c, d)]
        luck = answer(0, a, b, said) * answer(1, c, d, heard)
        gains = float(gain[0, a, b, said]), float(gain[1, c, d, heard])
        true = true + torch.stack(logprobs).sum().exp() * luck * sum(gains)
        value = [before_turn(0, 0), after_token(0, 0, a), after_turn(0, a, b)]
        value += [before_turn(1, said + 1), after_token(1, said + 1, c), after_turn(1, c, d)]
        reward = torch.tensor([[0, gains[0], 0, 0, gains[1], 0]])
        turns = Turns(after, reward * after)
        outcome = Outcome(reward, drawn, drawn, torch.zeros(1).long(), torch.tensor([[value]]), turns=turns)
        probability = float(torch.stack(logprobs).detach().sum().exp()) * luck
        for credit, lam in product(("keep", "drop"), (1.0, 0.6)):
            options: Any = AdvantageOptions(lam=lam, whiten="none", environment_credit=credit)
            advantage = critics_advantage(outcome, options).raw_advantage[0][drawn[0]].double()
            [gradient] = torch.autograd.grad((torch.stack(logprobs) * advantage).sum(), logits, retain_graph=True)
            found.setdefault((credit, lam), []).append((probability, gradient))
    [wanted] = torch.autograd.grad(true, logits)
    variance = {}
    for key, parts in found.items():
        mean = sum(p * g for p, g in parts)
        torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-4)
        variance[key] = float(sum(p * (g - wanted).square().sum() for p, g in parts))
    assert variance["drop", 1.0] < 0.5 * variance["keep", 1.0]
    assert variance["drop", 0.6] < variance["keep", 0.6]
