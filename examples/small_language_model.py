"""A small language model of seeded random weights, which has learned nothing, with a tokenizer that has.

Real weights for these families are on model hubs; this one serves where there is no network:

    python examples/small_language_model.py t5 small-t5
    fastattn finetune --objective seq2seq --task reuters8 --model small-t5 --train full --lr 2e-3
    python examples/small_language_model.py llama small-llama
    fastattn finetune --objective causal-lm --task reuters8 --model small-llama --train full --lr 2e-3
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastattn.finetune.datasets import load_task

PAD, END = "<pad>", "</s>"
if len(sys.argv) != 3 or sys.argv[1] not in ("t5", "llama"):
    sys.exit("usage: small_language_model.py t5|llama DIR")
family, directory = sys.argv[1:]

# A byte-level tokenizer of 4,096 pieces, trained on the news texts.
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[PAD, END], initial_alphabet=alphabet)
tokenizer.train_from_iterator(load_task("reuters8").train.texts, trainer)
if family == "t5":  # T5 ends its inputs and its targets
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=512
).save_pretrained(directory)

torch.manual_seed(0)
size = {"vocab_size": 4096, "pad_token_id": 0, "eos_token_id": 1}
if family == "t5":
    config = T5Config(
        **size, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
else:
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**size, **shape, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1)
    model = LlamaForCausalLM(config)
model.save_pretrained(directory)
print(f"{directory}: {sum(p.numel() for p in model.parameters()):,} random weights")
