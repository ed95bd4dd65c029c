"""The encoder-decoder models: T5 and mT5; BART, and Marian and Whisper, which have its layers."""

from __future__ import annotations

from . import Reads
from .stacks import Seq2SeqFamily, Stack


def _t5(model_type: str, prefix: str) -> Seq2SeqFamily:
    common = {
        "model_type": model_type,
        "base": f"{prefix}Stack",
        "layers": "block",
        "attention": "layer.0.SelfAttention",
        "heads": (),
        "mask": "mask",
        "relative_bias": True,
    }
    return Seq2SeqFamily(
        encoder=Stack(is_decoder=False, **common),
        decoder=Stack(is_decoder=True, cross_attention="layer.1.EncDecAttention", **common),
        heads=(
            (f"{prefix}Model", Reads.TOKENS),
            (f"{prefix}ForConditionalGeneration", Reads.LABELLED),
            (f"{prefix}ForSequenceClassification", Reads.EOS),
            (f"{prefix}ForQuestionAnswering", Reads.ALL),
        ),
        encoder_heads=(
            (f"{prefix}EncoderModel", Reads.TOKENS),
            (f"{prefix}ForTokenClassification", Reads.LABELLED),
        ),
    )


def _bart_stacks(model_type: str, prefix: str, **encoder) -> dict[str, Stack]:
    """Bart's layers, which Marian and Whisper share."""
    common = {
        "model_type": model_type,
        "layers": "layers",
        "attention": "self_attn",
        "heads": (),
        "drops_by_function": True,
    }
    return {
        "encoder": Stack(base=f"{prefix}Encoder", is_decoder=False, **common, **encoder),
        "decoder": Stack(
            base=f"{prefix}Decoder",
            is_decoder=True,
            cross_attention="encoder_attn",
            positions="embed_positions",
            **common,
        ),
    }


_BART = Seq2SeqFamily(
    **_bart_stacks("bart", "Bart", positions="embed_positions"),
    heads=(
        ("BartModel", Reads.TOKENS),
        ("BartForConditionalGeneration", Reads.LABELLED),
        ("BartForSequenceClassification", Reads.EOS),
        ("BartForQuestionAnswering", Reads.ALL),
        ("BartForCausalLM", Reads.LABELLED),
    ),
)
_MARIAN = Seq2SeqFamily(
    **_bart_stacks("marian", "Marian", positions="embed_positions"),
    heads=(
        ("MarianModel", Reads.TOKENS),
        ("MarianMTModel", Reads.LABELLED),
        ("MarianForCausalLM", Reads.LABELLED),
    ),
)
# Every recording is as long as the next: the feature extractor pads it with silence, which is heard.
_WHISPER = Seq2SeqFamily(
    **_bart_stacks("whisper", "Whisper", fixed_length=True),
    heads=(
        ("WhisperModel", Reads.TOKENS),
        ("WhisperForConditionalGeneration", Reads.LABELLED),
        ("WhisperForCausalLM", Reads.LABELLED),
    ),
    encoder_heads=(("WhisperForAudioClassification", Reads.TOKENS),),
)

FAMILIES = (_t5("t5", "T5"), _t5("mt5", "MT5"), _BART, _MARIAN, _WHISPER)
