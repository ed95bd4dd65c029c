"""The training loop: what is trained, exact resumption, fp32 masters, and the count of saved bytes."""

import dataclasses

import pytest
import torch
from torch import nn

from fastattn.finetune import encoding, measure
from fastattn.finetune.command import DEFAULTS
from fastattn.finetune.datasets import load_file
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.methods import head_modules
from fastattn.finetune.settings import Settings, check_method, default_lr
from fastattn.finetune.training import AdamWithMasters, Trainer

METHODS = ("head", "lora", "prefix", "prompt", "last-1", "bitfit", "ln", "full")
TEXT = 12  # tokens; the tiny model reads 32, of which prefix and prompt tuning take 20


@pytest.fixture
def make_trainer(tmp_path, tiny_model, table):
    from transformers import AutoTokenizer

    path = tmp_path / "encoded.npz"
    encoding.encode_dataset(
        load_file(table, "text", "label"), AutoTokenizer.from_pretrained(tiny_model), TEXT, path
    )
    values = {"model": tiny_model, "data": table, "train": "head", "lr": 0.01, "batch_size": 8}
    base = Settings(**{**DEFAULTS, **values, "backbone_dtype": "float32"})

    def make(attention="sdpa", dropout=True, **changes) -> Trainer:
        if "dtype" in changes:
            changes = {"backbone_dtype": changes["dtype"], **changes}
        settings = dataclasses.replace(base, **changes)
        trainer = Trainer(settings.to_json(), ["no", "yes"], attention, str(path))
        trainer.prepare(dropout=dropout)
        return trainer

    return make


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_methods_train_what_they_say(make_trainer):
    trained = {
        method: trained_names(make_trainer(train=method).model)
        for method in ("head", "last-1", "bitfit", "ln", "full")
    }
    head = trained["head"]
    assert {name.split(".")[0] for name in head} == {"bert", "classifier"}
    assert all("pooler" in name or "classifier" in name for name in head)
    assert {name for name in trained["last-1"] - head if ".layer.1." not in name} == set()
    assert trained["last-1"] > head
    assert trained["bitfit"] - head
    assert all(name.endswith("bias") for name in trained["bitfit"] - head)
    assert all("LayerNorm" in name for name in trained["ln"] - head)
    assert len(trained["ln"] - head) == 2 * 5
    assert trained["full"] > trained["last-1"]
    lora = trained_names(make_trainer(train="lora").model)
    assert any("lora_A" in name for name in lora)
    assert all("lora_" in name or "modules_to_save" in name for name in lora)
    assert any("pooler" in name for name in lora)
    for method in ("prefix", "prompt"):
        found = trained_names(make_trainer(train=method).model)
        assert {name.split(".")[-2] for name in found if "prompt_encoder" in name} == {"embedding"}
        rest = [name for name in found if "prompt_encoder" not in name]
        assert len(rest) == len(head)  # pooler and classifier, and not also what peft copied it from
        assert all("pooler" in name or "classifier.modules_to_save" in name for name in rest)


@pytest.mark.parametrize("train", METHODS)
def test_the_loss_falls(make_trainer, train, attention):
    lr = 1e-3 if train == "full" else default_lr(train)
    trainer = make_trainer(attention, dropout=False, train=train, steps=20, lr=lr)
    losses = [trainer.step(3)["loss"] for _ in range(10)]  # one batch, over and over
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("train", ["lora", "prefix", "prompt", "last-1"])
def test_resuming_is_bit_for_bit_the_uninterrupted_run(make_trainer, tmp_path, attention, train):
    whole = make_trainer(attention, train=train, steps=9)
    losses = [whole.step(i)["loss"] for i in range(9)]
    first = make_trainer(attention, train=train, steps=9)
    for i in range(4):
        first.step(i)
    first.save_checkpoint(str(tmp_path / "c.pt"), 4)
    second = make_trainer(attention, train=train, steps=9)
    assert second.load_checkpoint(str(tmp_path / "c.pt")) == 4
    assert [second.step(i)["loss"] for i in range(4, 9)] == losses[4:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_something_else_is_refused(make_trainer, tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserInputError, match="cannot be read"):
        make_trainer().load_checkpoint(str(tmp_path / "c.pt"))
    make_trainer().save_checkpoint(str(tmp_path / "head.pt"), 0)
    with pytest.raises(UserInputError, match="other parameters"):
        make_trainer(train="full").load_checkpoint(str(tmp_path / "head.pt"))


@pytest.mark.parametrize("train", ["head", "lora", "full"])
def test_bfloat16_trains_with_fp32_masters(make_trainer, attention, train):
    trainer = make_trainer(attention, train=train, dtype="bfloat16", steps=6)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    for i in range(6):
        trainer.step(i)
    for name, p in trainer.optimizer.parameters.items():
        master = trainer.optimizer.masters[name]
        assert master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())


FLOAT32 = {  # of the trained parameters with a bfloat16 backbone: those of modules trained as a whole
    "head": {"pooler", "classifier"},
    "lora": {"pooler", "classifier", "lora_A", "lora_B"},
    "prefix": {"pooler", "classifier", "prompt_encoder"},
    "prompt": {"pooler", "classifier", "prompt_encoder"},
    "last-1": {"pooler", "classifier", "layer.1."},
    "ln": {"pooler", "classifier"},
    "bitfit": {"pooler", "classifier"},
}


