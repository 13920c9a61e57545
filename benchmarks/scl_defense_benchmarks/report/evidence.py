"""What a page shows beside the numbers: pictures, the embedding map, training curves; from files that are checked.

Nothing here is needed: what cannot be opened, or is not what the result was made on, is left out and the page says why.
A result may come from a stranger: its file names are read as data, never imported, and nothing is downloaded.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scl_defense.errors import SclDefenseError, UserError
from scl_defense_benchmarks.report.gather import bare
from scl_defense_benchmarks.report.read import Source
from scl_defense_benchmarks.results import BROKEN, OUTCOMES, ROBUST, UNMOVED, AttackRow, EvaluationResult

if TYPE_CHECKING:
    from torch import Tensor, nn

PICTURES = 300  # examples in a gallery, and how large their PNG data may be together
BYTES = 6 << 20
POINTS = 300  # images of an embedding map; each is there twice
CURVES = ("loss", "val_clean", "val_robust")


@dataclass(frozen=True)
class Opened:
    """What lies beside a result. missing: what could not be had, a sentence each.

    images: (N, C, H, W), those of the result, uint8 or in [0, 1] (see :func:`unit`). network: the one it attacked.
    metrics: an epoch of training each.
    """

    images: "Tensor | None" = None
    network: "nn.Module | None" = None
    examples: "Examples | None" = None
    metrics: tuple[Mapping[str, Any], ...] = ()
    missing: tuple[str, ...] = ()


def open_beside(
    source: Source,
    *,
    examples: str | Path | None = None,
    images: "Tensor | None" = None,
    network: "nn.Module | None" = None,
    data_root: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
) -> Opened:
    """Find the checkpoint, the data and the examples of a result. What was handed over is taken as it is.

    Raises :class:`UserError` for an examples file that was named and does not belong to the result.
    """
    missing = []
    if images is not None and (images.dim() != 4 or len(images) != source.result.n):
        raise UserError(
            f"images have shape {tuple(images.shape)}; the result has {source.result.n} of them, (N, C, H, W)"
        )
    checkpoint = _checkpoint_of(source)
    metrics = () if checkpoint is None else _metrics(checkpoint.parent / "metrics.jsonl")
    if network is None:
        network, why = _network(source.result, checkpoint, plugins)
        missing += [why] if why else []
    if images is None:
        images, why = _images(source.result, data_root, plugins)
        missing += [why] if why else []
    found = None if examples is None else Examples(examples, source.result)
    if found is None:
        missing.append("No example was saved, so no picture is shown: give --save-examples to benchmark, and the file "
                       "to report as --examples.")  # fmt: skip
    if not metrics:
        missing.append("No training curves: there is no metrics.jsonl beside the checkpoint.")
    return Opened(images, network, found, metrics, tuple(missing))


def unit(images: "Tensor") -> "Tensor":
    """Images as float32 in [0, 1]; a large test set is kept as bytes, and only what is shown is turned."""
    return images.float() / 255 if images.element_size() == 1 else images.float()


def _checkpoint_of(source: Source) -> Path | None:
    """The checkpoint's file, if it is still the one that was attacked: as it was named, or beside the result."""
    import hashlib

    about = source.result.checkpoint or {}
    if not isinstance(about.get("path"), str) or not isinstance(about.get("sha256"), str):
        return None
    named = Path(about["path"])
    for path in (named, *([source.path.parent / named.name] if source.path is not None else [])):
        try:
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]:
                return path
        except OSError:
            continue
    return None


def _network(result: EvaluationResult, path: Path | None, plugins: Sequence[str | Path]) -> Any:
    from scl_defense.checkpoint import FORMAT, load_classifier
    from scl_defense.plugins import default_host

    about = result.checkpoint or {}
    if path is None:
        return None, "The checkpoint that was attacked is not here, so confidences and the embedding map are left out."
    if about.get("format") != FORMAT or about.get("label_map"):
        return None, ("The checkpoint is not of this project, or its classes were mapped: confidences and the "
                      "embedding map are left out.")  # fmt: skip
    try:
        return load_classifier(path, host=default_host(plugins)).network, ""
    except SclDefenseError as error:
        return None, f"The checkpoint could not be opened ({error}), so confidences and the map are left out."


