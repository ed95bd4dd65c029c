"""Encoders of the BERT kind. They differ in names only.

A head that is not listed is taken to read every position: question answering (a softmax over all of them),
pretraining (two heads), and ElectraForMultipleChoice (which summarises as its config says).
"""

from . import EncoderFamily, Reads

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

FAMILIES = (_BERT, _ROBERTA, _DISTILBERT, _ELECTRA)
