"""How the weights move: Muon for the matrices of the blocks, AdamW for the rest, and one schedule for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalize(x: Tensor) -> Tensor:
    """Return about U V^T of x = U S V^T, by Newton-Schulz iteration (Jordan et al. 2024, "Muon")."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices within the blocks: every direction is learnt at one pace.

    Fewer steps than AdamW for the same loss, which counts where each costs seconds. (torch.optim.Muon iterates in
    bfloat16, which is slow on most CPUs; this one stays in float32.)
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(mean, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


def make_optimizers(
    model: nn.Module, kind: str, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return AdamW for embeddings and norms, and for the blocks' matrices Muon, or AdamW if that is the `kind`."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("layers.")]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adam = [{"params": tables, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    if kind == "adamw":
        adam[0]["params"] = tables + matrices
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98))]
    if kind == "muon":
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def decay(step: int, steps: int) -> float:
    """Return 1 over the first half of the steps, then a straight line down to 0: for learning rates and dropout."""
    return min(1.0, (steps - step) / (0.5 * steps))


def rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate: `decay`, with a warm-up of 40 steps."""
    return min((step + 1) / 40, decay(step, steps))
