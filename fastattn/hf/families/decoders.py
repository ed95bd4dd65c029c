"""Causal decoders: one layer list, positions by position_ids, a cache."""

from . import DecoderFamily, Reads

_GPT2 = DecoderFamily(
    model_type="gpt2",
    base="GPT2Model",
    layers="h",
    attention="attn",
    heads=(
        ("GPT2LMHeadModel", Reads.NEXT),
        ("GPT2ForSequenceClassification", Reads.LAST),
        ("GPT2ForTokenClassification", Reads.LABELLED),
    ),
)
_LLAMA = DecoderFamily(
    model_type="llama",
    base="LlamaModel",
    layers="layers",
    attention="self_attn",
    heads=(
        ("LlamaForCausalLM", Reads.NEXT),
        ("LlamaForSequenceClassification", Reads.LAST),
        ("LlamaForTokenClassification", Reads.LABELLED),
    ),
)

FAMILIES = (_GPT2, _LLAMA)
