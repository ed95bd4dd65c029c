"""FeatureCache: right features, found again exactly when they are the same, and nothing else."""

import pytest
import torch
from torch import nn

from fastattn.errors import InvalidArgumentError
from fastattn.frozen import FeatureCache


class Output:
    def __init__(self, hidden):
        self.last_hidden_state = hidden


class Config:
    """As much of transformers' as is looked at."""

    heads = 2

    def to_dict(self) -> dict:
        return {"heads": self.heads, "_name_or_path": self}


class Backbone(nn.Module):
    """Sums over real tokens, so that every one counts; `calls` says how many rows it has seen."""

    def __init__(self):
        super().__init__()
        self.config, self.norm = Config(), nn.LayerNorm(8, elementwise_affine=False)
        torch.manual_seed(0)
        self.embed, self.mix, self.top = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.zeros(8))
        self.calls = []
        self.requires_grad_(False).eval()

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        self.calls.append(len(input_ids))
        x = self.embed(input_ids) * attention_mask[..., None]
        if token_type_ids is not None:
            x = x * (1 + token_type_ids[..., None])
        x = self.dropout(self.mix(self.norm(x.cumsum(1))))
        return Output(torch.tanh(x + x.sum(1, keepdim=True) + self.shift))


def inputs(seed: int = 0, rows: int = 4, length: int = 6) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain(backbone, batch):
    with torch.no_grad():
        return backbone(**batch).last_hidden_state[:, 0]


def test_the_second_epoch_costs_the_head_alone():
    backbone, head = Backbone(), nn.Linear(8, 3)
    cache = FeatureCache(backbone)
    batches = [inputs(seed) for seed in range(3)]
    expected = [plain(backbone, batch) for batch in batches]
    backbone.calls.clear()
    for _ in range(2):
        for batch, features in zip(batches, expected, strict=True):
            found = cache(**batch)
            torch.testing.assert_close(found, features)
            head(found).sum().backward()
    assert backbone.calls == [4, 4, 4]
    assert (cache.hits, cache.misses, len(cache)) == (12, 12, 12)
    assert head.weight.grad is not None


def test_texts_are_found_in_other_batches_and_other_padding():
    backbone = Backbone()
    cache = FeatureCache(backbone)
    batch = inputs()
    first = cache(**batch)
    wider = {name: nn.functional.pad(x, (0, 5)) for name, x in batch.items()}
    assert torch.equal(cache(**{name: x[[2, 0, 2]] for name, x in wider.items()}), first[[2, 0, 2]])
    assert cache.misses == 4
    mixed = {name: torch.cat([x[:1], inputs(9)[name][:1]]) for name, x in batch.items()}
    assert torch.equal(cache(**mixed)[0], first[0])
    assert backbone.calls == [4, 1]


def test_the_same_text_twice_in_a_batch_is_computed_once():
    backbone = Backbone()
    twice = {name: x[[0, 1, 0]] for name, x in inputs().items()}
    found = FeatureCache(backbone)(**twice)
    assert backbone.calls == [2]
    torch.testing.assert_close(found, plain(backbone, twice))


@pytest.mark.parametrize(
    "change", ["token", "mask", "weight", "buffer", "dtype", "types", "config", "module", "features"]
)
def test_whatever_shapes_the_features_is_in_the_key(change, tmp_path):
    backbone = Backbone()
    cache = FeatureCache(backbone, directory=tmp_path)
    batch = inputs(rows=1)
    cache(**batch)
    with torch.no_grad():
        if change == "token":
            batch["input_ids"][0, 0] += 1
        elif change == "mask":
            batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
            batch["attention_mask"][0, 0] = 1
        elif change == "weight":
            backbone.mix.weight[3, 3] += 1e-6
        elif change == "buffer":
            backbone.shift += 1
        elif change == "dtype":
            backbone.to(torch.float64)
        elif change == "config":
            backbone.config.heads = 4
        elif change == "module":
            backbone.norm.eps = 1e-3
        elif change == "types":
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        else:
            other = FeatureCache(backbone, features="mean", directory=tmp_path)
            other(**batch)
            assert other.misses == 1
            return
    cache(**batch)
    assert cache.misses == 2


def test_on_disk(tmp_path):
    batch = inputs()
    first = FeatureCache(Backbone(), directory=tmp_path / "features")(**batch)
    backbone = Backbone()
    again = FeatureCache(backbone, directory=tmp_path / "features")
    assert torch.equal(again(**batch), first)
    assert backbone.calls == []
    assert not list((tmp_path / "features").glob("*.part"))
    with torch.no_grad():
        backbone.mix.bias += 1
    assert not torch.equal(again(**batch), first)


@pytest.mark.parametrize("found", [True, False])
def test_a_backbone_in_training_mode_is_refused(found):
    backbone = Backbone()
    cache = FeatureCache(backbone)
    if found:
        cache(**inputs())
    backbone.dropout.train()
    with pytest.raises(InvalidArgumentError, match=r"in training mode \(dropout\)"):
        cache(**inputs())


def test_autocast_is_in_the_key():
    backbone = Backbone()
    cache = FeatureCache(backbone)
    exact = cache(**inputs())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert not torch.equal(cache(**inputs()), exact)
    assert cache.misses == 12
    assert torch.equal(cache(**inputs()), exact)
    assert cache.misses == 12


def test_padding_in_front_moves_positions():
    cache = FeatureCache(Backbone())
    cache(**inputs())
    cache(**{name: nn.functional.pad(x, (3, 0)) for name, x in inputs().items()})
    assert cache.misses == 8


def test_trained_weights_are_refused_only_where_they_count():
    backbone = Backbone()
    backbone.top.weight.requires_grad_(True)
    cache = FeatureCache(backbone)
    cache(**inputs())
    with torch.no_grad():
        backbone.top.weight += 1  # trains, but nobody reads it
    cache(**inputs())
    assert backbone.calls == [4]
    backbone.mix.weight.requires_grad_(True)
    with pytest.raises(InvalidArgumentError, match="frozen"):
        cache(**inputs())


def test_inputs_of_other_shapes_are_refused():
    batch = inputs()
    with pytest.raises(InvalidArgumentError, match="attention_mask"):
        FeatureCache(Backbone())(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"][:, :3])


def test_features_by_name():
    backbone, batch = Backbone(), inputs()
    hidden = backbone(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1)
    expected = {
        "first": hidden[:, 0],
        "last": torch.stack([h[n - 1] for h, n in zip(hidden, lengths, strict=True)]),
        "mean": torch.stack([h[:n].mean(0) for h, n in zip(hidden, lengths, strict=True)]),
    }
    for name, features in expected.items():
        torch.testing.assert_close(FeatureCache(backbone, features=name)(**batch), features)
    with pytest.raises(InvalidArgumentError, match="'first', 'last', 'mean', 'pooler'"):
        FeatureCache(backbone, features="second")
