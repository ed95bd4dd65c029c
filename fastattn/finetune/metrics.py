"""Quality on the held-out texts, by scikit-learn."""

from __future__ import annotations

from sklearn import metrics as sk

__all__ = ["quality", "typical_examples"]


def quality(true: list[int], predicted: list[int], label_names: list[str]) -> dict:
    """Accuracy, macro-averaged precision, recall and F1, the same per class, and the confusion matrix."""
    labels = list(range(len(label_names)))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        true, predicted, labels=labels, zero_division=0.0
    )
    present = support > 0  # a class without a test text has no recall to average
    per_class = [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "texts": int(n)}
        for name, p, r, f, n in zip(label_names, precision, recall, f1, support, strict=True)
    ]
    return {
        "texts": len(true),
        "accuracy": float(sk.accuracy_score(true, predicted)),
        "precision": float(precision[present].mean()),
        "recall": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "majority_class": float(support.max() / support.sum()),
        "per_class": per_class,
        "confusion": sk.confusion_matrix(true, predicted, labels=labels).tolist(),
    }


def typical_examples(
    texts, true, predicted, probabilities, label_names, count: int = 4
) -> dict[str, list[dict]]:
    """Right and wrong predictions, spread over the classes; of the wrong ones those it was surest of."""

    def describe(i: int) -> dict:
        return {
            "text": texts[i][:300],
            "label": label_names[true[i]],
            "predicted": label_names[predicted[i]],
            "probability": probabilities[i],
        }

    def spread(rows: list[int]) -> list[dict]:
        rounds: dict[int, int] = {}
        keyed = []
        for row in rows:  # the n-th text of a class comes after every class's (n-1)-th
            rounds[true[row]] = rounds.get(true[row], -1) + 1
            keyed.append((rounds[true[row]], len(keyed), row))
        return [describe(row) for _, _, row in sorted(keyed)[:count]]

    surest = sorted(range(len(true)), key=lambda i: -probabilities[i])
    middle = (
        surest[len(surest) // 3 :] + surest[: len(surest) // 3]
    )  # right ones need not be the most obvious
    return {
        "right": spread([i for i in middle if true[i] == predicted[i]]),
        "wrong": spread([i for i in surest if true[i] != predicted[i]]),
    }
