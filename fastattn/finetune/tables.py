"""What a report says, as headings, sentences and tables; report.py and html.py give them their form."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

__all__ = ["Section", "as_text", "feature_costs", "sections", "title"]

MIB = 2**20


@dataclass(frozen=True)
class Section:
    heading: str
    text: list[str] = field(default_factory=list)
    rows: list[list] = field(default_factory=list)  # the first is the header
    figure: str | None = None  # "losses", "costs" or "confusion"


def title(report: dict) -> str:
    settings = report["settings"]
    done = "" if report["status"] == "complete" else f" (interrupted after step {len(report['training'])})"
    return f"{report['data']['name']}: {settings['model']}, {settings['train']}, {_dtype(settings)}{done}"


def _dtype(settings: dict) -> str:
    frozen, trained = settings["backbone_dtype"], settings["dtype"]
    return trained if frozen == trained else f"{frozen} backbone, {trained} trained parameters"


def as_text(cell) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def sections(report: dict) -> list[Section]:
    parts = [_setting(report)]
    if report["comparison"]:
        parts += _comparison(report)
    parts.append(_training(report))
    if report["test"]:
        parts += _test(report["test"])
    if report["plain_transformers"]:
        mixed = report["settings"]["backbone_dtype"] != report["settings"]["dtype"]
        parts.append(_plain(report["plain_transformers"], mixed))
    return [*parts, _provenance(report)]


def _setting(report: dict) -> Section:
    settings, data, parameters = report["settings"], report["data"], report["parameters"]
    tokens = data["tokens"]
    classes = f" in {len(data['labels'])} classes" if data["labels"] else f", {settings['objective']}"
    share = data["padding_share"]
    text = [
        f"{data['train_texts']:,} training texts of {data['source']}{classes}; held "
        f"out: {data['test_texts']:,} ({data['split']}).",
        f"Tokens a text: mean {tokens['mean']:.0f}, median {tokens['median']:.0f}, 90th percentile "
        f"{tokens['p90']:.0f}, longest {tokens['longest']}. {data['truncated']:,} texts were cut to "
        f"{settings['max_length']} tokens.",
        f"Batches of {settings['batch_size']} texts in shuffled order, padded to the longest of each batch"
        + (f": {share:.0%} of what they hold is padding." if share is not None else "."),
    ]
    if parameters:
        share = parameters["trained"] / parameters["all"]
        text.append(
            f"{parameters['trained']:,} of {parameters['all']:,} parameters are trained ({share:.1%})."
        )
    return Section("The task", text)


def _comparison(report: dict) -> list[Section]:
    main = report["settings"]["attention"]
    compared = report["comparison"]
    same = Section(
        "The same result",
        [
            "Every arm started from the same weights and saw the same batches in the same order. With "
            "dropout off the losses must be equal; the largest relative differences over the steps are "
            "below. With dropout on, each arm draws its own random numbers, so those losses only resemble "
            "each other.",
        ],
        [["step", *(f"{name} loss" for name in compared["dropout_off"]["arms"])]]
        + [
            [i + 1, *(f"{value:.6f}" for value in values)]
            for i, values in enumerate(
                zip(*(arm["losses"] for arm in compared["dropout_off"]["arms"].values()), strict=False)
            )
        ],
        "losses",
    )
    if "loss_difference" in compared["dropout_off"]:
        for name, difference in compared["dropout_off"]["loss_difference"].items():
            same.text.append(f"{main} against {name}, dropout off: {difference:.1e}.")
    rows = [
        ["pass", "arm", "s a step", "tokens/s", "saved for backward, MiB", "peak RSS, MiB", "RSS before, MiB"]
    ]
    text = [
        "Each arm ran in a process of its own and they stepped in turn, so that all met the same noise. "
        "Times are medians. “As trained” is train mode with the model's own dropout, as people run it; "
        "“dropout off” is the same with every probability at 0. Saved bytes are what autograd keeps for "
        "backward, by unique storage, weights not counted.",
    ]
    for key, name in (("train_mode", "as trained"), ("dropout_off", "dropout off")):
        passed = compared.get(key)
        if not passed:
            continue
        for arm, cost in passed["arms"].items():
            before = f"{cost['rss_before'] / MIB:,.0f}" if cost["rss_before"] else "?"
            rows.append(
                [
                    name,
                    arm,
                    f"{cost['seconds']:.3f}",
                    f"{cost['tokens_per_second']:,.0f}",
                    f"{cost['saved_bytes'] / MIB:,.1f}",
                    f"{cost['peak_rss'] / MIB:,.0f}",
                    before,
                ]
            )
        if "speedup" in passed:
            low, high = passed["speedup_range"]
            text.append(
                f"{name[0].upper()}{name[1:]}: {main} is {passed['speedup']:.2f} times as fast as "
                f"{passed['faster_arm']}, the faster of the others (step by step {low:.2f} to {high:.2f}; "
                f"{passed['timed_steps']} steps timed)."
            )
    return [same, Section("The cost of a step", text, rows, "costs" if len(rows) > 1 else None)]


def _training(report: dict) -> Section:
    steps, settings = report["training"], report["settings"]
    if not steps:
        return Section("The run", ["Interrupted before the first step."])
    seconds = sum(step["seconds"] for step in steps)
    text = [
        f"{len(steps)} of {settings['total_steps']} steps with {settings['attention']} attention in "
        f"{seconds:.0f} s: {sum(step['tokens'] for step in steps) / seconds:,.0f} tokens a second, padding "
        f"not counted. AdamW, peak learning rate {settings['lr']:g} (linear warm-up, then linearly to zero), "
        f"seed {settings['seed']}; the loss went from {steps[0]['loss']:.3f} to {_tail_mean(steps):.3f} "
        "(mean of the last tenth).",
    ]
    if settings["feature_cache"]:
        text.append(f"The backbone ran in eval mode. {feature_costs(report)}")
    return Section("The run", text, figure=None if report["comparison"] else "losses")


def feature_costs(report: dict) -> str:
    """What the steps of each epoch cost on a feature cache."""
    per_epoch = -(-report["data"]["train_texts"] // report["settings"]["batch_size"])
    steps = report["training"]
    parts = []
    for start in range(0, len(steps), per_epoch):
        epoch = steps[start : start + per_epoch]
        seconds, computed = sum(step["seconds"] for step in epoch), sum(step["computed"] for step in epoch)
        parts.append(
            f"epoch {start // per_epoch + 1} took {seconds:.2f} s ({len(epoch)} steps, the features of "
            f"{computed:,} texts computed)"
        )
    return f"Feature cache: {'; '.join(parts)}."


def _tail_mean(steps: list[dict]) -> float:
    tail = steps[-max(1, len(steps) // 10) :]
    return sum(step["loss"] for step in tail) / len(tail)


def _test(test: dict) -> list[Section]:
    if "perplexity" in test:
        return _language_test(test)
    rows = [["class", "precision", "recall", "F1", "test texts"]]
    rows += [
        [row["label"], f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}", row["texts"]]
        for row in test["per_class"]
    ]
    quality = [
        f"Accuracy {test['accuracy']:.2%}, macro precision {test['precision']:.3f}, macro recall "
        f"{test['recall']:.3f}, macro F1 {test['macro_f1']:.3f} on {test['texts']:,} held-out texts. Always "
        f"guessing the largest class would be right in {test['majority_class']:.1%}.",
    ]
    examples = [["", "label", "predicted", "probability", "text"]]
    for kind in ("right", "wrong"):
        for found in test["examples"][kind]:
            examples.append(
                [kind, found["label"], found["predicted"], f"{found['probability']:.2f}", found["text"]]
            )
    return [
        Section("Quality", quality, rows, "confusion"),
        Section(
            "Some right and wrong predictions",
            ["The wrong ones are those the model was surest of."],
            examples,
        ),
    ]


def _language_test(test: dict) -> list[Section]:
    quality = [
        f"Loss {test['loss']:.3f} a token (perplexity {test['perplexity']:.1f}) on {test['tokens']:,} tokens "
        f"of {test['texts']:,} held-out texts; {test['token_accuracy']:.1%} are the model's first choice. "
        f"Guessing by the training tokens' frequencies has a loss of {test['frequency_loss']:.3f}.",
    ]
    rows = [["text", "target", "the model's words"]]
    rows += [[found["text"], found["target"], found["generated"]] for found in test["examples"]]
    return [Section("Quality", quality), Section("Some texts, targets and what the model writes", [], rows)]


def _plain(check: dict, mixed: bool) -> Section:
    exact = "It is saved in float32 and computes in it, which rounds less than the run did. " if mixed else ""
    if "loss" in check:
        said = (
            f"{exact}Loaded by plain transformers in a process without fastattn: loss {check['loss']:.4f} a "
            f"token on {check['texts']} of the test texts, {check['loss_here']:.4f} here."
        )
        return Section("The saved model without fastattn", [said])
    return Section(
        "The saved model without fastattn",
        [
            f"{exact}Loaded by plain transformers in a process without fastattn: accuracy "
            f"{check['accuracy']:.2%} on {check['texts']} of the test texts, {check['accuracy_here']:.2%} "
            f"here; {check['different_labels']} labels differ.",
        ],
    )


def _provenance(report: dict) -> Section:
    machine, versions = report["machine"], report["versions"]
    created = datetime.datetime.fromisoformat(report["created"]).strftime("%Y-%m-%d %H:%M UTC")
    rows = [
        ["what", "value"],
        ["processor", f"{machine['cpu']}, {machine['cores']} cores"],
        ["instruction sets", f"{machine['isa']} (torch), {machine['kernels']} (fastattn)"],
        ["memory", f"{machine['memory_gib']} GiB"],
        ["system", machine["system"]],
        ["threads", machine["threads"]],
        ["dtype", _dtype(report["settings"])],
        *([name, version] for name, version in versions.items()),
        ["finished", created],
        ["to repeat", report["command"]],
    ]
    return Section("Machine and versions", [f"Note: {note}." for note in report["notes"]], rows)
