"""The report's figures, as PNG bytes."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

__all__ = ["confusion_matrix", "costs", "losses"]

COLOURS = {"fastattn": "#0f766e", "sdpa": "#d97706", "eager": "#64748b"}
DASHES = {"fastattn": "-", "sdpa": "--", "eager": ":"}
PASSES = {"train_mode": "as trained", "dropout_off": "dropout off"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
}


def losses(report: dict) -> bytes:
    """The arms' losses lying on each other (dropout off), and the whole run's loss falling."""
    compared = report["comparison"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2 if compared else 1, figsize=(10 if compared else 6, 3.6), squeeze=False
        )
        if compared:
            _same_losses(axes[0][0], compared["dropout_off"])
        _training_loss(axes[0][-1], report)
        return _png(figure)


def costs(comparison: dict) -> bytes:
    """Time, throughput, saved bytes and peak memory of every arm, in both passes."""
    passes = {
        title: comparison[key]["arms"] for key, title in PASSES.items() if comparison.get(key, {}).get("arms")
    }
    figures = (
        ("seconds a step", "seconds", 1.0, "{:.2f}"),
        ("tokens a second (padding not counted)", "tokens_per_second", 1.0, "{:,.0f}"),
        ("MiB saved for backward", "saved_bytes", 2**20, "{:,.1f}"),
        ("peak resident memory, MiB", "peak_rss", 2**20, "{:,.0f}"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6))
        for axis, (title, key, unit, form) in zip(axes.flat, figures, strict=True):
            _bars(axis, passes, key, unit, form)
            axis.set_title(title)
        axes[0][0].legend(frameon=False)
        return _png(figure)


def confusion_matrix(test: dict) -> bytes:
    """Counts, coloured by their share of the true class."""
    counts = np.array(test["confusion"])
    names = [row["label"] for row in test["per_class"]]
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = max(3.2, 0.42 * len(names) + 1.6)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(side + 0.8, side))
        axis.imshow(share, cmap="BuGn", vmin=0, vmax=1)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.spines[:].set_visible(False)
        if len(names) <= 20:
            for i, j in np.argwhere(counts):
                colour = "white" if share[i, j] > 0.6 else "black"
                axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=colour)
        return _png(figure)


def _same_losses(axis, passed: dict) -> None:
    widths = {
        "eager": 7.0,
        "sdpa": 4.0,
    }  # drawn wide below narrow, so that lines lying on each other all show
    arms = sorted(passed["arms"], key=lambda name: -widths.get(name, 1.5))
    for name in arms:
        values = passed["arms"][name]["losses"]
        steps = range(1, len(values) + 1)
        alpha = 0.45 if name in widths else 1.0
        axis.plot(
            steps, values, color=COLOURS[name], lw=widths.get(name, 1.5), alpha=alpha, label=name, marker="."
        )
    axis.set_title("same batches, dropout off: the losses agree")
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)


def _training_loss(axis, report: dict) -> None:
    values = np.array([step["loss"] for step in report["training"]])
    main = report["settings"]["attention"]
    steps = np.arange(1, len(values) + 1)
    window = max(1, len(values) // 15)
    smooth = np.convolve(values, np.ones(window) / window, "valid") if len(values) else values
    label = main if window == 1 else f"{main}, mean of {window} steps"
    axis.plot(steps, values, color=COLOURS[main], alpha=0.3, lw=1)
    axis.plot(steps[window - 1 :], smooth, color=COLOURS[main], lw=2, label=label)
    compared = (report["comparison"] or {}).get("train_mode", {}).get("arms", {})
    for name in sorted(compared.keys() - {main}):
        first = compared[name]["losses"]
        style = {"color": COLOURS[name], "ls": DASHES[name], "lw": 1.5}
        axis.plot(range(1, len(first) + 1), first, label=f"{name}, its first steps", **style)
    axis.set_title("the whole run, with the model's own dropout")
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)


def _bars(axis, passes: dict[str, dict], key: str, unit: float, form: str) -> None:
    names = list(next(iter(passes.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [p + (i - (len(names) - 1) / 2) * width for p in range(len(passes))]
        heights = [arms[name][key] / unit if name in arms else 0 for arms in passes.values()]
        bars = axis.bar(places, heights, width * 0.92, color=COLOURS[name], label=name)
        axis.bar_label(bars, [form.format(height) for height in heights], fontsize=8, padding=2)
    axis.set_xticks(range(len(passes)), list(passes))
    axis.margins(y=0.15)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