@pytest.mark.parametrize("train", FLOAT32)
def test_a_bfloat16_backbone_leaves_what_is_trained_in_float32(make_trainer, tmp_path, native, train):
    from transformers import AutoModelForSequenceClassification

    mixed = {"train": train, "steps": 4, "dropout": False, "lr": default_lr(train)}
    losses = {"float32": [make_trainer(**mixed).step(3)["loss"]]}
    mixed["backbone_dtype"] = "bfloat16"
    for arm in ("fastattn", "sdpa", "eager"):
        trainer = make_trainer(arm, **mixed)
        losses[arm] = [trainer.step(3)["loss"] for _ in range(4)]
        for name, p in trainer.model.named_parameters():
            whole = any(part in name for part in FLOAT32[train])
            frozen_copy = "original_module" in name
            expected = torch.float32 if whole or frozen_copy else torch.bfloat16
            assert p.dtype == expected, name
    # bfloat16 has three digits; the arms round at other places
    assert losses["fastattn"] == pytest.approx(losses["sdpa"], rel=0.02)
    assert losses["fastattn"] == pytest.approx(losses["eager"], rel=0.02)
    assert losses["fastattn"][0] == pytest.approx(losses["float32"][0], rel=0.02)
    assert losses["fastattn"][3] < losses["fastattn"][0]

    trained = {name: m.detach().clone() for name, m in trainer.optimizer.masters.items()}
    assert {m.dtype for m in trained.values()} == {torch.float32}
    word = next(p for n, p in trainer.model.named_parameters() if n.endswith("word_embeddings.weight"))
    word = word.detach().clone()
    trainer.save(str(tmp_path))
    saved = tmp_path / "model" / "base" if train in ("prefix", "prompt") else tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, word.float())
    loaded = dict(model.named_parameters())
    for name, master in trained.items():
        if "lora_" not in name and "prompt_encoder" not in name:
            plain = name.replace("base_model.model.", "").replace("base_model.", "")
            plain = plain.replace("modules_to_save.default.", "")
            assert torch.equal(loaded[plain], master), name  # not rounded


def test_lora_is_merged_in_float32(make_trainer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trainer = make_trainer(train="lora", steps=4, backbone_dtype="bfloat16")
    for i in range(4):
        trainer.step(i)
    load = AutoModelForSequenceClassification.from_pretrained
    base = load(trainer.settings.model, num_labels=2, dtype=torch.bfloat16).float()
    trainer.save(str(tmp_path))
    adapted, merged = PeftModel.from_pretrained(base, tmp_path / "adapter"), load(tmp_path / "model")
    with torch.no_grad():
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(
            adapted.eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_masters_keep_updates_that_bfloat16_would_round_away():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWithMasters({"p": p})
    for _ in range(8):
        p.grad = torch.ones_like(p)
        optimizer.step(1e-3)  # less than half of bfloat16's step of 1/128 below 1
    assert (p < 1).all()


@pytest.mark.parametrize("train", METHODS)
def test_arms_agree_without_dropout(make_trainer, native, train):
    """Gradients too: the second step's loss depends on all of the first's."""
    losses = {}
    for arm in ("fastattn", "sdpa"):
        trainer = make_trainer(arm, dropout=False, train=train)
        losses[arm] = [trainer.step(i)["loss"] for i in range(4)]
    torch.testing.assert_close(losses["fastattn"], losses["sdpa"], rtol=1e-5, atol=1e-6)


def test_dropout_off_means_off(make_trainer):
    model = make_trainer(dropout=False).model
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert model.training
    assert 0.1 in {m.p for m in make_trainer().model.modules() if isinstance(m, nn.Dropout)}


def test_saved_bytes_count_storages_once_and_no_weights():
    x = torch.randn(64, 32)
    weight = nn.Parameter(torch.randn(32, 32))
    saved = measure.SavedBytes([weight])
    with saved.counting():
        y = x @ weight  # saves x, and the weight only where x needs a gradient
        z = y.view(32, 64).relu() + y.relu().view(32, 64)  # each relu saves its own result
        (z * z.detach()).sum()  # saves z.detach(), whose storage is z's
    assert saved.bytes == 4 * (64 * 32) * (1 + 2 + 1)
    with saved.counting(), torch.no_grad():
        (x @ weight).relu()
    assert saved.bytes == 0


def test_peak_memory_sees_a_large_tensor():
    measure.reset_peak_rss()
    before = measure.rss()
    if before is None:
        pytest.skip("this system does not tell the resident memory")
    block = torch.ones(2**24)  # 64 MiB
    del block
    assert measure.peak_rss() >= before + 2**25


def test_the_learning_rate_rises_then_falls_to_zero(make_trainer):
    settings = make_trainer(lr=1.0).settings
    rates = [settings.learning_rate(i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("method", ["last-0", "last-", "heads", ""])
def test_unknown_methods_list_the_known(method):
    with pytest.raises(UserInputError, match="head, lora"):
        check_method(method)


def test_more_layers_than_there_are(make_trainer):
    with pytest.raises(UserInputError, match="has 2 layers"):
        make_trainer(train="last-3")


def test_the_head_of_other_families():
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    small = {"vocab_size": 50, "max_position_embeddings": 20}
    roberta = RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small
        )
    )
    assert list(head_modules(roberta)) == ["classifier"]
    distilbert = DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, **small)
    )
    assert list(head_modules(distilbert)) == ["pre_classifier", "classifier"]
