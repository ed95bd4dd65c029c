"""explain(model, ...): per layer, what a training step saves for backward and what it computes again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, UnsupportedModelError
from ..frozen import Recompute

HEAD = "outside of the layers"
# Samples and tokens each of three short batches: what is saved grows linearly with either.
_PROBES = ((2, 6), (4, 6), (2, 18))


@dataclass(frozen=True)
class LayerExplanation:
    """One layer, or what lies outside of them."""

    name: str
    predicted_bytes: int
    """What the batch would save, from two short ones."""
    saved_bytes: int
    """What it did save. A storage that several layers save counts for the first."""
    saved: tuple[str, ...]
    """Its tensors, by shape and dtype."""
    recomputed: tuple[tuple[str, int, int], ...]
    """Linear layers, norms and activations that backward runs again: name, bytes not saved, FLOPs."""


@dataclass(frozen=True)
class ModelExplanation:
    """What a training step on one batch keeps for backward. `str()` gives it as a table."""

    layers: tuple[LayerExplanation, ...] = field(repr=False)
    predicted_bytes: int
    saved_bytes: int
    recompute_flops: int
    """Matrix products in backward that saving would have spared."""

    def __str__(self) -> str:
        lines = [f"{'layer':28} {'predicted':>12} {'saved':>12} {'not saved':>12} {'MFLOP again':>12}"]
        for layer in self.layers:
            spared, flops = (sum(row[i] for row in layer.recomputed) for i in (1, 2))
            sizes = f"{layer.predicted_bytes:12,} {layer.saved_bytes:12,} {spared:12,}"
            lines.append(f"{layer.name:28} {sizes} {flops / 1e6:12.1f}")
            lines += [f"    saved {text}" for text in layer.saved]
            lines += [f"    again {name}" for name, _, _ in layer.recomputed]
        total = f"{self.predicted_bytes:12,} {self.saved_bytes:12,}"
        return "\n".join([*lines, f"{'all':28} {total} {'':12} {self.recompute_flops / 1e6:12.1f}"])


def explain(model: nn.Module, inputs: dict[str, Tensor]) -> ModelExplanation:
    """What a training step of `model`, patched or not, would save for backward on this batch.

    Runs forward as the model is (train or eval mode): on short batches of the same kind, for the prediction,
    and on `inputs`. No gradient is computed, and random numbers are given back.

    Args:
        model: holds a transformers model whose layers are one nn.ModuleList.
        inputs: keyword arguments of model.forward; every tensor is (B, ...), those of tokens (B, N).

    Raises:
        UnsupportedModelError: no list of layers.
        InvalidArgumentError: no (B, N) input_ids among the inputs.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InvalidArgumentError("inputs", f"without (B, N) input_ids: {sorted(inputs)}", "model's inputs")
    recomputes = _recomputes(model)
    if any(not recompute.planned for recompute in recomputes):
        _measure(model, _probe(inputs, *_PROBES[0], padded=False), recomputes)
    measured = _measure(model, inputs, recomputes)
    probes = [
        _measure(model, _probe(inputs, *shape, padded=measured.packed), recomputes) for shape in _PROBES
    ]
    at = torch.tensor([probe.place for probe in probes], dtype=torch.float64)
    here = torch.tensor(measured.place, dtype=torch.float64)
    layers = []
    for name in [*_layers(model), HEAD]:
        sizes = torch.tensor([sum(_bytes_of(probe.tensors[name])) for probe in probes], dtype=torch.float64)
        predicted = round(float(here @ torch.linalg.solve(at, sizes)))
        kept = measured.tensors[name]
        saved = sum(_bytes_of(kept))
        layers.append(LayerExplanation(name, predicted, saved, _describe(kept), measured.recomputed[name]))
    return ModelExplanation(
        tuple(layers),
        sum(layer.predicted_bytes for layer in layers),
        sum(layer.saved_bytes for layer in layers),
        sum(flops for layer in layers for _, _, flops in layer.recomputed),
    )


@dataclass
class _Pass:
    """What one forward pass did."""

    tensors: dict[str, list[Tensor]]  # kept, by layer; each storage once
    recomputed: dict[str, tuple[tuple[str, int, int], ...]]
    place: tuple[int, int, int] = (1, 0, 0)  # one, samples, tokens: what bytes are a linear function of
    packed: bool = False


def _measure(model: nn.Module, inputs: dict, recomputes: list[Recompute]) -> _Pass:
    layers = _layers(model)
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}
    done = _Pass(defaultdict(list), defaultdict(tuple))
    now = [HEAD]

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in seen:
            seen[address] = tensor.detach()
            done.tensors[now[-1]].append(seen[address])
        return tensor.detach()

    def enter(name: str):
        return lambda module, args: now.append(name)

    handles = [layer.register_forward_pre_hook(enter(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(lambda m, a, out: now.append(HEAD)) for layer in layers.values()]
    try:
        counting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with _observing(recomputes), torch.random.fork_rng(), torch.enable_grad(), counting:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = ids.numel() if mask is None else int(mask.sum())
    rows = {x.shape[1] for kept in done.tensors.values() for x in kept if x.dim() == 3 and x.shape[0] == 1}
    done.packed = real < ids.numel() and real in rows
    done.place = (1, len(ids), real if done.packed else ids.numel())
    for name, layer in layers.items():
        names = {module: path for path, module in layer.named_modules()}
        sites = [site for r in recomputes for site in r.sites if site.module in names and site.needed]
        done.recomputed[name] = tuple((names[s.module], s.bytes, s.flops) for s in sites)
    return done


@contextmanager
def _observing(recomputes: list[Recompute]) -> Iterator[None]:
    for recompute in recomputes:
        recompute.observed = True
    try:
        yield
    finally:
        for recompute in recomputes:
            recompute.observed = False


def _recomputes(model: nn.Module) -> list[Recompute]:
    from .patch import recompute_of

    return [found for module in model.modules() if (found := recompute_of(module)) is not None]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The longest list of layers, by name."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of layers")
    path, layers = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    short = path.removeprefix("base_model.model.")
    return {f"{short}.{i}": layer for i, layer in enumerate(layers)}


def _probe(inputs: dict, samples: int, tokens: int, *, padded: bool) -> dict:
    """A batch of that shape, cut from this one; padded: all samples but the first lack their last token."""
    batch, seqlen = inputs["input_ids"].shape

    def cut(x):
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        rows = x[torch.arange(samples) % batch]
        per_token = x.dim() > 1 and x.shape[1] == seqlen
        return rows[:, torch.arange(tokens) % seqlen] if per_token else rows

    probe = {name: cut(x) for name, x in inputs.items()}
    if probe.get("attention_mask") is not None:
        probe["attention_mask"] = torch.ones_like(probe["attention_mask"])
        if padded:
            probe["attention_mask"][1:, -1] = 0
    return probe


def _bytes_of(tensors: list[Tensor]) -> list[int]:
    return [x.untyped_storage().nbytes() for x in tensors]


def _describe(tensors: list[Tensor]) -> tuple[str, ...]:
    counts = Counter((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors)
    return tuple(f"{count} x {shape} {dtype}" for (shape, dtype), count in counts.items())
