"""Checkpoints on the Hugging Face Hub: weights as safetensors, everything else as JSON, a card that states the limits.

A repository holds ``model.safetensors``, ``config.json`` (what a checkpoint says of itself), ``README.md`` (the card)
and, where there is one, ``results.json``. None of it is code, and reading it back runs none.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from scl_defense import checkpoint as checkpoints
from scl_defense.errors import SclDefenseError, UserError
from scl_defense_benchmarks.card import model_card
from scl_defense_benchmarks.report.read import read_result
from scl_defense_benchmarks.results import EvaluationResult, check_writable, write

HUB_FORMAT = "scl-defense-hub/1"
WEIGHTS, CONFIG, CARD, RESULT = "model.safetensors", "config.json", "README.md", "results.json"
LARGEST_JSON = 1 << 26  # bytes
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and where to. url: ``None`` where it was only written to ``folder``."""

    repository: str
    files: tuple[str, ...]
    url: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Pulled:
    """What was downloaded. checkpoint: a file that every command reads; revision: the commit on the hub."""

    checkpoint: Path
    result: Path | None
    card: Path | None
    revision: str | None


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    result: str | Path | None = None,
    public: bool = False,
    revision: str | None = None,
    folder: str | Path | None = None,
    endpoint: str | None = None,
    message: str = "scl-defense push",
) -> Pushed:
    """Upload a checkpoint of this project; the command ``scl-defense push`` is this call.

    repository: ``OWNER/NAME``, made where it is not there, private unless ``public``. result: what ``benchmark --out``
    wrote of this very checkpoint; the card tells its numbers and their limits, and without one that nothing was
    measured. folder: write the files there and upload nothing. endpoint: another hub than ``HF_ENDPOINT`` says. Whoever
    is logged in (``hf auth login``, ``HF_TOKEN``) uploads.

    Raises :class:`UserError` for a file that is no checkpoint of this project, a result of another one, a folder that
    is not empty; :class:`SclDefenseError` when the hub refuses.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"'{repository}' is no repository; write OWNER/NAME")
    content, sha256 = checkpoints.read(checkpoint)
    measured = None if result is None else _result_of(Path(result), Path(checkpoint), sha256)
    with tempfile.TemporaryDirectory() as made:
        files = _write(Path(made), content, sha256, repository, measured)
        if folder is not None:
            target = Path(folder)
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise UserError(f"'{target}' is there and not empty; choose another --folder")
            target.mkdir(parents=True, exist_ok=True)
            for name in files:
                (target / name).write_bytes((Path(made) / name).read_bytes())
            return Pushed(repository, files, folder=target)
        with _hub(endpoint) as api:
            url = api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=made, revision=revision, commit_message=message)
        return Pushed(repository, files, url=str(url))


def pull(
    source: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    endpoint: str | None = None,
) -> Pulled:
    """Fetch what :func:`push` uploaded, as a checkpoint; the command ``scl-defense pull`` is this call.

    source: ``OWNER/NAME``, or a folder with the files. out: ``FILE.pt`` (default ``NAME.pt``); its card and result go
    beside it as ``FILE.md`` and ``FILE-result.json``. A file that is there is only replaced with ``force``. Weights
    must have the SHA-256 that the configuration names, and the checkpoint is checked as every other.

    Raises :class:`UserError` for a repository that is not there or holds something else, :class:`SclDefenseError` when
    the hub cannot be reached.
    """
    local = Path(source)
    if not local.is_dir() and not _REPOSITORY.fullmatch(str(source)):
        raise UserError(f"'{source}' is neither a folder nor a repository; write OWNER/NAME")
    target = Path(out) if out is not None else Path(f"{local.name}.pt")
    if target.suffix != ".pt":
        raise UserError(f"'{target}' must end in .pt; the card and the result are written beside it")
    beside = {RESULT: target.with_name(f"{target.stem}-result.json"), CARD: target.with_suffix(".md")}
    for path in (target, *beside.values()):
        if path.exists() and not force:
            raise UserError(f"'{path}' exists; choose another --out, or replace it with --force")
    if local.is_dir():
        return _read(local, target, beside, str(source), None)
    with tempfile.TemporaryDirectory() as made:
        with _hub(endpoint) as api:
            found = api.model_info(str(source), revision=revision)
            names = {one.rfilename for one in found.siblings or ()}
            if not {WEIGHTS, CONFIG} <= names:
                raise UserError(f"'{source}' was not written by scl-defense push: it lacks {WEIGHTS} or {CONFIG}")
            for name in (WEIGHTS, CONFIG, CARD, RESULT):
                if name in names:
                    api.hf_hub_download(str(source), name, revision=found.sha, local_dir=made)
        return _read(Path(made), target, beside, str(source), found.sha)


# -- a repository's files


def _write(
    folder: Path, content: Mapping[str, Any], sha256: str, repository: str, result: EvaluationResult | None
) -> tuple[str, ...]:
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in content["network"].items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    about = {name: value for name, value in content.items() if name not in checkpoints.WEIGHTS}
    config = {
        "hub_format": HUB_FORMAT,
        "weights_sha256": _sha256(folder / WEIGHTS),
        "checkpoint_sha256": sha256,
        "checkpoint": about,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(content, repository, result), encoding="utf-8")
    if result is not None:
        write(result, folder / RESULT)
    return tuple(sorted(path.name for path in folder.iterdir()))


def _read(folder: Path, target: Path, beside: Mapping[str, Path], source: str, revision: str | None) -> Pulled:
    config = _config(folder, source)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"'{source}' was not written by scl-defense push: it lacks {WEIGHTS}")
    if _sha256(weights) != config["weights_sha256"]:
        raise UserError(f"the weights of '{source}' are not those that {CONFIG} names (SHA-256 differs); pull again")
    try:
        network = load_file(weights)
    except Exception as error:  # safetensors has its own
        raise UserError(f"the weights of '{source}' cannot be read: {' '.join(str(error).split())[:200]}") from None
    about = {name: value for name, value in config["checkpoint"].items() if name not in checkpoints.WEIGHTS}
    origin = {"hub": source, "revision": revision, "checkpoint_sha256": config.get("checkpoint_sha256")}
    content = {**about, "network": network, "origin": origin}
    if content.pop("format", None) != checkpoints.FORMAT:
        raise UserError(f"'{source}' has a checkpoint format that this version does not read ({checkpoints.FORMAT})")
    result = read_result(folder / RESULT) if (folder / RESULT).is_file() else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as made:
        whole = Path(made) / "whole.pt"
        checkpoints.save(whole, content)
        checkpoints.read(whole)  # what is malformed must not take the place of a file that was not
        checkpoints.atomic_write_bytes(target, whole.read_bytes())
    card = None
    if (folder / CARD).is_file():
        card = beside[CARD]
        checkpoints.atomic_write_bytes(card, (folder / CARD).read_bytes())
    if result is not None:
        check_writable(beside[RESULT])
        write(result, beside[RESULT])
    return Pulled(target, beside[RESULT] if result is not None else None, card, revision)


def _config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{CONFIG} of '{source}' is larger than {LARGEST_JSON >> 20} MiB")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"'{source}' was not written by scl-defense push: it has no readable {CONFIG}") from None
    if not isinstance(config, dict) or config.get("hub_format") != HUB_FORMAT:
        raise UserError(f"'{source}' was not written by scl-defense push: its {CONFIG} is not {HUB_FORMAT}")
    if not isinstance(config.get("checkpoint"), dict) or not isinstance(config.get("weights_sha256"), str):
        raise UserError(f"{CONFIG} of '{source}' is malformed: it lacks checkpoint or weights_sha256")
    if fault := checkpoints.tangled(config):
        raise UserError(f"{CONFIG} of '{source}' is malformed: {fault}")
    return config


def _result_of(path: Path, checkpoint: Path, sha256: str) -> EvaluationResult:
    result = read_result(path)
    known = (result.checkpoint or {}).get("sha256")
    if known != sha256:
        raise UserError(
            f"'{path}' is a result of another checkpoint ({str(known)[:12]}, '{checkpoint}' is {sha256[:12]}); "
            f"make one: scl-defense benchmark {checkpoint} --out result.json"
        )
    return result


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- the hub


@contextmanager
def _hub(endpoint: str | None) -> Iterator[Any]:
    """The hub's own client. What it raises comes out as one line."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors, utils
    except ImportError:
        raise UserError("push and pull need huggingface_hub: pip install 'scl-defense[hub]'") from None
    bars = utils.are_progress_bars_disabled()
    try:
        utils.disable_progress_bars()
        yield hub.HfApi(endpoint=endpoint, library_name="scl-defense")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise UserError(f"the hub has no such repository, revision or file, or it is private: {_line(error)}") from None
    except (errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise UserError(_line(error)) from None
    except SclDefenseError:
        raise
    except errors.HfHubHTTPError as error:
        raise SclDefenseError(f"the hub refused: {_line(error)}; are you logged in? (hf auth login)") from None
    except Exception as error:  # of whichever HTTP library it uses
        told = f"{type(error).__name__}: {_line(error)}"
        raise SclDefenseError(f"the hub cannot be reached, or answers strangely: {told}") from None
    finally:
        if not bars:
            utils.enable_progress_bars()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