def _images(result: EvaluationResult, root: str | Path | None, plugins: Sequence[str | Path]) -> Any:
    """The test images by their places; only where the data still has the recorded fingerprint."""
    from scl_defense.data import open_data
    from scl_defense.plugins import default_host
    from scl_defense_benchmarks.subject import without_download

    about, config = result.data or {}, (result.checkpoint or {}).get("config") or {}
    name = about.get("name")
    if not isinstance(name, str) or result.indices is None:
        return None, "The result does not say which data it was made on, so the original images are not shown."
    own = isinstance(config, Mapping) and config.get("data") == name
    options = config.get("data_options") if own and isinstance(config.get("data_options"), Mapping) else None
    recorded = config.get("data_root") if own and isinstance(config.get("data_root"), str) else None
    root = root if root is not None else recorded if recorded and Path(recorded).is_dir() else None
    try:
        host = default_host(plugins)
        opened = open_data(name, root=root, options=without_download(host, name, options), host=host)
        if opened.fingerprint("test") != about.get("fingerprint"):
            return None, f"The data '{name}' that is here is not what the result was made on: no original is shown."
        split = opened.split("test")
        places = np.array(result.indices)
        if places.min() < 0 or places.max() >= len(split.images) or len(places) != result.n:
            return None, f"The places of the images do not fit the data '{name}': no original is shown."
        images = split.images[places]
    except SclDefenseError as error:
        return None, f"The data could not be opened ({error}), so the original images are not shown."
    return images, ""


# -- pictures


class Examples:
    """The adversarial examples of a result, read one by one: float32 (C, H, W) in [0, 1]."""

    def __init__(self, path: str | Path, result: EvaluationResult):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(f"examples '{path}' cannot be read: {text}; give what --save-examples wrote") from None
        if (self._file.metadata() or {}).get("schema") != "scl-defense-adversarial/1":
            raise UserError(f"'{path}' holds no adversarial examples of a benchmark; give what --save-examples wrote")
        labels = {row.label for row in result.attacks}
        self.labels = [label for label in self._file.keys() if label in labels]  # noqa: SIM118
        shapes = {tuple(self._file.get_slice(label).get_shape()) for label in self.labels}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[0] != result.n:
            raise UserError(f"the examples in '{path}' belong to another result: this one has {result.n} images under "
                            f"{len(labels)} attacks; give the file that the same benchmark wrote")  # fmt: skip

    def __contains__(self, label: str) -> bool:
        return label in self.labels

    def one(self, label: str, image: int) -> "Tensor":
        return self._file.get_slice(label)[image : image + 1][0]


@dataclass(frozen=True)
class Picture:
    """One example. data: the PNG as a data URI, original, magnified perturbation and adversarial side by side, or the
    last alone where the original is not known. label, clean, adversarial: class numbers; confidence: softmax of
    (clean, adversarial) prediction, or ``None``. times: by how much the perturbation was magnified.
    """

    attack: str
    ball: str
    image: int
    index: int
    label: int
    clean: int
    adversarial: int
    outcome: str
    distance: float | None
    norm: str
    times: float | None
    confidence: tuple[float, float] | None
    shape: tuple[int, int]
    data: str


@dataclass(frozen=True)
class Gallery:
    """pictures: chosen evenly over attacks, classes and outcomes. total: examples that could have been shown."""

    pictures: tuple[Picture, ...]
    total: int
    attacks: tuple[str, ...]
    triple: bool


