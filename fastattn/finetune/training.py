"""One arm of a run: its model, optimizer and batches, a step at a time."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastattn.finetune import encoding, files, measure
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.features import CachedHead
from fastattn.finetune.model import build_model, load_tokenizer, save_model, write
from fastattn.finetune.objectives import IGNORED, OBJECTIVES, Batch
from fastattn.finetune.settings import Settings

__all__ = ["AdamWithMasters", "Trainer"]

EVALUATION_TOKENS = 8192  # in a batch, padding included; texts are sorted by length first
SHOWN = 128  # tokens of a text in the report's examples
CLIP = 1.0


class AdamWithMasters:
    """AdamW that keeps an fp32 copy of every trained parameter in fewer bits, rounded back after a step.

    bfloat16 has 8 bits of mantissa: without the copies most small updates would round to nothing.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True)
            for name, p in parameters.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), weight_decay=0.01)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def step(self, lr: float) -> None:
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                self.masters[name].grad = None if p.grad is None else p.grad.float()
        nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.write_back()

    def state(self) -> dict:
        trained = {name: master.detach() for name, master in self.masters.items()}
        return {"trained": trained, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        shapes = {name: value.shape for name, value in state["trained"].items()}
        if shapes != {name: master.shape for name, master in self.masters.items()}:
            raise UserInputError(
                "the checkpoint trains other parameters than this run; did model or data change?"
            )
        with torch.no_grad():
            for name, value in state["trained"].items():
                self.masters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """The fp32 copies, rounded to what the parameters hold, into these."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])


class Trainer:
    """Every method takes and gives plain JSON values, so that a Trainer serves as well behind a pipe."""

    def __init__(self, settings: dict, label_names: list[str], attention: str, encoded: str):
        self.settings = Settings.from_json(settings)
        self.label_names = label_names
        self.attention = attention
        self.train, self.test = encoding.load_encoded(Path(encoded))
        self.tokenizer = load_tokenizer(self.settings.model)
        self.objective = OBJECTIVES[self.settings.objective]
        self.total = self.settings.total_steps(len(self.train))

    def prepare(self, dropout: bool) -> dict:
        """The model as it is before the first step, in train mode."""
        self.model = self.optimizer = self.cached = None
        measure.reset_peak_rss()
        pad_id = self.tokenizer.pad_token_id
        self.model = build_model(self.settings, self.label_names, self.attention, dropout, pad_id).train()
        if self.settings.feature_cache is not None:
            inputs = self._batch(self.train, self._rows(0)).inputs
            self.cached = CachedHead(self.model, self.settings.feature_cache, inputs)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = AdamWithMasters(trained)
        self.saved = measure.SavedBytes([*self.model.parameters(), *self.model.buffers()])
        torch.manual_seed(self.settings.seed)
        count = sum(p.numel() for p in trained.values())
        return {
            "trained_parameters": count,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "rss": measure.rss(),
        }

    def step(self, index: int) -> dict:
        """The index-th update (from 0): its loss, seconds, tokens, bytes saved for backward, peak memory; and
        how many texts' features a feature cache computed."""
        rows = self._rows(index)
        known = self.cached.cache.misses if self.cached else 0
        start = time.perf_counter()
        batch = self._batch(self.train, rows)
        self.optimizer.zero_grad()
        with self.saved.counting():
            loss = self._losses(batch).sum() / (batch.labels != IGNORED).sum().clamp_min(1)
        loss.backward()
        self.optimizer.step(self.settings.learning_rate(index, self.total))
        value = loss.item()
        seconds = time.perf_counter() - start
        if value != value or abs(value) == float("inf"):
            raise UserInputError(
                f"the loss became {value} at step {index + 1}; try a smaller --lr than {self.settings.lr}"
            )
        return {
            "loss": value,
            "seconds": seconds,
            "tokens": batch.tokens,
            "padded_tokens": batch.padded_tokens,
            "saved_bytes": self.saved.bytes,
            "peak_rss": measure.peak_rss(),
            **({"computed": self.cached.cache.misses - known} if self.cached else {}),
        }

    def evaluation_batches(self, count: int | None) -> int:
        """Prepares the test texts (a stratified sample of `count`, or all); returns the number of batches."""
        chosen = encoding.stratified_sample(self.test.labels, count)
        by_length = chosen[self.test.lengths[chosen].argsort(kind="stable")]
        self.evaluation, batch = [], []
        for row in by_length:
            if batch and (len(batch) + 1) * self.test.lengths[row] > EVALUATION_TOKENS:
                self.evaluation.append(batch)
                batch = []
            batch.append(int(row))
        self.evaluation.append(batch)
        return len(self.evaluation)

    @torch.no_grad()
    def evaluate(self, batch: int) -> list[dict]:
        """For each row of a batch of the test set: the label found and its probability; or the sum of its
        tokens' losses, their number, and how many of them the model would have chosen."""
        self.model.eval()
        rows = self.evaluation[batch]
        inputs = self._batch(self.test, rows)
        logits = self._logits(inputs).float()
        if not self.objective.is_language:
            probability, label = logits.softmax(-1).max(-1)
            found = zip(rows, label.tolist(), probability.tolist(), strict=True)
            return [{"row": row, "label": label, "probability": p} for row, label, p in found]
        asked, right = inputs.labels != IGNORED, logits.argmax(-1) == inputs.labels
        columns = self._losses(inputs, logits).sum(-1), asked.sum(-1), (asked & right).sum(-1)
        found = zip(rows, *(column.tolist() for column in columns), strict=True)
        return [{"row": row, "loss": loss, "tokens": n, "right": k} for row, loss, n, k in found]

    def write(self, rows: list[int]) -> list[dict]:
        """What the model makes of these test texts, beside the target; without one, of their first half."""
        self.model.eval()
        seq2seq, examples = self.settings.objective == "seq2seq", []
        for row in rows:
            ids = self.test.tokens(row)[:SHOWN]
            asked = self.test.targets([row])[0] if seq2seq else ids[len(ids) // 2 :]
            given = ids if seq2seq else ids[: len(ids) // 2]
            shown = {"text": given, "target": asked}
            words = {
                name: self.tokenizer.decode(part, skip_special_tokens=True) for name, part in shown.items()
            }
            batch = encoding.pad([given], self.tokenizer.pad_token_id, "right")
            generated = write(self.model, self.tokenizer, batch, max(8, len(asked)))[0]
            examples.append({**words, "generated": generated})
        return examples

    def save_checkpoint(self, path: str, step: int) -> None:
        """Everything that the step-th update and those after it depend on."""
        buffer = io.BytesIO()
        torch.save({**self.optimizer.state(), "rng": torch.get_rng_state(), "step": step}, buffer)
        files.write_bytes(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: str) -> int:
        """Continues where `save_checkpoint` stood; returns the number of updates already made."""
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # a cut or foreign file can fail in any way inside torch.load
            raise UserInputError(f"the checkpoint {path} cannot be read") from error
        self.optimizer.load(state)
        torch.set_rng_state(state["rng"])
        self.model.train()
        if self.cached:
            self.cached.freeze_dropout()
        return state["step"]

    def save(self, directory: str) -> list[str]:
        """`model/` (and `adapter/`) in `directory`; the trainer is done after it."""
        if self.settings.mixed:  # so that nothing trained is rounded; what was frozen is exact in float32
            self.model.float()
            self.optimizer.write_back()
        written = save_model(self.model, self.tokenizer, Path(directory))
        self.model = self.optimizer = self.cached = None
        return written

    def _rows(self, index: int) -> np.ndarray:
        """The texts of the index-th update."""
        return encoding.training_batch(len(self.train), self.settings.batch_size, self.settings.seed, index)

    def _batch(self, part: encoding.Encoded, rows) -> Batch:
        return self.objective.batch(part, np.asarray(rows), self.tokenizer)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.cached.logits(batch.inputs) if self.cached else self.objective.logits(self.model, batch)

    def _losses(self, batch: Batch, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of every label, in their shape; 0 where nothing is asked."""
        if logits is None:
            logits = self._logits(batch)
        flat = nn.functional.cross_entropy(
            logits.float().flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(batch.labels.shape)
