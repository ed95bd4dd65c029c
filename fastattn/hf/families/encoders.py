"""Encoders. Those of the BERT kind differ in names only; ALBERT shares its layers, ModernBERT is built flat.

A head that is not listed is taken to read every position: question answering (a softmax over all of them),
pretraining (two heads), and ElectraForMultipleChoice (which summarises as its config says).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import EncoderFamily, FlatFamily, Reads

_BERT = EncoderFamily(
    model_type="bert",
    base="BertModel",
    encoder="encoder",
    layers="encoder.layer",
    attention="attention.self",
    after_attention="attention.output",
    heads=(
        ("BertForSequenceClassification", Reads.FIRST),
        ("BertForMultipleChoice", Reads.FIRST),
        ("BertForNextSentencePrediction", Reads.FIRST),
        ("BertForTokenClassification", Reads.LABELLED),
        ("BertForMaskedLM", Reads.LABELLED),
    ),
)
_ROBERTA = EncoderFamily(
    model_type="roberta",
    base="RobertaModel",
    encoder="encoder",
    layers="encoder.layer",
    attention="attention.self",
    after_attention="attention.output",
    heads=(
        ("RobertaForSequenceClassification", Reads.FIRST),
        ("RobertaForMultipleChoice", Reads.FIRST),
        ("RobertaForTokenClassification", Reads.LABELLED),
        ("RobertaForMaskedLM", Reads.LABELLED),
    ),
)
_XLM_ROBERTA = EncoderFamily(
    model_type="xlm-roberta",
    base="XLMRobertaModel",
    encoder="encoder",
    layers="encoder.layer",
    attention="attention.self",
    after_attention="attention.output",
    heads=(
        ("XLMRobertaForSequenceClassification", Reads.FIRST),
        ("XLMRobertaForMultipleChoice", Reads.FIRST),
        ("XLMRobertaForTokenClassification", Reads.LABELLED),
        ("XLMRobertaForMaskedLM", Reads.LABELLED),
    ),
)
_DISTILBERT = EncoderFamily(
    model_type="distilbert",
    base="DistilBertModel",
    encoder="transformer",
    layers="transformer.layer",
    attention="attention",
    after_attention="sa_layer_norm",
    heads=(
        ("DistilBertForSequenceClassification", Reads.FIRST),
        ("DistilBertForMultipleChoice", Reads.FIRST),
        ("DistilBertForTokenClassification", Reads.LABELLED),
        ("DistilBertForMaskedLM", Reads.LABELLED),
    ),
)
_ELECTRA = EncoderFamily(
    model_type="electra",
    base="ElectraModel",
    encoder="encoder",
    layers="encoder.layer",
    attention="attention.self",
    after_attention="attention.output",
    heads=(
        ("ElectraForSequenceClassification", Reads.FIRST),
        ("ElectraForTokenClassification", Reads.LABELLED),
        ("ElectraForMaskedLM", Reads.LABELLED),
        # Its loss drops what the attention mask drops.
        ("ElectraForPreTraining", Reads.TOKENS),
    ),
)


@dataclass(frozen=True, kw_only=True)
class _AlbertFamily(EncoderFamily):
    """Groups of layers, each run several times: the last layer is also an earlier one."""

    def layer_modules(self, base: nn.Module) -> list[nn.Module]:
        groups = self._list(base, self.layers)
        return [layer for group in groups for layer in self._list(group, "albert_layers")]

    def num_layers(self, base: nn.Module) -> int:
        return base.config.num_hidden_layers * base.config.inner_group_num


_ALBERT = _AlbertFamily(
    model_type="albert",
    base="AlbertModel",
    encoder="encoder",
    layers="encoder.albert_layer_groups",
    attention="attention",
    after_attention=None,
    heads=(
        ("AlbertForSequenceClassification", Reads.FIRST),
        ("AlbertForMultipleChoice", Reads.FIRST),
        ("AlbertForTokenClassification", Reads.LABELLED),
        ("AlbertForMaskedLM", Reads.LABELLED),
    ),
)


@dataclass(frozen=True, kw_only=True)
class _ModernBertFamily(FlatFamily):
    """Local and global layers, rotary positions; what the classifier reads is in its config."""

    def reads(self, model: nn.Module) -> Reads | None:
        reads = super().reads(model)
        mean = reads is Reads.FIRST and model.config.classifier_pooling == "mean"
        return Reads.TOKENS if mean else reads


_MODERNBERT = _ModernBertFamily(
    model_type="modernbert",
    base="ModernBertModel",
    layers="layers",
    attention="attn",
    rotary=True,
    bare_reads=Reads.BARE,
    heads=(
        ("ModernBertForSequenceClassification", Reads.FIRST),
        # The first position that the mask keeps.
        ("ModernBertForMultipleChoice", Reads.TOKENS),
        ("ModernBertForTokenClassification", Reads.LABELLED),
        ("ModernBertForMaskedLM", Reads.LABELLED),
    ),
)

FAMILIES = (_BERT, _ROBERTA, _XLM_ROBERTA, _DISTILBERT, _ELECTRA, _ALBERT, _MODERNBERT)
