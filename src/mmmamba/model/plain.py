"""Whether a module may be passed by: its weight read, several products made one, a pass done another way.

Adapters, hooks, parametrisations, pruning, quantisation and offloading all change what a module's *call* does. Whoever
reads a weight without calling its module asks here first, and calls the module where the answer is no.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling each of these modules does what ``kind.forward`` does, and nothing else.

    No wrapper of ``kind`` and no subclass with another ``forward``, no hook of any sort, no parametrisation, no
    ``forward`` put on the instance (accelerate's way), no compiled call; and, of an ``nn.Linear`` or ``nn.Embedding``,
    that very class and a weight that is an ordinary parameter.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        own, torchs = module.__dict__, kind is nn.Linear or kind is nn.Embedding
        if type(module) is not kind and (torchs or getattr(type(module), "forward", None) is not kind.forward):
            return False
        if "parametrizations" in own["_modules"]:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if own.get("_compiled_call_impl") is not None:
            return False
        forward = own.get("forward")  # accelerate, when it is taken off again, leaves the class's own there
        if forward is not None and getattr(forward, "__func__", None) is not kind.forward:
            return False
        if torchs and type(own["_parameters"].get("weight")) is not nn.Parameter:
            return False
    return True


def weight_of(module: nn.Module) -> Tensor | None:
    """The tensor that a module calls its weight, whatever the module is; None where there is none.

    A quantised module has a method of that name.
    """
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's calls run: where its parameters lie, or where accelerate brings them; None without either."""
    device: torch.device | None = None
    for parameter in module.parameters():
        device = parameter.device
        if device.type != "meta":
            return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            executes = getattr(one, "execution_device", None)
            if executes is not None:
                return torch.device("cuda", executes) if isinstance(executes, int) else torch.device(executes)
    return device