def gallery(result: EvaluationResult, opened: Opened, limit: int = PICTURES) -> Gallery | None:
    """``None`` without saved examples. Raises :class:`UserError` when they are not those of the result."""
    if opened.examples is None:
        return None
    rows = [row for row in _shown(result) if row.label in opened.examples]
    candidates = _candidates(result, rows)
    total = sum(len(places) for _, _, places in candidates)
    pictures, spent = [], 0
    for row, won, image in _evenly(candidates, limit):
        picture = _picture(result, opened, row, won, image)
        pictures.append(picture)
        spent += len(picture.data)
        if spent > BYTES:
            break
    pictures = _with_confidence(result, opened, pictures)
    return Gallery(tuple(pictures), total, tuple(row.label for row in rows), opened.images is not None)


def _shown(result: EvaluationResult) -> list[AttackRow]:
    """Attacks of the main ball, and the searches for the nearest example, each once; all where there is none."""
    main = [row for row in result.attacks if (row.norm, row.eps) == (result.norm, result.eps)]
    names = {bare(row.label) for row in main if row.minimal}
    for row in result.attacks:
        if row.minimal and bare(row.label) not in names:
            names.add(bare(row.label))
            main.append(row)
    return main or list(result.attacks)


def _candidates(result: EvaluationResult, rows: Sequence[AttackRow]) -> list[tuple[AttackRow, bool, list[int]]]:
    """(attack, fooled, images): a bucket for each attack, class and outcome; neighbours differ in class and attack."""
    labels, found = np.array(result.labels), {}
    for place, row in enumerate(rows):
        outcomes = np.array(row.outcomes)
        fooled = (np.array(row.predictions) >= 0) if row.predictions else outcomes == BROKEN
        tried = np.isin(outcomes, (BROKEN, ROBUST, UNMOVED))
        for won in (True, False):
            for number in range(result.num_classes):
                images = np.flatnonzero(tried & (fooled == won) & (labels == number)).tolist()
                if images:  # other attacks begin with other images
                    turned = images[place % len(images) :] + images[: place % len(images)]
                    found[(place - number) % len(rows), number, not won] = (row, won, turned)
    return [found[key] for key in sorted(found)]


