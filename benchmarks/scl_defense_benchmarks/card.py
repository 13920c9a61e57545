"""The model card: what a checkpoint is, what was measured of it, and what that is worth."""

import json
from collections.abc import Mapping
from typing import Any

from scl_defense.errors import printable
from scl_defense_benchmarks.results import EvaluationResult


def model_card(content: Mapping[str, Any], repository: str, result: EvaluationResult | None) -> str:
    """Markdown with the hub's front matter. content: of a checkpoint of this project."""
    recipe = json.loads(content["config"])
    front = {
        "library_name": "scl-defense",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "contrastive-learning", "scl-defense"],
    }
    name = repository.partition("/")[2]
    shape = "x".join(map(str, content["image_shape"]))
    classes = content["classes"]
    listed = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML, and escapes what is odd
        "---",
        "",
        f"# {name}",
        "",
        f"A `{_code(content['model'])}` trained with scl-defense by "
        f"`{_code(recipe.get('trainer'))}` with adversarial views of `{_code(recipe.get('generator'))}`, within "
        f"{_md(content['threat'])}.",
        "",
        f"Images {shape} in [0, 1] -> {len(classes)} classes: {_md(listed)}. The normalisation is inside the network.",
        "",
        "## How robust it is",
        "",
        *(_measured(result) if result is not None else _unmeasured(content)),
        "",
        "## How to use it",
        "",
        "```console",
        "$ pip install 'scl-defense[hub]'",
        f"$ scl-defense pull {repository} --out model.pt",
        "$ scl-defense benchmark model.pt --attacks standard",
        "```",
        "",
        "```python",
        "import scl_defense",
        "",
        'loaded = scl_defense.load("model.pt")',
        "logits = loaded.network(images)  # (N, C, H, W) in [0, 1]",
        "```",
        "",
        "## Limits",
        "",
        "- Robust within the stated ball at most: nothing is claimed of larger perturbations, of other norms, of "
        "rotations, patches, blur or any change that is no small step in pixels.",
        "- A battery of fixed attacks gives an upper bound: an attack made for this network may find more.",
        "- One training run with one seed; another seed gives other numbers.",
        "- Made for research. Measure it on your own data before you rely on it.",
        "",
        "## How it was trained",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
        "",
        "Made by " + ", ".join(f"{p.get('distribution')} {p.get('version')}" for p in content["plugins"]) + ".",
    ]
    return "\n".join(printable(line) if "\n" not in line else line for line in lines) + "\n"


def _unmeasured(content: Mapping[str, Any]) -> list[str]:
    best = content.get("best") or {}
    known = ""
    if isinstance(best, Mapping) and isinstance(best.get("clean"), float) and isinstance(best.get("robust"), float):
        known = (f" In training it reached {100 * best['clean']:.1f} % on validation images and "
                 f"{100 * best['robust']:.1f} % under a short PGD, which is no evaluation.")  # fmt: skip
    return [f"**Not measured.** No result of a battery of attacks came with it.{known}"]


def _measured(result: EvaluationResult) -> list[str]:
    from scl_defense_benchmarks.report.gather import percent, spanned, verdict_sentence

    lines = [verdict_sentence(result), "", "| attack | ball | accuracy % | 95 % interval |", "|---|---|---|---|"]
    lines.append(f"| none (clean) | | {percent(result.clean_accuracy)} | {spanned(result.clean_interval)} |")
    for row in result.attacks:
        ball = f"{row.norm} {row.eps}"
        lines.append(f"| {_md(row.label)} | {ball} | {percent(row.robust_accuracy)} | {spanned(row.interval)} |")
    for case in result.worst_cases:
        ball = f"{case.norm} {case.eps}"
        lines.append(f"| **worst case** | {ball} | **{percent(case.robust_accuracy)}** | {spanned(case.interval)} |")
    lines += ["", f"n = {result.n} test images, seed {result.seed}, worst case per image."]
    if result.flags:
        lines += ["", "What the checks say about these numbers:", ""]
        lines += [f"- **{flag.id}** ({flag.severity}): {_md(f'{flag.what} {flag.why}')}" for flag in result.flags]
    if result.command:
        lines += ["", f"Measured by `{_code(result.command)}`."]
    return lines


def _code(text: Any) -> str:
    return str(text).replace("`", " ")


def _md(text: str) -> str:
    """Names come from strangers: nothing of them is markup."""
    escaped = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "`*_[]|":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped
