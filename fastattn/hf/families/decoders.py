"""Causal decoders: one layer list, positions by position_ids, a cache. Windows and softcap reach attention as
arguments, so that most families differ in names only."""

from . import DecoderFamily, Reads


def _like_llama(model_type: str, prefix: str) -> DecoderFamily:
    """A family whose classes are named as Llama's are."""
    return DecoderFamily(
        model_type=model_type,
        base=f"{prefix}Model",
        layers="layers",
        attention="self_attn",
        rotary=True,
        heads=(
            (f"{prefix}ForCausalLM", Reads.NEXT),
            (f"{prefix}ForSequenceClassification", Reads.LAST),
            (f"{prefix}ForTokenClassification", Reads.LABELLED),
        ),
    )


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
_OPT = DecoderFamily(
    model_type="opt",
    base="OPTDecoder",
    layers="layers",
    attention="self_attn",
    counts_tokens=True,
    drops_by_function=True,
    wrappers=("OPTModel",),
    heads=(("OPTForCausalLM", Reads.NEXT), ("OPTForSequenceClassification", Reads.LAST)),
)
_GEMMA3 = DecoderFamily(
    model_type="gemma3_text",
    base="Gemma3TextModel",
    layers="layers",
    attention="self_attn",
    rotary=True,
    heads=(("Gemma3ForCausalLM", Reads.NEXT), ("Gemma3TextForSequenceClassification", Reads.LAST)),
)

FAMILIES = (
    _GPT2,
    _OPT,
    _like_llama("llama", "Llama"),
    _like_llama("mistral", "Mistral"),
    _like_llama("qwen2", "Qwen2"),
    _like_llama("qwen3", "Qwen3"),
    _like_llama("gemma2", "Gemma2"),
    _GEMMA3,
    _like_llama("phi3", "Phi3"),
)