def _evenly(
    candidates: Sequence[tuple[AttackRow, bool, list[int]]], limit: int
) -> Iterator[tuple[AttackRow, bool, int]]:
    """Round and round, one of each bucket, until ``limit``; a bucket that held out comes in every fourth round."""
    longest = max((len(images) for _, _, images in candidates), default=0)
    order = (
        (row, won, images[k if won else k // 4])
        for k in range(4 * longest)
        for place, (row, won, images) in enumerate(candidates)
        if (k < len(images) if won else (place + k) % 4 == 3 and k // 4 < len(images))
    )
    return islice(order, limit)


def _picture(result: EvaluationResult, opened: Opened, row: AttackRow, won: bool, image: int) -> Picture:
    assert opened.examples is not None
    made = opened.examples.one(row.label, image).float()
    parts, times = [made], None
    if opened.images is not None:
        original = unit(opened.images[image].cpu())
        if original.shape != made.shape:
            raise UserError(f"the examples in '{opened.examples.path}' have shape {tuple(made.shape)}, the images "
                            f"{tuple(original.shape)}; give the file that the same benchmark wrote")  # fmt: skip
        _check_distance(opened.examples.path, row, image, original, made)
        change = made - original
        largest = float(change.abs().max())
        times = 0.5 / largest if largest > 0 else None
        parts = [original, 0.5 + change * (times or 0.0), made]
    adversarial = row.predictions[image] if row.predictions and row.predictions[image] >= 0 else -1
    outcome = next(name for name, code in OUTCOMES.items() if code == row.outcomes[image])
    if won and row.outcomes[image] != BROKEN:
        outcome = "beyond eps"
    return Picture(
        attack=row.label,
        ball=f"{row.norm} {row.eps}",
        image=image,
        index=result.indices[image] if result.indices is not None else image,
        label=result.labels[image],
        clean=result.predictions[image],
        adversarial=adversarial if won else result.labels[image],
        outcome=outcome,
        distance=row.distances[image],
        norm=row.norm,
        times=times,
        confidence=None,
        shape=(int(made.shape[1]), int(made.shape[2])),
        data=_png(parts),
    )


def _check_distance(path: Path, row: AttackRow, image: int, original: "Tensor", made: "Tensor") -> None:
    from scl_defense.threat import ThreatModel

    recorded = row.distances[image]
    if recorded is None:
        return
    measured = float(ThreatModel(row.norm, row.eps).distance(original[None], made[None])[0])
    if abs(measured - recorded) > 1e-4 + 1e-3 * recorded:
        raise UserError(f"the examples in '{path}' belong to another result: image {image} under {row.label} lies "
                        f"{measured:.4g} away, the result says {recorded:.4g}; give its own file")  # fmt: skip


def _png(parts: Sequence["Tensor"]) -> str:
    """(C, H, W) images side by side as one PNG: a data URI."""
    from PIL import Image

    wide = np.concatenate([(part.clamp(0, 1) * 255).round().byte().numpy() for part in parts], axis=2)
    if wide.shape[0] not in (1, 3):
        wide = wide[:1]
    pixels = wide[0] if wide.shape[0] == 1 else wide.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", optimize=False)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _with_confidence(result: EvaluationResult, opened: Opened, pictures: Sequence[Picture]) -> list[Picture]:
    """The softmax of the network's two answers; left out where its answers are not those of the result."""
    if opened.network is None or opened.images is None or opened.examples is None or not pictures:
        return list(pictures)
    import torch

    from scl_defense_benchmarks.forward import logits_of

    device = next((p.device for p in opened.network.parameters()), torch.device("cpu"))
    clean = unit(torch.stack([opened.images[picture.image] for picture in pictures]).to(device))
    made = torch.stack([opened.examples.one(picture.attack, picture.image) for picture in pictures]).to(device)
    try:
        with _at_rest(opened.network):
            answers = [logits_of(opened.network, part).softmax(1).max(1) for part in (clean, made)]
    except Exception:  # a stranger's network may raise whatever it likes; the labels are known without it
        return list(pictures)
    found = []
    for place, picture in enumerate(pictures):
        (before, first), (after, second) = ((float(a.values[place]), int(a.indices[place])) for a in answers)
        same = (first, second) == (picture.clean, picture.adversarial)
        found.append(replace(picture, confidence=(before, after) if same else None))
    return found


def _at_rest(network: "nn.Module") -> Any:
    from contextlib import ExitStack

    from scl_defense.guard import frozen
    from scl_defense.runtime import repeatable

    stack = ExitStack()
    stack.enter_context(frozen(network))
    stack.enter_context(repeatable("fp32"))
    return stack


# -- the embedding map


@dataclass(frozen=True)
class Map:
    """Features of test images and of their adversarials on two axes. clean, adversarial: (x, y) by image.

    labels, fooled: by image. axes: names of the axes. about: how the adversarials were made.
    """

    method: str
    clean: tuple[tuple[float, float], ...]
    adversarial: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    indices: tuple[int, ...]
    fooled: tuple[bool, ...]
    axes: tuple[str, str]
    about: str


def embedding(result: EvaluationResult, opened: Opened, *, tsne: bool = False, limit: int = POINTS) -> list[Map]:
    """PCA of the encoder's features, and t-SNE if asked for; empty for a network that has no ``features``."""
    network: Any = opened.network
    images = opened.images
    if network is None or images is None or not hasattr(network, "features"):
        return []
    import torch

    from scl_defense.data import stratified_subset

    labels = np.array(result.labels)
    places = stratified_subset(labels, min(limit, result.n), 0)
    chosen = unit(images[places].cpu())
    made, about = _adversarials(result, opened, places, chosen)
    with _at_rest(network), torch.no_grad():
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        features = torch.cat([network.features(part.to(device)).flatten(1).double().cpu()
                              for cloud in (chosen, made) for part in cloud.split(64)])  # fmt: skip
        answers = torch.cat([network(part.to(device)).argmax(1).cpu() for part in made.split(64)]).numpy()
    if not bool(features.isfinite().all()):
        return []
    fooled = answers != labels[places]
    return [_projected(method, features.numpy(), result, places, fooled, about)
            for method in (("PCA", "t-SNE") if tsne else ("PCA",))]  # fmt: skip


def _adversarials(result: EvaluationResult, opened: Opened, places: np.ndarray, chosen: "Tensor") -> Any:
    """Of the saved examples the first that broke an image; else 20 steps of PGD on the margin, made now."""
    import torch

    from scl_defense.runtime import stream
    from scl_defense.threat import ThreatModel
    from scl_defense_benchmarks.native import PGD

    threat = ThreatModel(result.norm, result.eps)
    if opened.examples is not None:
        rows = [row for row in result.attacks if row.label in opened.examples and row.access != "control"
                and (row.norm, row.eps) == (result.norm, result.eps)]  # fmt: skip
        if rows:
            broke = [next((row for row in rows if row.outcomes[place] == BROKEN), rows[-1]) for place in places]
            saved = [opened.examples.one(row.label, int(place)) for row, place in zip(broke, places, strict=True)]
            return torch.stack(saved).float(), f"the saved example of an attack that broke the image within {threat}"
    if threat.norm not in ("linf", "l2", "l1") or opened.network is None:
        return chosen, "no attack"
    device = next((p.device for p in opened.network.parameters()), torch.device("cpu"))
    labels = torch.tensor(result.labels)[places].to(device)
    with _at_rest(opened.network), torch.enable_grad():
        made = PGD(steps=20, loss="margin")(opened.network, chosen.to(device), labels, threat, stream(0, "embedding"))
    return made.detach().cpu(), f"20 steps of PGD on the margin within {threat}, made for this map"


def _projected(
    method: str, features: np.ndarray, result: EvaluationResult, places: np.ndarray, fooled: np.ndarray, about: str
) -> Map:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "PCA":
        # The full decomposition has no random part; the sign of an axis is that of its largest loading.
        pca = PCA(2, svd_solver="full") if min(features.shape) > 1 else None
        points = np.zeros((len(features), 2)) if pca is None else pca.fit_transform(features)
        shares = (0.0, 0.0) if pca is None else pca.explained_variance_ratio_
        axes = tuple(f"principal axis {k + 1} ({share:.0%} of the variance)" for k, share in enumerate(shares))
    else:
        perplexity = min(30.0, max(2.0, len(features) / 4))
        points = TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(features)
        axes = (f"t-SNE, perplexity {perplexity:g}: near means alike, far means nothing", "")
    rounded = [(float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in points]
    half = len(places)
    return Map(method, tuple(rounded[:half]), tuple(rounded[half:]),
               tuple(result.labels[place] for place in places),
               tuple(result.indices[place] if result.indices is not None else int(place) for place in places),
               tuple(bool(value) for value in fooled), (axes[0], axes[1]), about)  # fmt: skip


# -- training


def _metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """One dict an epoch: its number from 1, and those of :data:`CURVES` that are numbers."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return ()
    found = {}
    for line in lines:
        if isinstance(line, dict) and isinstance(line.get("epoch"), int):
            values = {name: float(line[name]) for name in CURVES if isinstance(line.get(name), int | float)}
            if values and all(np.isfinite(list(values.values()))):
                found[line["epoch"] + 1] = values  # a resumed run may tell an epoch twice: the last counts
    return tuple({"epoch": epoch, **found[epoch]} for epoch in sorted(found))
