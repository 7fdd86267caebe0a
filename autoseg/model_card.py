"""The card of a shared model or encoder: README.md with the front matter the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planners.dataset import channel_names, label_values
from planners.decisions import times
from planners.plans import resolved
from trainers.label_names import class_names
from trainers.runs import SCRATCH, options_of

if TYPE_CHECKING:
    from autoseg.contents import Model, Validation
    from pretrain.checkpoint import EncoderCard

_HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
}  # fmt: skip
_NOT_STATED = "not stated"
_WHAT_IT_IS_NOT = """## What it is not

Research software. It is not a medical device, was not cleared for clinical use, and its masks must not decide on
anybody's treatment. It knows only what its training data showed: check it on your own scans before you use it."""
_NNUNET = "Isensee et al.: nnU-Net (Nature Methods 2021, doi:10.1038/s41592-020-01008-z)"


def model_card_text(model: Model) -> str:
    """README.md of a trained model."""
    plan, dataset = model.plan, model.dataset_json
    settings = resolved(plan, model.configuration)
    name, licence = plan["dataset_name"], _licence(dataset)
    options = options_of(plan)
    source = options.get("pretrained")
    facts = {
        "data set": ", ".join(str(dataset[key]) for key in ("name", "description", "reference") if dataset.get(key))
        or name,
        "channels": ", ".join(channel_names(dataset)),
        "structures": ", ".join(class_names(dataset)),
        "spacing": f"{_times(settings.get('spacing'))} mm",
        "patch": f"{_times(settings.get('patch_size'))} voxels",
        "intensity": _intensity(plan.get("autoseg", {}).get("intensity", settings.get("normalization_schemes", []))),
        "network": _network(settings.get("architecture", {})),
        "plan and configuration": f"{plan['plans_name']}, {model.configuration}",
        "trained by": f"{model.trainer}, {_epochs(model, options)}",
        "folds": ", ".join(model.folds),
        "pretraining": _pretraining(source),
        "licence of the data": licence,
    }
    run = model.run or SCRATCH
    citations = [str(dataset["citation"])] if dataset.get("citation") else []
    return (
        "\n\n".join(
            [
                # Whoever shares a model decides its licence; that of the data is not it.
                _front_matter(None, ["image-segmentation", "medical", "nnu-net"], "image-segmentation"),
                f"# {name}: {run} ({model.configuration})",
                "A segmentation model trained with autoseg on nnU-Net v2.",
                _table(("", ""), facts.items()),
                _metrics(model),
                "## How to use it\n\n```\nautoseg import FILE.zip          # or: autoseg pull hf:OWNER/REPO\n"
                f"autoseg predict -i SCANS -o MASKS -d {name} -p {plan['plans_name']} -c {model.configuration} "
                f"--run {run}\n```",
                "## Citation\n\n" + "\n".join(f"- {line}" for line in (*citations, _NNUNET)),
                _WHAT_IT_IS_NOT,
            ]
        )
        + "\n"
    )


def encoder_card_text(card: EncoderCard, name: str) -> str:
    """README.md of a pretrained encoder."""
    facts = {
        "method": card.method,
        "data set": card.dataset,
        "cases": f"{len(card.cases)} learned from without labels, {len(card.held_out)} held out; "
        + (
            f"the validation cases of fold {card.excluded_fold} were left out"
            if card.excluded_fold is not None
            else "no fold was left out, so a validation on this data set is not clean"
        ),
        "channels": ", ".join(card.channels),
        "spacing": f"{_times(card.spacing)} mm",
        "patch": f"{_times(card.patch_size)} voxels",
        "intensity": _intensity(card.intensity),
        "network": _network(card.architecture),
        "scope": card.scope,
        "plan and configuration": f"{card.plan_name}, {card.configuration}",
        "steps": f"{card.steps_done} of {card.steps_asked}",
        "licence": card.licence or _NOT_STATED,
    }
    measured = [
        (metric, _number(values.get("value")), _number(values.get("chance"))) for metric, values in card.metrics.items()
    ]
    metrics = "## Metrics\n\nOf the pretraining task, on the held-out cases.\n\n"
    return (
        "\n\n".join(
            [
                _front_matter(card.licence, ["medical", "self-supervised", "pretrained-encoder", card.method], None),
                f"# {card.dataset}: encoder {name} ({card.configuration})",
                "An encoder pretrained with autoseg without labels, to start the training of a segmentation model from.",
                _table(("", ""), facts.items()),
                metrics + (_table(("metric", "value", "chance"), measured) if measured else "None were measured."),
                "Case ids are salted hashes: whoever has a case can ask whether it was used, nobody can read the list.",
                "## How to use it\n\n```\nautoseg import FILE.zip          # or: autoseg pull hf:OWNER/REPO\n"
                f"autoseg train -d {card.dataset} --pretrained {name}\n```",
                "## Citation\n\n" + "\n".join(f"- {line}" for line in (card.citation, _NNUNET) if line),
                _WHAT_IT_IS_NOT,
            ]
        )
        + "\n"
    )


