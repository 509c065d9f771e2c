"""What moves the parameters: AdamW alone, or Muon for the matrices and AdamW for the rest, as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba.distill.train_config import TrainConfig
from mmmamba.model.mixers import Part

KEPT = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what an optimizer remembers of a parameter


class Optimizers:
    """The optimizers of one training. Each moves other parameters.

    Muon (K. Jordan, 2024; PyTorch's) makes the momentum of a matrix orthogonal before it is added: all its directions
    move alike. It is scaled so that AdamW's learning rates serve it too.

    Args:
        trained: the parameters, by full name.
        rules: how each is treated: whether Muon may move it, whether it decays, a factor on its rate.
        config: which optimizer, and rates, betas, weight decay (on matrices only).
        device: theirs; on a GPU AdamW is fused, on a CPU Muon iterates in float32.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        rules: Mapping[str, Part],
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        uses_muon = config.optimizer == "muon"
        muon = {name: p for name, p in trained.items() if uses_muon and p.ndim == 2 and rules[name].matrix}
        rest = {name: p for name, p in trained.items() if name not in muon}
        self._all: list[torch.optim.Optimizer] = []
        if rest:
            self._all.append(
                torch.optim.AdamW(
                    _groups(rest, rules, config),
                    lr=config.lr,
                    betas=config.betas,
                    fused=self._on_gpu or None,
                    capturable=self._on_gpu and config.graph,
                )
            )
        if muon:
            kind = torch.optim.Muon if self._on_gpu else _Float32Muon
            self._all.append(kind(_groups(muon, rules, config), lr=config.lr, adjust_lr_fn="match_rms_adamw"))
        self.groups: list[dict[str, Any]] = [group for optimizer in self._all for group in optimizer.param_groups]
        self._owner = {p: optimizer for optimizer in self._all for g in optimizer.param_groups for p in g["params"]}

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step; each group's is ``lr_scale`` times that."""
        for group in self.groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]

    def zero_grad(self) -> None:
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self._all:
            optimizer.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the next step of a parameter depends on, beside its value and gradient."""
        return dict(self._owner[parameter].state[parameter])

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Lay down what :meth:`state_of` gave."""
        self._owner[parameter].state[parameter] = {
            # AdamW counts its steps on the host, unless it is fused.
            key: value if key == "step" and not self._on_gpu else value.to(parameter.device)
            for key, value in state.items()
        }


class _Float32Muon(torch.optim.Muon):
    """PyTorch's Muon, its Newton–Schulz iteration in float32.

    In bfloat16, which few CPUs multiply in, it takes up to 30 times as long: a third of a small model's step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # As large as AdamW's, by its root mean square ("match_rms_adamw").
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U V^T of a matrix U S V^T: its singular values near 1."""
    a, b, c = coefficients
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def _groups(
    trained: Mapping[str, nn.Parameter], rules: Mapping[str, Part], config: TrainConfig
) -> list[dict[str, Any]]:
    """One group for each (weight decay or not, factor on the learning rate)."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rule = rules[name]
        decays = parameter.ndim > 1 if rule.decays is None else rule.decays
        scale = next((config.lr_scale[part] for part in name.split(".") if part in config.lr_scale), 1.0) * rule.rate
        groups.setdefault((decays, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (decays, scale), parameters in groups.items()
    ]
