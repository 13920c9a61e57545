"""Result files and study folders, read back. They come from strangers: every type and length is checked first."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel, parse_eps
from scl_defense_benchmarks.results import OUTCOMES, SCHEMA, EvaluationResult

LARGEST = 1 << 30  # bytes: 10 000 images under 20 attacks are 10 MB


@dataclass(frozen=True)
class Source:
    """A result and what it is called on the page. path: its file, ``None`` for one that was handed over in memory."""

    name: str
    result: EvaluationResult
    path: Path | None = None


@dataclass(frozen=True)
class Study:
    """What a study has left in its folder. labels: arm -> its name on paper, where a table says it."""

    folder: Path
    title: str
    about: Mapping[str, Any]
    lines: tuple[Mapping[str, Any], ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    times: tuple[Mapping[str, Any], ...] = ()
    summary: str = ""


def read_any(path: str | Path) -> EvaluationResult | Study:
    """A result file, a study's folder, or its ``results.jsonl``. Raises :class:`UserError`, one line."""
    path = Path(path)
    if path.is_dir():
        if (path / "results.jsonl").exists():
            return read_study(path)
        raise UserError(f"'{path}' is a folder without results.jsonl; give a study's folder or a result file (.json)")
    return read_study(path.parent) if path.name == "results.jsonl" else read_result(path)


def read_result(path: str | Path) -> EvaluationResult:
    """The result in ``FILE.json``. Raises :class:`UserError`, one line, for anything that is none."""
    path = Path(path)
    content = _json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or not schema.startswith("scl-defense-result/"):
        raise UserError(f"'{path}' is no benchmark result: it has no schema {SCHEMA}; give what benchmark --out wrote")
    if schema != SCHEMA:
        raise UserError(f"'{path}' has schema {schema!r}; this version reads {SCHEMA}: install a newer scl-defense")
    result = _validated(path, content)
    if fault := _fault(result):
        raise UserError(f"'{path}' is damaged: {fault}; run the benchmark again")
    return result


def _json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # reading a device or a pipe would never end
            raise UserError(f"'{path}' is no regular file; give what benchmark --out wrote")
        if path.stat().st_size > LARGEST:
            raise UserError(f"'{path}' is larger than {LARGEST >> 20} MB; that is no benchmark result")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"result '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(f"'{path}' is not JSON ({text}); give what benchmark --out wrote") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(EvaluationResult)


def _validated(path: Path, content: Mapping[str, Any]) -> EvaluationResult:
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(dict(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{path}' is damaged: {where}: {first['msg']}; run the benchmark again") from None


def _fault(result: EvaluationResult) -> str | None:
    """What does not fit together in a result, on one line."""
    n, classes = result.n, result.num_classes
    if n < 1 or classes < 2:
        return f"n {n} must be at least 1 and num_classes {classes} at least 2"
    for name in ("labels", "predictions"):
        values = getattr(result, name)
        if len(values) != n or not all(-1 <= value < classes for value in values):
            return f"{name} must be {n} classes from 0 to {classes - 1}"
    if result.indices is not None and len(result.indices) != n:
        return f"indices must be {n} numbers"
    if sum(a == b for a, b in zip(result.labels, result.predictions, strict=True)) != result.clean_correct:
        return f"clean_correct {result.clean_correct} is not what labels and predictions say"
    try:
        parts: tuple[Any, ...] = (*result.attacks, *result.worst_cases)
        balls = [(part.norm, part.eps) for part in (result, *parts)]
        if any(ThreatModel(norm, "0").norm != norm for norm, _ in balls):
            return "a norm is not written as one"
        for _, eps in balls:
            parse_eps(eps)
    except UserError as error:
        return str(error)
    codes = set(OUTCOMES.values())
    for part in parts:
        if len(part.outcomes) != n or not codes.issuperset(part.outcomes):
            return f"outcomes must be {n} codes from 0 to {max(codes)}"
        if not all(0 <= share <= 1 for share in (part.robust_accuracy, *(part.interval or ())) if share is not None):
            return "a share does not lie in [0, 1]"
    for row in result.attacks:
        if len(row.distances) != n or (row.predictions and len(row.predictions) != n):
            return f"attack '{row.label}' must have {n} distances and predictions"
        if row.rounded is not None and not 0 <= row.rounded <= row.made != 0:
            return f"attack '{row.label}' has {row.rounded} rounded of {row.made} examples"
        if not all(-1 <= value < classes for value in row.predictions):
            return f"attack '{row.label}' predicts a class that is none"
    labels = [row.label for row in result.attacks]
    names = (result.data or {}).get("classes")
    if len(set(labels)) != len(labels):
        return "two attacks have one label"
    if names is not None and (not isinstance(names, list | tuple) or len(names) != classes):
        return f"data.classes must be {classes} names"
    return None


# -- a study


def read_study(folder: str | Path) -> Study:
    """``results.jsonl`` and what lies beside it. Raises :class:`UserError`, one line."""
    folder = Path(folder)
    try:
        lines = [_line(text, folder) for text in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the results of study '{folder}' cannot be read: {error}") from None
    if not lines:
        raise UserError(f"study '{folder}' has no finished cell; run the study first")
    about = _optional(folder / "study.json")
    summary = folder / "summary.md"
    return Study(
        folder=folder,
        title=str(about.get("title") or folder.resolve().name),
        about=about,
        lines=tuple(lines),
        labels=_labels(folder / "table.csv"),
        times=_times(folder / "times.jsonl"),
        summary=summary.read_text(encoding="utf-8", errors="replace") if summary.is_file() else "",
    )


_NEEDED = {"cell": str, "arm": str, "context": str, "seed": int, "n": int, "threat": str, "clean": float,
           "batteries": dict, "curve": dict, "versions": dict, "machine": dict, "images": str}  # fmt: skip


def _line(text: str, folder: Path) -> dict[str, Any]:
    try:
        line = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        line = None
    if isinstance(line, dict):
        wrong = [name for name, kind in _NEEDED.items() if not isinstance(line.get(name), kind)]
        if not wrong and line["batteries"]:
            return line
    raise UserError(f"'{folder / 'results.jsonl'}' has a line that is no finished cell; run the study again") from None


def _optional(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _labels(path: Path) -> dict[str, str]:
    import csv

    try:
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError):
        return {}
    return {row["arm"]: row["label"] for row in csv.DictReader(rows) if row.get("arm") and row.get("label")}


def _times(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return ()
    return tuple(line for line in found if isinstance(line, dict))


def named(results: Sequence[tuple[EvaluationResult, Path | None]]) -> list[Source]:
    """A short name for each: the run's folder, else the file; numbers tell apart what is called alike."""
    raw = [_called(result, path) for result, path in results]
    return [
        Source(name if raw.count(name) == 1 else f"{name} ({raw[: place + 1].count(name)})", result, path)
        for place, (name, (result, path)) in enumerate(zip(raw, results, strict=True))
    ]


def _called(result: EvaluationResult, path: Path | None) -> str:
    about = result.checkpoint or {}
    where = about.get("path")
    if isinstance(where, str) and where:
        file = Path(where)
        return file.parent.name if file.stem in ("best", "last") and file.parent.name else file.name
    if isinstance(about.get("network"), str):
        return str(about["network"])
    return path.stem if path is not None else "the network"
