"""``scl-defense benchmark``: names the benchmark layer, never knows it."""

import hashlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.cli.subject import as_given, found, subject_options
from scl_defense.errors import UserError
from scl_defense.launcher import leads

MOST_PICTURES = 256 * 2**20  # bytes of examples that are kept for the page alone


class _Images(click.IntRange):
    name = "images"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command("benchmark")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--attacks", default="fgsm,pgd,cw", show_default=True, metavar="LIST",
              help="Attacks with options (pgd:steps=40,art:cw,cw:eps=0.5; see: plugins list attacks), or a battery: "
              "quick (noise, fgsm, pgd, pgd-l2), standard (quick + cw, deepfool, apgd-ce, apgd-dlr, apgd-t, fab-t, "
              "square), full (standard + cross-checks + autoattack). Short for options: pgd-l2, pgd-20, pgd-100, "
              "cw-art (art:cw), hopskipjump (hsj). What cannot work is skipped, and the table says why.")  # fmt: skip
@subject_options
@click.option("--norm", type=click.Choice(["linf", "l2", "l1", "l0"]), help="Norm; default: the checkpoint's.")
@click.option("--eps", metavar="EPS", help="Radius, as 8/255 or 0.1; default: the checkpoint's. Several are a curve: "
              "2/255,4/255,8/255 (the largest is the main one).")  # fmt: skip
@click.option("--curve", type=click.IntRange(2, 1000), metavar="POINTS",
              help="Also accuracy against eps, at so many radii up to the main one, from one search (pgd-min) that "
              "costs little more than PGD at one radius.")  # fmt: skip
@click.option("--n", type=click.IntRange(min=1), help="Attack only so many test images (stratified); all, if fewer.")
@click.option("--mode", type=click.Choice(["independent", "cascade"]), default="independent", show_default=True,
              help="independent: every attack gets every image, so that they compare; cascade: only what no attack "
              "before it has broken.")  # fmt: skip
@click.option("--time-limit", metavar="TIME", help="Seconds, or 10m, 2h: an attack that does not fit is 'not run'.")
@click.option("--surrogate", metavar="CKPT", help="Another network, for attacks that transfer from it.")
@click.option("--surrogate-model", metavar="NAME", help="Its network, if it is a file of bare weights; default: as "
              "--model and -m. It is normalised as --mean, --std and --channels say.")  # fmt: skip
@click.option("--probes", type=click.Choice(["quick", "deep", "none"]), default="quick", show_default=True,
              help="How much is tried beside the battery to find masked gradients.")  # fmt: skip
@click.option("--batch-size", type=_Images(), default=128, show_default=True, metavar="N|auto",
              help="The most images at a time; saves memory and reaches no number. auto: what fits into half of the "
              "free memory.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "auto", "bf16"]), default="fp32", show_default=True,
              help="What attacks run in; every verdict is float32. bf16: bfloat16 first, then float32 on what "
              "survived; auto: only where it was measured to find as much, and is faster here.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Batches attacked side by side; default: as many as torch "
              "has threads. Reaches no number.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every attack.")
@click.option("--deterministic", is_flag=True, help="The same numbers bit by bit on CUDA too, slower (on the CPU it "
              "is so anyway).")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--out", metavar="FILE.json", help="Result file; default: beside the checkpoint. The same command "
              "goes on where a stopped one was.")  # fmt: skip
