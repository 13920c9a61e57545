"""The command ``scl-defense report`` as a call: read, gather, write the page and what lies beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense.errors import UserError
from scl_defense_benchmarks.report.read import Source, Study, named, read_any
from scl_defense_benchmarks.results import EvaluationResult

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ReportFiles:
    """What was written. page: the HTML file. beside: tables, figures, model info. missing: what could not be shown."""

    page: Path
    beside: tuple[Path, ...]
    missing: tuple[str, ...]


def report(
    sources: Any,
    out: str | Path,
    *,
    examples: str | Path | Iterable[str | Path | None] | None = None,
    data_root: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    pictures: int = 300,
    tsne: bool = False,
    alone: bool = False,
    images: "Tensor | None" = None,
    network: "nn.Module | None" = None,
) -> ReportFiles:
    """Write one self-contained HTML page of a result, of several side by side, or of a study's folder.

    sources: a path or an :class:`EvaluationResult`, or a list of them; a study stands alone. out: ``FILE.html``;
    beside it ``FILE-table.csv``, ``.md`` and ``.tex``, ``FILE-model-info.json`` (RobustBench's form) and, where a curve
    was measured, ``FILE-curve.png`` and ``.pdf``. examples: ``FILE.safetensors`` of ``benchmark(save_examples=)``, one
    for each result in their order. Checkpoint and data are looked for where the result says, beside the result, and in
    ``data_root``; only what has the recorded fingerprint is used. Nothing is downloaded and no code of a file runs.
    pictures: the most in a gallery. tsne: a second map. alone: the numbers of the result files alone, nothing is opened
    beside them. images, network: of the one result, where the caller has them: (N, C, H, W) in [0, 1], -> logits.

    Raises :class:`UserError`, one line, for what is no result or study, or does not belong together.

    >>> import scl_defense
    >>> files = scl_defense.report("benchmarks/results/q1-digits", "study.html")
    >>> files.page.read_text(encoding="utf-8")[:15]
    '<!DOCTYPE html>'
    """
    given = [sources] if isinstance(sources, str | Path | EvaluationResult | Study) else list(sources)
    out = _target(out)
    if not given:
        raise UserError("there is no result to report; give a result file (.json) or a study's folder")
    if pictures < 0:
        raise UserError(f"pictures {pictures} must be at least 0")
    read: list[Any] = [(one, None) if not isinstance(one, str | Path) else (read_any(one), Path(one)) for one in given]
    studies = [one for one, _ in read if isinstance(one, Study)]
    if studies:
        if len(read) > 1:
            raise UserError("a study is reported alone; give its folder, or result files")
        from scl_defense_benchmarks.report.study_page import study_page

        return _write(out, {out: study_page(studies[0])}, [], [])
    results = named(read)
    if (images is not None or network is not None) and len(results) > 1:
        raise UserError("images and network belong to one result; give them with one")
    beside = {"data_root": data_root, "plugins": plugins, "images": images, "network": network}
    files = _examples(examples, len(results))
    if alone and any(file is not None for file in files):
        raise UserError("alone shows the numbers alone, but examples are given; leave one of the two out")
    return _report(results, out, files, alone=alone, pictures=pictures, tsne=tsne, beside=beside)


def page_beside(sources: Sequence[str | Path]) -> Path:
    """Where a page lies when nobody says: beside the (first) result, in the study's folder."""
    path = Path(sources[0])
    if len(sources) > 1:
        return path.with_name("compared.html")
    if path.is_dir():
        return path / "report.html"
    return path.with_name("report.html") if path.name == "results.jsonl" else path.with_suffix(".html")


def _report(
    results: Sequence[Source],
    out: Path,
    examples: Sequence[str | Path | None],
    *,
    alone: bool,
    pictures: int,
    tsne: bool,
    beside: dict[str, Any],
) -> ReportFiles:
    from scl_defense_benchmarks.report import exports
    from scl_defense_benchmarks.report.evidence import Opened, open_beside
    from scl_defense_benchmarks.report.page import results_page

    opened = [Opened() if alone else open_beside(source, examples=file, **beside)
              for source, file in zip(results, examples, strict=True)]  # fmt: skip
    stem = out.with_suffix("")
    texts = {
        out: results_page(results, opened, pictures=pictures, tsne=tsne),
        # Not FILE.csv: beside FILE.json that may be what --per-image wrote.
        stem.with_name(f"{stem.name}-table.csv"): exports.comma(results),
        stem.with_name(f"{stem.name}-table.md"): exports.markdown(results),
        stem.with_name(f"{stem.name}-table.tex"): exports.latex(results),
    }
    for number, source in enumerate(results, 1):
        mark = "" if len(results) == 1 else f"-{number}"
        texts[stem.with_name(f"{stem.name}{mark}-model-info.json")] = exports.model_info(source)
    return _write(out, texts, exports.curve_files(results, stem), [text for one in opened for text in one.missing])


def _write(out: Path, texts: dict[Path, str], drawn: Sequence[Path], missing: Sequence[str]) -> ReportFiles:
    from scl_defense.checkpoint import atomic_write_bytes

    for path, text in texts.items():
        # A name may hold half of a surrogate pair, which no file can: it is shown as a question mark.
        atomic_write_bytes(path, text.encode("utf-8", errors="replace"))
    return ReportFiles(out, (*(path for path in texts if path != out), *drawn), tuple(dict.fromkeys(missing)))


def _target(out: str | Path) -> Path:
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"'{out}' must end in .html; tables and figures are written beside it")
    if out.is_dir():
        raise UserError(f"'{out}' is a directory; give the page a file name, like {out / 'report.html'}")
    if out.is_file() and b'name="generator" content="scl-defense' not in out.open("rb").read(4096):
        raise UserError(f"'{out}' is there and no page of ours; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{out.parent}': {error.strerror}; choose another --out") from None
    return out


def _examples(given: Any, many: int) -> list[str | Path | None]:
    files = [] if given is None else [given] if isinstance(given, str | Path) else list(given)
    if len(files) > many:
        raise UserError(f"{len(files)} files of examples for {many} results; give at most one for each, in their order")
    return [*files, *[None] * (many - len(files))]
