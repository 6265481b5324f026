"""SGD with momentum that survives a changing learning rate (Remark 2), and the parameters that decay (Sec. 5.1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import ParamsT

from lbsgd.algorithm.choices import MomentumForm
from lbsgd.errors import A_NETWORK, require_number, require_type

BIAS = re.compile(r"(\w+_)?bias(_[ih]h\w*)?")  # neither bias_k of attention nor relative_position_bias_table


class MomentumCorrectedSGD(torch.optim.SGD):
    """SGD with Nesterov momentum in either form of Sec. 3, where g = ∇L(w) + λ·w.

        lr_outside  (9)   u ← m·u + g                       w ← w − η_t·u           Nesterov: w ← w − η_t·(m·u + g)
        lr_inside  (10)   v ← m·(η_t/η_last)·v + η_t·g      w ← w − v               Nesterov: w ← w − (m·v + η_t·g)

    Both are the same, v = η·u, as long as (10) has the factor η_t/η_last, the momentum correction of Remark 2.
    `correction=False` leaves the factor out of (10), for comparison. (9) never needs it and is torch.optim.SGD, with
    its fused or foreach kernels. Applying the factor to (9) is a well-known bug.

    An update with η = 0 leaves w alone and changes only the momentum, except in (10) without correction. With
    correction, (10) then takes the last η that was not 0: v ← m·v + η_last·g, so that v = η_last·u still holds.

    Raises ValueError for an unknown form, for (9) with correction=False, for (10) with fused or foreach=False, and for
    a state_dict whose momentum has the other form.
    """

    # Under ZeRO, `step` runs several times per iteration, each time on one group of flat slices. So η_last is kept with
    # each parameter's momentum, in state[p]["last_lr"], and nothing here counts calls or looks at shapes.

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        form: MomentumForm = "lr_outside",
        correction: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if form not in get_args(MomentumForm):
            raise ValueError(f"momentum form {form!r} must be one of {get_args(MomentumForm)}")
        if form == "lr_outside" and not correction:
            raise ValueError(
                "momentum form 'lr_outside' is corrected by construction (Remark 2): correction cannot be False;"
                " form 'lr_inside' can do without it"
            )
        if form == "lr_inside" and (fused or foreach is False):
            raise ValueError("momentum form 'lr_inside' runs on foreach kernels only: leave fused and foreach unset")
        self.form, self.correction = form, correction  # before torch adds the groups, whose options depend on the form
        super().__init__(
            params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=foreach, fused=fused
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does. Raises ValueError for options of torch's SGD that form (10) does not have."""
        wrong = [name for name in ("maximize", "dampening") if param_group.get(name)]
        if wrong and self.form == "lr_inside":
            raise ValueError(f"momentum form 'lr_inside' has no {wrong[0]}: use form 'lr_outside', or leave it out")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"form": self.form, "correction": self.correction}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load momentum and groups as torch does. Raises ValueError if the momentum has the other form."""
        for state in state_dict["state"].values():
            if state.get("momentum_buffer") is not None and ("last_lr" in state) != (self.form == "lr_inside"):
                other = "lr_outside" if self.form == "lr_inside" else "lr_inside"
                raise ValueError(
                    f"this state holds momentum of form {other!r}, and the optimizer has form {self.form!r}: build it"
                    f" with form={other!r}, or leave the momentum out of the state"
                )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(  # type: ignore[override]  # one signature says what the supertype's two overloads say
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.form == "lr_outside":
            for group in self.param_groups:
                if group["fused"] and any(p.is_cpu for p in group["params"]):
                    self._lay_out(group["params"])
            _torch_step()(self)
            return loss
        for group in self.param_groups:
            self._step_lr_inside(group)
        return loss

    def _lay_out(self, params: list[torch.Tensor]) -> None:
        """Give gradients and momentum the strides of their weights, because torch's fused CPU kernel ignores strides.

        A hook may leave a gradient in another layout, and momentum read from a file is contiguous.
        """
        for p in params:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
            momentum = self.state[p].get("momentum_buffer") if p in self.state else None
            if momentum is not None and momentum.stride() != p.stride():
                self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum)

    def _step_lr_inside(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        lr, momentum = float(group["lr"]), group["momentum"]
        gradients = [p.grad for p in params]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        velocities = [self._velocity(p) for p in params]
        if lr == 0 and self.correction:
            for p, velocity, gradient in zip(params, velocities, gradients, strict=True):
                # Before the first η above 0 the group's factor takes its place: checkpoints keep one η for all groups.
                last_lr = self.state[p]["last_lr"] = self.state[p].get("last_lr") or lr_factor(group)
                velocity.mul_(momentum).add_(gradient, alpha=last_lr)
            return
        torch._foreach_mul_(velocities, [momentum * self._lr_ratio(p, lr) for p in params])
        torch._foreach_add_(velocities, gradients, alpha=lr)
        if group["nesterov"]:
            torch._foreach_add_(params, velocities, alpha=-momentum)
            torch._foreach_add_(params, gradients, alpha=-lr)
        else:
            torch._foreach_sub_(params, velocities)
        for p in params:
            self.state[p]["last_lr"] = lr

    def _velocity(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        velocity: torch.Tensor | None = state.get("momentum_buffer")  # a state_dict of torch's SGD may hold None
        if velocity is None:
            velocity = state["momentum_buffer"] = torch.zeros_like(p)
        return velocity

    def _lr_ratio(self, p: torch.Tensor, lr: float) -> float:
        """η_t/η_last of Remark 2; 1 before the first step, when v = 0 and needs no correction."""
        last_lr: float = self.state[p].get("last_lr", 0.0)
        return lr / last_lr if self.correction and last_lr else 1.0


def _torch_step() -> Callable[..., Any]:
    """Return torch.optim.SGD.step without the step hooks, which run around `MomentumCorrectedSGD.step` already.

    torch wraps a class's step with the hooks when it first builds an object of that class. So SGD.step has them as soon
    as anyone has built a plain SGD, and they would run twice per step.
    """
    step: Any = torch.optim.SGD.step
    unhooked: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return unhooked


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    on_batch_norm: bool = False,
    on_biases: bool = True,
    bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: λ on everything but batch norm's γ and β (Sec. 5.1), or on these too.

        [{"params": [...], "weight_decay": λ, "name": "decay"}, {..., "weight_decay": 0.0, "name": "batch_norm"}]

    The fully connected bias decays, and so do LayerNorm's and GroupNorm's parameters, because the paper exempts batch
    norm only. Frozen parameters and empty groups are left out, and a shared parameter is listed once. Batch norm is
    found by its type, at any depth and under any name.

    Detectors (Sec. 5.4) leave biases out of decay and train them at twice the learning rate: with on_biases=False or
    another bias_lr_factor, biases outside batch norm form a third group, {..., "name": "biases", "lr_factor": 2.0}. The
    schedule multiplies a group's learning rate by its lr_factor, 1 by default.

    Raises ValueError for a batch norm whose γ or β is part of another parameter, as in FSDP without use_orig_params,
    and for a weight_decay or a bias_lr_factor that is negative or not finite.
    """
    require_type(model, nn.Module, *A_NETWORK)
    require_number(weight_decay, "weight_decay")
    require_number(bias_lr_factor, "bias_lr_factor")
    gamma_beta = {
        p for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) for p in _affine(name, norm)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    apart = not on_biases or bias_lr_factor != 1.0
    biases = {p for module in model.modules() for p in biases_of(module)} - gamma_beta if apart else set()
    kinds = {
        "decay": ([p for p in trainable if p not in gamma_beta | biases], weight_decay),
        "batch_norm": ([p for p in trainable if p in gamma_beta], weight_decay if on_batch_norm else 0.0),
        "biases": ([p for p in trainable if p in biases], weight_decay if on_biases else 0.0),
    }
    factors = {"biases": {"lr_factor": bias_lr_factor}}
    return [
        {"params": params, "weight_decay": decay, "name": name, **factors.get(name, {})}
        for name, (params, decay) in kinds.items()
        if params
    ]


