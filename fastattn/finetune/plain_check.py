"""Classifies texts with plain transformers, and peft for virtual tokens. Run as a script, without fastattn.

Reads {"model", "texts", "max_length"} as JSON from standard input, prints the labels' numbers.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 32

request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["model"])
if (Path(request["model"]) / "adapter_config.json").is_file():
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(Path(request["model"]) / "base", dtype="auto")
    model = PeftModel.from_pretrained(base, request["model"]).eval()
else:
    model = AutoModelForSequenceClassification.from_pretrained(request["model"], dtype="auto").eval()
by_length = sorted(range(len(request["texts"])), key=lambda i: len(request["texts"][i]))
labels = [0] * len(by_length)
with torch.no_grad():
    for start in range(0, len(by_length), BATCH):
        rows = by_length[start : start + BATCH]
        inputs = tokenizer(
            [request["texts"][i] for i in rows],
            truncation=True,
            max_length=request["max_length"],
            padding=True,
            return_tensors="pt",
        )
        for row, label in zip(rows, model(**inputs).logits.argmax(-1).tolist(), strict=True):
            labels[row] = label
if "fastattn" in sys.modules:
    sys.exit("fastattn was imported")
print(json.dumps(labels))
