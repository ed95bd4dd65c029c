"""A saved model in plain transformers, and peft for virtual tokens. Run as a script, without fastattn.

Reads JSON from standard input: {"model", "auto_class"} and either {"texts", "max_length"}, for which it
prints the labels' numbers, or {"ids", "targets"} (lists of token ids; targets is null for a causal model),
for which it prints the sum of each text's token losses.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

BATCH = 32


def load(directory: str, auto_class: str):
    auto = getattr(transformers, auto_class)
    if not (Path(directory) / "adapter_config.json").is_file():
        return auto.from_pretrained(directory, dtype="auto").eval()
    from peft import PeftModel

    base = auto.from_pretrained(Path(directory) / "base", dtype="auto")
    return PeftModel.from_pretrained(base, directory).eval()


def labels_of(model, tokenizer, texts: list[str], max_length: int) -> list[int]:
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    labels = [0] * len(texts)
    for start in range(0, len(by_length), BATCH):
        rows = by_length[start : start + BATCH]
        batch = [texts[i] for i in rows]
        inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        for row, label in zip(rows, model(**inputs).logits.argmax(-1).tolist(), strict=True):
            labels[row] = label
    return labels


def loss_of(model, ids: list[int], target: list[int] | None) -> float:
    text = torch.tensor([ids])
    if target is None:
        asked = text[0, 1:]
        logits = model(input_ids=text).logits[0, -len(ids) : -1]
    else:
        asked = torch.tensor(target)
        logits = model(input_ids=text, labels=asked[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), asked, reduction="sum").item()


request = json.load(sys.stdin)
model = load(request["model"], request["auto_class"])
with torch.no_grad():
    if "texts" in request:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
        found = labels_of(model, tokenizer, request["texts"], request["max_length"])
    else:
        targets = request["targets"] or [None] * len(request["ids"])
        found = [loss_of(model, *pair) for pair in zip(request["ids"], targets, strict=True)]
if "fastattn" in sys.modules:
    sys.exit("fastattn was imported")
print(json.dumps(found))
