"""A loss of one's own, fused like the built-in ones: forward, derivative and metrics come from the one formula below.

    python examples/custom_loss.py

PPO's clip has no gradient outside of its range; here the ratio is pulled back instead, by a quadratic wall whose
steepness is annealed. The policy is a table of logits that learns which token is rewarded at each position.
"""

import torch

import rl4llm_fast as rf


@rf.token_loss("soft_wall", knobs={"eps": 0.2, "steepness": 1.0})
def soft_wall(m, logp, old, adv, eps, steepness):
    """−ρA + s·max(0, |log ρ| − ε)²."""
    log_rho = m.clamp(logp - old, -20.0, 20.0)
    beyond = m.maximum(m.abs(log_rho) - eps, 0.0)
    return -m.exp(log_rho) * adv + steepness * beyond * beyond


def train(steps: int = 40, positions: int = 16, vocabulary: int = 32, group: int = 64) -> tuple[float, float]:
    """The mean reward of the first and of the last step; a quarter of the vocabulary is rewarded."""
    torch.manual_seed(0)
    table = torch.zeros(positions, vocabulary, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    steepness = torch.tensor(1.0)  # a 0-d tensor: its value may change, nothing is compiled again
    history = []
    for step in range(steps):
        with torch.no_grad():
            tokens = torch.distributions.Categorical(logits=table).sample((group,))  # (group, positions)
            old = rf.token_logprobs(table.expand(group, -1, -1), tokens)
            rewards = (tokens % 4 == 0).float().mean(-1)
            advantages = rf.group_advantages(rewards, group_size=group)
        steepness.fill_(1.0 + step / steps)
        for _ in range(2):  # two updates on each batch: in the second ρ is no longer 1
            logp = rf.token_logprobs(table.expand(group, -1, -1), tokens)
            loss, metrics = rf.policy_loss(logp, old, advantages, kind="soft_wall", steepness=steepness)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(rewards.mean().item())
        if step % 10 == 9:
            print(f"step {step + 1}: reward {history[-1]:.2f}, ratio up to {metrics['ratio_max'].item():.2f}")
    return history[0], history[-1]


if __name__ == "__main__":
    first, last = train()
    print(f"mean reward {first:.2f} -> {last:.2f}")
