"""Classifies texts with plain transformers. Run as a script, so that fastattn is never imported.

Reads {"model", "texts", "max_length"} as JSON from standard input, prints the labels' numbers.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 32

request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["model"])
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
