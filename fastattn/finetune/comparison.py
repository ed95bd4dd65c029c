"""The arms of a comparison stepping in turn, and what their steps say side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from fastattn.finetune.arms import LocalArm, RemoteArm
from fastattn.finetune.progress import Bar

__all__ = ["LOSS_STEPS", "WARM_UP_STEPS", "step_in_turn", "summarise"]

LOSS_STEPS = 5  # of the separate pass with dropout off, where every arm must compute the same losses
WARM_UP_STEPS = (
    1  # at the start of a pass: caches fill, memory is claimed; compared for loss, left out of times
)


def step_in_turn(
    arms: Mapping[str, LocalArm | RemoteArm], steps: int, dropout: bool, title: str, stop: Callable[[], bool]
) -> dict[str, dict]:
    """Every arm makes the same `steps` updates from the same start, one arm at a time.

    Returns for each arm what `prepare` said and its steps; fewer than asked for if `stop()` came true.
    """
    result = {name: {**arm.call("prepare", dropout=dropout), "steps": []} for name, arm in arms.items()}
    names = list(arms)
    with Bar(title, steps * len(arms)) as bar:
        for index in range(steps):
            shift = index % len(names)  # who goes first changes, so that no arm always follows the same one
            for name in names[shift:] + names[:shift]:
                if stop():
                    return result
                step = arms[name].call("step", index=index)
                result[name]["steps"].append(step)
                bar.advance(loss=step["loss"], detail=f"{name} ")
    return result


def summarise(passed: Mapping[str, dict], main: str) -> dict:
    """Medians per arm over the steps all arms made, and how `main` stands to the faster other one.

    Ratios are medians of the ratios step by step: both sides of each had the same batch.
    """
    made = min(len(arm["steps"]) for arm in passed.values())
    timed = slice(WARM_UP_STEPS if made > WARM_UP_STEPS else 0, made)
    arms = {}
    for name, arm in passed.items():
        steps = arm["steps"][timed]
        if not steps:
            continue
        arms[name] = {
            "seconds": median(step["seconds"] for step in steps),
            "tokens_per_second": sum(step["tokens"] for step in steps)
            / sum(step["seconds"] for step in steps),
            "saved_bytes": median(step["saved_bytes"] for step in steps),
            "peak_rss": max(step["peak_rss"] for step in arm["steps"]),
            "rss_before": arm["rss"],
            "losses": [step["loss"] for step in arm["steps"]],
        }
    others = [name for name in arms if name != main]
    summary = {"arms": arms, "steps": made, "timed_steps": max(0, made - timed.start)}
    if main not in arms or not others:
        return summary
    faster = min(others, key=lambda name: arms[name]["seconds"])
    paired = zip(passed[faster]["steps"][timed], passed[main]["steps"][timed], strict=True)
    ratios = sorted(theirs["seconds"] / ours["seconds"] for theirs, ours in paired)
    least_saved = min(arms[name]["saved_bytes"] for name in others)
    return summary | {
        "faster_arm": faster,
        "speedup": median(ratios),
        "speedup_range": [ratios[0], ratios[-1]],
        "saved_bytes_ratio": arms[main]["saved_bytes"] / least_saved if least_saved else None,
        "loss_difference": {
            name: max(
                abs(ours - theirs) / abs(theirs)
                for ours, theirs in zip(arms[main]["losses"][:made], arms[name]["losses"][:made], strict=True)
            )
            for name in others
        },
    }