def _front_matter(licence: str | None, tags: Sequence[str], task: str | None) -> str:
    known = (licence or "").strip().lower().replace(" ", "-")
    if known in _HUB_LICENCES:
        lines = [f"license: {known}"]
    elif licence and licence != _NOT_STATED:
        lines = ["license: other", f"license_name: {_slug(licence)}"]
    else:
        lines = ["license: unknown"]
    lines += ["library_name: autoseg", "tags:", *(f"- {_slug(tag)}" for tag in ("autoseg", *tags))]
    if task:
        lines.append(f"pipeline_tag: {task}")
    return "\n".join(["---", *lines, "---"])


def _slug(text: str) -> str:
    """Letters, digits, '.' and '-': nothing YAML could read as more than a word."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.lower()).strip("-.")[:60] or "other"


def _licence(dataset: Mapping[str, Any]) -> str:
    return str(dataset.get("licence") or dataset.get("license") or _NOT_STATED)


def _metrics(model: Model) -> str:
    names = class_names(model.dataset_json)
    # By key: nnU-Net's summary lists them as texts, "10" before "2".
    keys = {name: str(value) for name, value in label_values(model.dataset_json).items()}
    rows = []
    for fold, facts in model.folds.items():
        if facts.validation is not None:
            values = [_number(facts.validation.mean.get(keys[name], {}).get("Dice")) for name in names]
            overall = _number(facts.validation.foreground_mean.get("Dice"))
            rows.append((fold, str(facts.validation.cases), *values, overall, _seen(model, facts.validation)))
    if not rows:
        return "## Metrics\n\nNone were measured."
    heading = ("fold", "cases", *names, "mean", "seen in pretraining")
    return (
        "## Metrics\n\nDice on each fold's validation cases, which its training did not see; nnU-Net's measure, the mean "
        "over cases.\n\n" + _table(heading, rows)
    )


def _seen(model: Model, validation: Validation) -> str:
    if options_of(model.plan).get("pretrained") is None:
        return "no pretraining"
    seen = validation.seen_in_pretraining
    return "not known" if seen is None else f"{seen} of {validation.cases}, without labels"


def _epochs(model: Model, options: Mapping[str, Any]) -> str:
    epochs = next(iter(model.folds.values())).epochs
    iterations = f" of {options['iterations']} iterations" if "iterations" in options else ""
    return f"{epochs} epochs{iterations}"


def _pretraining(source: Mapping[str, Any] | None) -> str:
    if not source:
        return "none, new weights"
    sha256 = str(source.get("sha256"))[:12]
    return f"{source.get('name')} ({source.get('method')}, on {source.get('dataset')}, SHA-256 {sha256})"


def _intensity(schemes: Sequence[Any]) -> str:
    return ", ".join(str(s.get("scheme")) if isinstance(s, dict) else str(s) for s in schemes)


def _network(architecture: Mapping[str, Any]) -> str:
    arguments = architecture.get("arch_kwargs", {})
    features = arguments.get("features_per_stage") or arguments.get("feature_size") or arguments.get("embed_dim")
    name = str(architecture.get("network_class_name", "?")).rsplit(".", 1)[-1]
    return f"{name}, features {features}" if features else name


def _times(numbers: Sequence[float] | None) -> str:
    return times(list(numbers)) if numbers else "?"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(heading: Sequence[str], rows: Any) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
