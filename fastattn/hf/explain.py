"""explain(model, ...): per layer, what a training step saves for backward and what it computes again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..frozen import Recompute
from .lost_cut import lost_cut
from .rotary import rotating
from .short_batches import Batch

HEAD = "outside of the layers"


@dataclass(frozen=True)
class LayerExplanation:
    """One layer, or what lies outside of them."""

    name: str
    predicted_bytes: int
    """What the batch would save, from short ones."""
    saved_bytes: int
    """What it did save. A storage that several layers save counts for the first."""
    saved: tuple[str, ...]
    """Its tensors, by shape and dtype."""
    predicted_flops: int
    """As recompute_flops, from the short batches."""
    recomputed: tuple[tuple[str, int, int], ...]
    """Linear layers, norms and activations that backward runs again: name, bytes not saved, FLOPs; of all
    calls together where layers share weights."""

    @property
    def recompute_flops(self) -> int:
        """Matrix products in backward that saving would have spared."""
        return sum(flops for _, _, flops in self.recomputed)


@dataclass(frozen=True)
class ModelExplanation:
    """What a training step on one batch keeps for backward. `str()` gives it as a table."""

    layers: tuple[LayerExplanation, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    """Why more is saved than need be, if so."""
    rotary_layers: int = 0
    """Layers that turn q and k by fastattn.rotary, outside of torch.compile."""

    @property
    def predicted_bytes(self) -> int:
        return sum(layer.predicted_bytes for layer in self.layers)

    @property
    def saved_bytes(self) -> int:
        return sum(layer.saved_bytes for layer in self.layers)

    @property
    def predicted_flops(self) -> int:
        return sum(layer.predicted_flops for layer in self.layers)

    @property
    def recompute_flops(self) -> int:
        return sum(layer.recompute_flops for layer in self.layers)

    def __str__(self) -> str:
        width = max(28, *(len(layer.name) for layer in self.layers))
        titles = ("predicted", "saved", "not saved", "MFLOP predicted", "MFLOP again")
        lines = [f"{'layer':{width}} " + " ".join(f"{title:>15}" for title in titles)]
        spared = 0
        for layer in self.layers:
            lines.append(_line(layer.name, width, layer, sum(size for _, size, _ in layer.recomputed)))
            lines += [f"    saved {text}" for text in layer.saved]
            lines += [f"    again {name}" for name, _, _ in layer.recomputed]
            spared += sum(size for _, size, _ in layer.recomputed)
        lines.append(_line("all", width, self, spared))
        if self.rotary_layers:
            lines.append(f"rotary positions: {self.rotary_layers} layers by fastattn.rotary")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _line(name: str, width: int, part: LayerExplanation | ModelExplanation, spared: int) -> str:
    sizes = " ".join(f"{size:15,}" for size in (part.predicted_bytes, part.saved_bytes, spared))
    flops = " ".join(f"{flops / 1e6:15.1f}" for flops in (part.predicted_flops, part.recompute_flops))
    return f"{name:{width}} {sizes} {flops}"


def explain(model: nn.Module, inputs: dict[str, Tensor]) -> ModelExplanation:
    """What a training step of `model`, patched or not, would save for backward on this batch.

    Runs forward as the model is (train or eval mode): on short batches of the same kind, for the prediction,
    and on `inputs`. No gradient is computed, and random numbers are given back.

    Args:
        model: holds a transformers model whose layers are in nn.ModuleLists: one, or, of an encoder-decoder,
            one for each stack.
        inputs: keyword arguments of model.forward; every tensor is (B, ...), those of tokens (B, N), those of
            an encoder-decoder's targets (labels, decoder_...) (B, M). What has another shape, such as images
            and recordings, is cut to fewer samples only.

    Raises:
        UnsupportedModelError: no list of layers.
        InvalidArgumentError: an input is no (B, ...) tensor, or there is none.
    """
    batch = Batch.of(model, inputs)
    recomputes = _recomputes(model)
    if recomputes:  # they plan in a first pass, and once more after weights were frozen or set free
        _measure(model, next(batch.probes(padded=False)), recomputes)
    measured = _measure(model, batch, recomputes)
    probes = [_measure(model, probe, recomputes) for probe in batch.probes(padded=measured.packed)]
    names = [*_layers(model), HEAD]
    known = [[*probe.bytes(names), *probe.flops(names)] for probe in probes]
    predicted = _extrapolated([probe.place for probe in probes], known, measured.place)
    predicted = zip(names, predicted[: len(names)], predicted[len(names) :], strict=True)
    return ModelExplanation(
        tuple(measured.explained(*layer) for layer in predicted),
        notes=tuple(dict.fromkeys(measured.notes)),
        rotary_layers=rotating(model),
    )


def _extrapolated(places: list[tuple], known: list[list[int]], here: tuple) -> list[int]:
    """The linear function of `places` that is `known`, here. What all places have alike is alike here."""
    at, known, here = (torch.tensor(x, dtype=torch.float64) for x in (places, known, here))
    unit = here.clamp(min=1)
    solution = torch.linalg.lstsq(at / unit, known, driver="gelsd").solution
    return (here / unit @ solution).round().long().tolist()


@dataclass
class _Pass:
    """What one forward pass did."""

    batch: Batch
    tensors: dict[str, list[Tensor]]  # kept, by layer; each storage once
    recomputed: dict[str, tuple[tuple[str, int, int], ...]]
    rows: dict[str, int]  # that went into a list of layers
    packed: bool = False
    notes: list[str] = field(default_factory=list)

    def bytes(self, names: list[str]) -> list[int]:
        return [sum(x.untyped_storage().nbytes() for x in self.tensors[name]) for name in names]

    def flops(self, names: list[str]) -> list[int]:
        return [sum(flops for _, _, flops in self.recomputed[name]) for name in names]

    def explained(self, name: str, predicted_bytes: int, predicted_flops: int) -> LayerExplanation:
        kept = self.tensors[name]
        saved, again = sum(self.bytes([name])), self.recomputed[name]
        return LayerExplanation(name, predicted_bytes, saved, _describe(kept), predicted_flops, again)

    @property
    def place(self) -> tuple[int, ...]:
        """What bytes and FLOPs are a linear function of."""
        samples, source, target = self.batch.shape
        linear = (1, samples, samples * source, samples * target)
        if self.packed:
            return (*linear, *self.rows.values())
        return (*linear, *(samples * pairs for pairs in (source * source, target * target, source * target)))


def _measure(model: nn.Module, batch: Batch, recomputes: list[Recompute]) -> _Pass:
    layers = _layers(model)
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}
    done = _Pass(batch, defaultdict(list), defaultdict(tuple), {})
    now = [HEAD]
    asks_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in batch.inputs.values())

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in seen:
            seen[address] = tensor.detach()
            done.tensors[now[-1]].append(seen[address])
        return tensor.detach()

    def enter(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            now.append(name)
            path, _, index = name.rpartition(".")
            if index == "0" and not asks_gradient:
                stack = [other for key, other in layers.items() if key.rpartition(".")[0] == path]
                if (note := lost_cut(stack, args, kwargs)) is not None:
                    done.notes.append(note)
            hidden = args[0] if args else kwargs["hidden_states"]
            done.rows[path] = hidden.numel() // hidden.shape[-1]
            alone = hidden.shape[0] == 1 and batch.shape[0] > 1
            done.packed = done.packed or alone or kwargs.get("cu_seq_lens_q") is not None

        return hook

    handles = [
        layer.register_forward_pre_hook(enter(name), with_kwargs=True) for name, layer in layers.items()
    ]
    handles += [layer.register_forward_hook(lambda m, a, out: now.append(HEAD)) for layer in layers.values()]
    try:
        counting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with _observing(recomputes), torch.random.fork_rng(), torch.enable_grad(), counting:
            model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    places = {module: (HEAD, path) for path, module in model.named_modules()}
    for name, layer in layers.items():
        places.update({module: (name, path) for path, module in layer.named_modules()})
    for site in (site for recompute in recomputes for site in recompute.sites if site.needed):
        name, path = places[site.module]
        done.recomputed[name] += ((path, site.bytes, site.flops),)
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
    """The layers in every list that lies in no other, by name."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in module.parameters()):
            lists[path] = module
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of layers")
    return {
        f"{path.removeprefix('base_model.model.')}.{i}": layer
        for path, layers in lists.items()
        for i, layer in enumerate(layers)
    }


def _describe(tensors: list[Tensor]) -> tuple[str, ...]:
    counts = Counter((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors)
    return tuple(f"{count} x {shape} {dtype}" for (shape, dtype), count in counts.items())