@click.option("--restart", is_flag=True, help="Throw away what a stopped benchmark has left, and begin again.")
@click.option("--per-image", metavar="FILE.csv", help="Write a line for each attack and image.")
@click.option("--save-examples", metavar="FILE.safetensors", help="Write the adversarial examples, float32.")
@click.option("--fail-under", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Exit 1 when the worst case of the main ball is below this, unknown, or in doubt.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit 1 when a flag says that a number cannot be trusted.")
@common.report_option
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    checkpoint: str,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    out: str | None,
    time_limit: str | None,
    restart: bool,
    per_image: str | None,
    save_examples: str | None,
    fail_under: float | None,
    strict: bool,
    report: bool | None,
    **settings: Any,
) -> None:
    """Attack a trained checkpoint on the test split; every example is checked again by us.

    \b
    scl-defense benchmark runs/RUN/best.pt --attacks fgsm,pgd,cw
    scl-defense benchmark runs/RUN/best.pt --attacks standard --n 200
    scl-defense benchmark runs/RUN/best.pt --attacks torchattacks:pgd,art:pgd,native:pgd --eps 0.2
    scl-defense benchmark runs/RUN/best.pt --attacks pgd:restarts=5 --eps 2/255,4/255,8/255
    scl-defense benchmark runs/RUN/best.pt --attacks pgd --curve 8
    scl-defense benchmark runs/RUN/best.pt --attacks standard --mode cascade --fail-under 0.4
    """
    common.host_for(plugins)  # a broken --plugin is answered first
    path = found(checkpoint)
    settings = as_given(settings)
    if out is None:
        beside = path if isinstance(path, Path) else Path(re.sub(r"[^\w.-]", "-", checkpoint) + ".name")
        out = str(_beside(beside, {**settings, "plugins": plugins}))
    from scl_defense import benchmark
    from scl_defense.cli.progress import AttackProgress

    paged = bool(report or (report is None and not quiet and not as_json))
    # The page shows pictures: where nobody wants the examples, they are kept until it is written, if not large.
    shown, most = save_examples, None
    if paged and save_examples is None:
        shown, most = str(Path(out).with_name(f".{Path(out).stem}-pictures.safetensors")), MOST_PICTURES
    opened: dict[str, Any] = {}
    try:
        with AttackProgress(quiet=quiet or as_json or not leads()) as progress:
            result = benchmark(
                path,
                plugins=plugins,
                out=out,
                time_limit=_seconds(time_limit),
                restart=restart,
                per_image=per_image,
                save_examples=shown,
                examples_most=most,
                progress=progress,
                on_open=lambda network, images: opened.update(network=network, images=images.cpu()),
                command=shlex.join(["scl-defense", *sys.argv[1:]]),
                **settings,
            )
    except KeyboardInterrupt:
        if leads():
            click.echo("the same command goes on where it stopped", err=True)
        raise
    if not leads():  # one of several processes speaks
        return
    page = None
    if paged:
        given = shown if shown is not None and Path(shown).exists() else None
        page = common.write_page(out, examples=given, plugins=plugins, **opened)
        if given != save_examples:
            Path(shown or "").unlink(missing_ok=True)
    if as_json:
        common.print_json({**result.to_json(), "file": out, **({} if page is None else {"report": page})})
    else:
        _show(result)
        taken = (result.checkpoint or {}).get("output")
        if taken is not None:
            click.echo(f"the network returns several outputs: {taken!r} holds the logits")
        click.echo(f"result: {shlex.quote(out)}")
        if page is not None:
            click.echo(f"report: {shlex.quote(page)} (opens in any browser)")
        for file in (file for file in (per_image, save_examples) if file):
            click.echo(f"also: {shlex.quote(file)}")
    if reasons := _failures(result, fail_under, strict):
        click.echo(f"failed: {'; '.join(reasons)}", err=True)
        raise click.exceptions.Exit(1)


def _failures(result: Any, fail_under: float | None, strict: bool) -> list[str]:
    """Why the command ends with 1: nothing ran, or what was demanded of the numbers does not hold."""
    found = []
    if all(row.status in ("failed", "not run") for row in result.attacks):
        every = all(row.status == "failed" for row in result.attacks)
        found.append("every attack failed" if every else "no attack was run")
    if fail_under is not None:
        case = result.worst_case
        worst = None if case is None else case.robust_accuracy
        if worst is None:
            found.append(f"the worst case is unknown, --fail-under {fail_under:g} asks for one")
        elif worst < fail_under:
            found.append(f"the worst case {worst:.3f} is below --fail-under {fail_under:g}")
        elif not result.complete:
            found.append("not every attack was run, so that the worst case is an upper bound")
        elif result.conclusion.kind == "not-trustworthy":
            found.append(f"--fail-under asks for a number that can be trusted: {result.conclusion.text}")
    grave = sorted({flag.id for flag in result.flags if flag.severity == "error"})
    if strict and grave:
        found.append(f"--strict: {', '.join(grave)}")
    return found


def _seconds(text: str | None) -> float | None:
    """``600``, ``600s``, ``10m``, ``1.5h`` -> seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--time-limit {text!r} must be a time above 0, like 600, 90s, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _beside(checkpoint: Path, settings: dict[str, Any]) -> Path:
    """The same question again goes into the same file; another question never overwrites an answer."""
    asked = sorted(
        (name, value)
        for name, value in settings.items()
        if name not in ("device", "say", "workers") and not (name in ("surrogate_model", "curve") and value is None)
    )
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()
    return checkpoint.with_name(f"{checkpoint.stem}-benchmark-{digest[:8]}.json")


def _show(result: Any) -> None:
    from importlib import import_module

    # The benchmark layer draws its own table; it is named here, never known.
    common.console().print(import_module("scl_defense_benchmarks.display").render(result))