def _affine(name: str, norm: _BatchNorm) -> list[nn.Parameter]:
    """Return the batch norm's γ and β, or those of the two that it has."""
    own, fixed = dict(norm.named_parameters(recurse=False)), dict(norm.named_buffers(recurse=False))
    for part in ("weight", "bias"):
        held = {part, f"{part}_orig"} & (own | fixed).keys()  # torch.nn.utils.prune makes γ from weight_orig
        if getattr(norm, part, None) is not None and not held:
            raise ValueError(
                f"{part} of the batch norm {name} is part of another parameter, so weight decay cannot leave it out:"
                " use FSDP with use_orig_params=True"
            )
    return list(own.values())


def biases_of(module: nn.Module) -> list[nn.Parameter]:
    """Return a layer's own biases: its `bias`, and vectors such as in_proj_bias (attention) and bias_ih_l0 (LSTM)."""
    named = module.named_parameters(recurse=False)
    return [p for name, p in named if name == "bias" or (BIAS.fullmatch(name) and p.dim() <= 1)]


def lr_factor(group: dict[str, Any]) -> float:
    """Return the factor on a parameter group's learning rate; timm's layer decay calls it lr_scale."""
    factor: float = group.get("lr_factor", 1.0) * group.get("lr_scale", 1.0)
    return factor
