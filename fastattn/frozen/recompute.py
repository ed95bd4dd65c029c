"""Saving x in place of what a frozen layer makes of it: outputs of linear layers, norms and activations that
backward needs are computed once more, by the modules themselves, from tensors that are kept anyway.

In a layer with frozen projections that is q, k and v and the input of the activation, most of what training
an adapter holds in memory. The numbers are the same to the bit, as the same modules run on the same inputs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ..log import log_once
from .modules import Kind, kind_of
from .recorder import Recorder, current
from .rerun import Running

# What recompute="auto" may spend, as a share of the step's arithmetic in linear layers.
BUDGET = 0.15


@dataclass(eq=False)
class Site:
    """A module whose output may be computed again."""

    parent: nn.Module
    name: str
    module: nn.Module
    kind: Kind
    chosen: bool = True
    is_trained: bool = False  # a parameter in it
    # Numbers in its matrices, all and trained:
    weights: int = 0
    trained_weights: int = 0
    # Of the last pass that was recorded, all calls of the module together:
    needed: bool = False  # backward needs the output
    flops: int = 0
    step_flops: int = 0  # forward and backward together
    bytes: int = 0

    def look_at_parameters(self) -> None:
        parameters = list(self.module.parameters())
        matrices = [p for p in parameters if p.dim() == 2] if self.kind is Kind.LINEAR else []
        self.is_trained = any(p.requires_grad for p in parameters)
        self.weights = sum(p.numel() for p in matrices)
        self.trained_weights = sum(p.numel() for p in matrices if p.requires_grad)

    def begin(self) -> None:
        self.needed, self.flops, self.step_flops, self.bytes = False, 0, 0, 0

    def note_call(self, x: Tensor) -> None:
        """Add the arithmetic of this call of the module. Whether its output is needed shows later."""
        rows = x.numel() // max(1, x.shape[-1])
        self.flops += 2 * rows * self.weights
        self.step_flops += 2 * rows * (self.weights * (1 + x.requires_grad) + self.trained_weights)

    def need(self) -> None:
        self.needed = True


@dataclass(eq=False)
class Recompute:
    """What `attach` did to one model."""

    mode: str  # "auto" or "all"
    sites: list[Site] = field(default_factory=list)
    planned: bool = False
    trained: tuple[bool, ...] = ()  # which parameters were, when it was planned
    observed: bool = False  # sites note every pass, for whoever explains it
    handles: list[RemovableHandle] = field(default_factory=list)
    site_handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, model: nn.Module) -> Recompute:
        """From now on, forward passes of `model` with gradients save less."""
        self.handles = [
            model.register_forward_pre_hook(OpenRecorder(self)),
            model.register_forward_hook(CloseRecorder(self), always_call=True),
        ]
        self._find_sites(model)
        return self

    def detach(self) -> None:
        for handle in (*self.handles, *self.site_handles):
            handle.remove()
        self.sites = []

    def refresh(self, model: nn.Module) -> None:
        """Adapters may have been put in or taken out since, weights frozen or set free."""
        if any(site.parent._modules.get(site.name) is not site.module for site in self.sites):
            self._find_sites(model)
        trained = tuple(parameter.requires_grad for parameter in model.parameters())
        if trained != self.trained:
            self.trained, self.planned = trained, False
            for site in self.sites:
                site.chosen = True
                site.look_at_parameters()

    @property
    def notes(self) -> bool:
        """Whether sites write down what this pass does."""
        return self.observed or not self.planned

    def _find_sites(self, model: nn.Module) -> None:
        for handle in self.site_handles:
            handle.remove()
        self.sites, self.site_handles, self.planned, self.trained = [], [], False, ()
        for parent, name, module in _leaves(model):
            kind = kind_of(module)
            if isinstance(kind, str):
                log_once(f"recompute leaves {type(module).__name__} as it is: {kind}")
            elif kind is not None:
                site = Site(parent, name, module, kind)
                self.sites.append(site)
                self.site_handles += [
                    module.register_forward_pre_hook(_Before(site), with_kwargs=True),
                    module.register_forward_hook(_After(site), prepend=True),
                ]

    def plan(self) -> None:
        """Choose, by the pass just recorded, what is worth its time."""
        needed = [site for site in self.sites if site.needed]
        self.planned = bool(needed)
        if self.mode == "all":
            return
        left = BUDGET * sum(site.step_flops for site in self.sites)
        for site in sorted(needed, key=lambda site: site.flops / max(1, site.bytes)):
            site.chosen = site.flops <= left
            left -= site.flops if site.chosen else 0


def _leaves(module: nn.Module):
    """(parent, name, module) of every module that is one thing to us: an adapter with all that it wraps."""
    for name, child in module.named_children():
        yield module, name, child
        if kind_of(child) is None:
            yield from _leaves(child)


def _is_sharded(model: nn.Module) -> bool:
    """Whether parts of it are gathered and given up by turns."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    if fsdp is None:
        return False
    return any(isinstance(m, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for m in model.modules())


@dataclass(frozen=True)
class OpenRecorder:
    """Before the model."""

    recompute: Recompute

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
            return
        if torch._C._are_functorch_transforms_active():
            log_once("recompute does nothing under torch.func, which allows no saved-tensor hooks")
            return
        if _has_any_global_hook():
            log_once("recompute does nothing while hooks are registered for all modules")
            return
        if _is_sharded(model):
            log_once(
                "recompute does nothing under FSDP: a layer's weights are there while it runs, not later"
            )
            return
        self.recompute.refresh(model)
        for site in self.recompute.sites if self.recompute.notes else ():
            site.begin()
        Recorder(self.recompute).open()


@dataclass(frozen=True)
class CloseRecorder:
    """Behind it, also after an exception."""

    recompute: Recompute

    def __call__(self, model: nn.Module, args: tuple, output) -> None:
        if torch.compiler.is_compiling():
            return
        recorder = current()
        if recorder is not None and recorder.owner is self.recompute:
            recorder.close()
            if output is not None and not self.recompute.planned:
                self.recompute.plan()


@dataclass(frozen=True)
class _Before:
    """Before a site."""

    site: Site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        recorder = current()
        if recorder is None or not self.site.chosen or not torch.is_grad_enabled():
            return
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return
        if not (args[0].requires_grad or self.site.is_trained):  # its output will need no gradient
            if recorder.owner.notes:
                self.site.note_call(args[0])
        elif self._is_itself(module):
            recorder.running.append(Running(module, args[0], recorder, self.site.kind is Kind.POINTWISE))

    def _is_itself(self, module: nn.Module) -> bool:
        """What runs between the two hooks is the class's forward, and running it once more has no further
        effect."""
        reason = None
        if "forward" in vars(module):
            reason = "its forward was replaced"
        elif next(reversed(module._forward_pre_hooks.values())) is not self or not isinstance(
            next(iter(module._forward_hooks.values())), _After
        ):
            reason = "somebody's hook runs between fastattn's and its forward"
        elif any(m is not module and (m._forward_hooks or m._forward_pre_hooks) for m in module.modules()):
            reason = "hooks within it would run twice"
        if reason is not None:
            log_once(f"recompute leaves {type(module).__name__} as it is: {reason}")
        return reason is None


@dataclass(frozen=True)
class _After:
    """Behind it."""

    site: Site

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        if torch.compiler.is_compiling():
            return
        recorder = current()
        if recorder is None or not recorder.running or recorder.running[-1].module is not module:
            return
        running = recorder.running.pop()
        if not isinstance(output, Tensor):
            return
        if recorder.owner.notes:
            self.site.note_call(args[0])
            self.site.bytes += output.numel() * output.element_size()
        if output.requires_grad:
            recorder.offer(output, running.rerun.output, args[0], on_need=self.site.need)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody else would miss a call of it: a hook that is not recompute's, or a forward put in."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(not isinstance(hook, (_Before, _After)) for hook in hooks):
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks) or "forward" in vars(module)
