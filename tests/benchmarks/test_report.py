"""The report without a browser: its numbers, its exports, what it reads, and what it refuses."""

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from report_results import HOSTILE, made_up, pictures_of
from scl_defense_benchmarks.report import evidence, exports, gather, page, read, report, svg
from scl_defense_benchmarks.report.study_page import blocks
from scl_defense_benchmarks.results import BROKEN, OUTCOMES, SCHEMA, write
from scl_defense_benchmarks.torchattacks_adapter import FGSM, PGD
from torch import nn

from scl_defense.cli.app import run
from scl_defense.errors import UserError

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "results" / "q1-digits"


class Parsed(HTMLParser):
    """Texts, start tags and the raw contents of scripts and styles of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.raw, self._in = [], [], {"script": [], "style": []}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in self.raw else None
        if self._in:
            self.raw[tag].append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in:
            attrs, before = self.raw[self._in][-1]
            self.raw[self._in][-1] = (attrs, before + data)
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def alone(*results, folder, **more):
    folder.mkdir(exist_ok=True)
    made = report(list(results), folder / "page.html", alone=True, **more)
    return made, Parsed(made.page.read_text())


# -- numbers


def test_the_sets_of_attacks_are_those_of_a_plain_loop():
    result = made_up(300, attacks=("a", "b", "c", "d", "e", "f"), seed=3)
    found = gather.upset(result, "linf", "0.1")
    rows = [row for row in result.attacks if row.norm == "linf"]
    counted = Counter(
        frozenset(row.label for row in rows if row.outcomes[image] == BROKEN) for image in range(result.n)
    )
    survived = counted.pop(frozenset()) - (result.n - result.clean_correct)
    assert found.survived == survived and found.wrong == result.n - result.clean_correct
    assert {frozenset(members): count for members, count in found.sets}.items() <= counted.items()
    assert len(found.sets) == min(gather.SETS, len(counted)) and len(counted) > gather.SETS
    assert found.others == (len(counted) - gather.SETS, sum(counted.values()) - sum(n for _, n in found.sets))
    assert [n for _, n in found.sets] == sorted((n for _, n in found.sets), reverse=True)
    for row in rows:
        total, only = found.totals[row.label]
        assert total == row.broken and only == counted[frozenset([row.label])]
    assert gather.upset(result, "l2", "0.5") is None  # one attack: nothing to compare


def test_a_search_for_the_nearest_example_gives_the_curve_of_a_count():
    result = made_up(90, seed=1)
    (panel,) = [panel for panel in gather.panels(result) if panel.norm == "l2"]
    (series,) = panel.series
    row = result.row("cw")
    assert series.kind == "minimal" and series.points[0].accuracy == result.clean_accuracy
    fooled = [d for d, wrong in zip(row.distances, row.predictions, strict=True) if wrong >= 0]
    for point in series.points[1:]:
        left = result.clean_correct - sum(d <= point.radius for d in fooled)
        assert point.accuracy == pytest.approx(left / result.n, abs=1e-12)
    assert series.points[-1].accuracy == pytest.approx((result.clean_correct - len(fooled)) / result.n)


def test_a_curve_needs_two_radii_and_starts_at_the_clean_accuracy():
    assert [panel.norm for panel in gather.panels(made_up(minimal=()))] == []
    result = made_up(radii=("0.02", "8/255", "0.1"), minimal=())
    (panel,) = gather.panels(result)
    worst = panel.series[0]
    assert worst.kind == "worst" and [point.eps for point in worst.points] == ["0", "0.02", "8/255", "0.1"]
    assert worst.points[0].accuracy == result.clean_accuracy
    assert worst.points[2].radius == pytest.approx(8 / 255)
    assert [one.name for one in panel.series[1:]] == ["fgsm", "pgd", "apgd-ce"]


def test_classes_and_confusions_are_those_of_a_plain_loop():
    result = made_up(200, seed=5)
    case = result.worst_case
    for number, found in enumerate(gather.classes(result)):
        own = [k for k in range(result.n) if result.labels[k] == number]
        assert found.n == len(own) and found.name == f"class {number}"
        assert found.clean == pytest.approx(sum(result.predictions[k] == number for k in own) / len(own))
        assert found.robust == pytest.approx(sum(case.outcomes[k] == OUTCOMES["robust"] for k in own) / len(own))
        assert found.robust_interval.low <= found.robust <= found.robust_interval.high
    counts = gather.confusion(result)
    for row in result.attacks:
        pairs = Counter((result.labels[k], row.predictions[k]) for k in range(result.n) if row.outcomes[k] == BROKEN)
        assert counts[row.label] == pairs and sum(pairs.values()) == row.broken
    # One label an image: as many as the worst case has broken, and only labels that an attack gave.
    assert sum(counts[gather.WORST].values()) == case.broken
    given = {pair for row in result.attacks if row.norm == "linf" for pair in counts[row.label]}
    assert set(counts[gather.WORST]) <= given


def test_pairs_are_compared_on_the_same_images_alone():
    one, two, other = made_up(seed=1), made_up(seed=2), made_up(80, seed=3)
    sources = read.named([(one, None), (two, None), (other, None)])
    (pair,) = gather.pairings(sources)
    robust = {source.name: [o == OUTCOMES["robust"] for o in source.result.worst_case.outcomes] for source in sources}
    a, b = robust[pair.better], robust[pair.than]
    assert pair.only_better == sum(x and not y for x, y in zip(a, b, strict=True))
    assert pair.only_than == sum(y and not x for x, y in zip(a, b, strict=True))
    assert pair.paired.difference == pytest.approx((sum(a) - sum(b)) / 60) and sum(a) >= sum(b)
    assert gather.mcnemar(5, 0) == pytest.approx(2 * 0.5**5) and gather.mcnemar(0, 0) == 1.0
    assert "different test images" in gather.differences(sources)
    assert gather.differences(sources[:2]) == []


def test_the_verdict_is_one_sentence_with_number_interval_and_worth():
    text = gather.verdict_sentence(made_up())
    result = made_up()
    assert text.count(". ") == 0 and text.endswith(".")
    for part in ("60 test images of made-up", f"{100 * result.worst_case.robust_accuracy:.1f} %", "linf 0.1",
                 "95 % interval", "upper bound"):  # fmt: skip
        assert part in text
    unknown = dataclasses.replace(result, worst_cases=())
    assert "unknown" in gather.verdict_sentence(unknown)


# -- reading


def test_a_result_is_read_back_as_it_was(tmp_path):
    result = made_up(radii=("0.05", "0.1"))
    write(result, tmp_path / "r.json")
    back = read.read_result(tmp_path / "r.json")
    assert back.to_json() == result.to_json() and back.conclusion == result.conclusion


def damaged(change):
    content = made_up(20).to_json()
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no schema"),
        ('{"schema": "scl-defense-study/1"}', "no schema"),
        (damaged(lambda c: c.update(schema="scl-defense-result/99")), "newer"),
        (damaged(lambda c: c.update(n=21)), "labels"),
        (damaged(lambda c: c.update(n="many")), "n:"),
        (damaged(lambda c: c.update(clean_accuracy=float("nan"))), "NaN"),
        (damaged(lambda c: c["attacks"][0].update(outcomes=[1, 2])), "outcomes"),
        (damaged(lambda c: c["attacks"][0]["outcomes"].__setitem__(0, 9)), "outcomes"),
        (damaged(lambda c: c["attacks"][0]["predictions"].__setitem__(0, 10)), "class"),
        (damaged(lambda c: c["attacks"][1].update(label=c["attacks"][0]["label"])), "one label"),
        (damaged(lambda c: c.update(eps="1/0")), "eps"),
        (damaged(lambda c: c["attacks"][0].update(norm="<b>")), "norm"),
        (damaged(lambda c: c["data"].update(classes=["one"])), "names"),
        (damaged(lambda c: c.update(labels=[10] * 20)), "labels"),
        (damaged(lambda c: c.update(clean_correct=3)), "clean_correct"),
        (damaged(lambda c: c["attacks"][0].update(made=0, rounded=0)), "rounded"),
        (damaged(lambda c: c["worst_cases"][0].update(robust_accuracy=1.5)), "share"),
        (damaged(lambda c: c.pop("attacks")), "attacks"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, capsys, text, says):
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read.read_result(file)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert run(["report", str(file), "--out", str(tmp_path / "p.html")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "p.html").exists()


def test_names_tell_results_apart():
    same = [(made_up(), None), (made_up(), None), (made_up(checkpoint={"path": None, "network": "Net"}), None)]
    assert [source.name for source in read.named(same)] == ["made-up (1)", "made-up (2)", "Net"]


# -- the page


def test_the_page_tells_its_numbers_without_a_script(tmp_path):
    result = made_up(radii=("0.05", "0.1"))
    _, parsed = alone(result, folder=tmp_path)
    for row in result.attacks:
        assert row.label in parsed.text.replace(": ", ":")
        assert f"{100 * row.interval.low:.1f} to {100 * row.interval.high:.1f}" in parsed.text
        assert f"{row.broken} of {row.attacked}" in parsed.text
    for part in (
        "steps-not-converged",
        "fires at",
        "n = 60",
        "torch",
        result.command,
        "ab" * 32,
    ):
        assert part in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) > 10
    assert gather.verdict_sentence(result) in parsed.text


def test_the_page_is_whole_and_only_its_own_scripts_may_run(tmp_path):
    made, parsed = alone(made_up(names=HOSTILE), folder=tmp_path)
    policy = next(
        attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    running = [text for attrs, text in parsed.raw["script"] if attrs.get("type") != "application/json"]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running}
    assert len(running) == 2 and set(re.findall(r"script-src ([^;]*)", policy)[0].split()) == {
        f"'sha256-{one}'" for one in hashes
    }
    assert "default-src 'none'" in policy and "unsafe" not in policy
    (style,) = parsed.raw["style"]
    assert base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode() in policy
    for tag, attrs in parsed.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert "style" not in attrs and tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png")), (tag, attrs)
    assert made.page.read_text().count("<script") == 3


@pytest.mark.parametrize("place", ["class", "attack", "note", "path", "data", "command", "plugin", "flag"])
def test_names_of_strangers_stay_text(tmp_path, place):
    evil = HOSTILE[1] + HOSTILE[0]
    result = made_up(30)
    changed = {
        "class": lambda: made_up(30, names=HOSTILE),
        "attack": lambda: dataclasses.replace(
            result, attacks=(dataclasses.replace(result.attacks[0], label=evil), *result.attacks[1:])
        ),
        "note": lambda: dataclasses.replace(
            result, attacks=(dataclasses.replace(result.attacks[0], note=evil, status="failed"), *result.attacks[1:])
        ),
        "path": lambda: dataclasses.replace(result, checkpoint={"path": evil, "model": evil}),
        "data": lambda: dataclasses.replace(result, data={**result.data, "name": evil}),
        "command": lambda: dataclasses.replace(result, command=evil),
        "plugin": lambda: dataclasses.replace(
            result, plugins=({"plugin": evil, "distribution": evil, "version": evil},), versions={evil: evil}
        ),
        "flag": lambda: dataclasses.replace(
            result, flags=(dataclasses.replace(result.flags[0], id=evil, what=evil, why=evil, attacks=(evil,)),)
        ),
    }[place]()
    made, parsed = alone(changed, folder=tmp_path)
    text = made.page.read_text()
    assert text.count("<script") == 3 and "<img" not in text  # nothing saved: no picture either
    assert "onerror=alert(1)" in html.unescape(parsed.text)
    payload = next(raw for attrs, raw in parsed.raw["script"] if attrs.get("type") == "application/json")
    assert "<" not in payload and json.loads(payload)["schema"] == page.SCHEMA


def test_a_name_cannot_turn_the_line_it_stands_in(tmp_path):
    """U+202E makes everything after it run from right to left: a reader would see other numbers than there are."""
    made, parsed = alone(made_up(names=[*HOSTILE[:9], "a\u2066b\x00c\x1b"]), folder=tmp_path)
    text = made.page.read_text()
    assert not any(sign in text for sign in "\u202e\u2066\x00\x1b") and not re.search(r"\\u(202e|2066|0000|001b)", text)
    assert "\ufffddesrever" in parsed.text and "a\ufffdb\ufffdc\ufffd" in parsed.text
    assert "\ufffddesrever" in payload_of(made.page)["charts"]["r0-classes"]["names"]


def test_markup_of_drawings_is_escaped():
    made = svg.tag("text", "<b>&\"'", klass='"><script>', x=1.0)
    assert "<b>" not in made and "<script>" not in made and 'x="1"' in made
    chart = svg.line_chart(
        [svg.Line(HOSTILE[0], [(0, 1, 0, 2), (1, 2, 1, 3)])], title=HOSTILE[1], x_label="", y_label=""
    )
    assert "<img" not in chart and "<script" not in chart
    assert svg.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and svg.ticks(1, 1) == [1]


def test_several_results_stand_side_by_side(tmp_path):
    one, two = made_up(seed=1, radii=("0.05", "0.1")), made_up(seed=2, radii=("0.05", "0.1"))
    _, parsed = alone(one, two, folder=tmp_path)
    assert "Same images, same ball, same battery" in parsed.text and "Pairs, image by image" in parsed.text
    _, parsed = alone(one, made_up(70, seed=2), folder=tmp_path)
    assert "Not like with like" in parsed.text and "different test images" in parsed.text


# -- exports


def test_the_csv_holds_every_number_and_no_formula(tmp_path):
    result = made_up(radii=("0.05", "0.1"))
    hostile = dataclasses.replace(result.attacks[0], label="=HYPERLINK(1)")
    result = dataclasses.replace(result, attacks=(hostile, *result.attacks[1:]))
    lines = list(csv.DictReader(io.StringIO(exports.comma(read.named([(result, None)])))))
    assert [line["kind"] for line in lines] == ["clean"] + ["attack"] * 7 + ["worst case"] * 3
    for line, row in zip(lines[1:8], result.attacks, strict=True):
        assert float(line["accuracy"]) == row.robust_accuracy and int(line["broken"]) == row.broken
        assert (float(line["low"]), float(line["high"])) == tuple(row.interval)
    assert lines[1]["attack"] == "'=HYPERLINK(1)"
    assert not any(cell.startswith(("=", "+", "-", "@")) for line in lines for cell in line.values())


def test_tables_survive_hostile_names():
    result = made_up()
    rows = [dataclasses.replace(row, label=name) for row, name in zip(result.attacks, HOSTILE[3:7], strict=True)]
    sources = read.named([(dataclasses.replace(result, attacks=tuple(rows)), None)])
    lines = [line for line in exports.markdown(sources).splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert bars == {6} and not any("<img" in line for line in lines)
    body = [line for line in exports.latex(sources).splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + 1 + 4 + 2
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == 4
        plain = re.sub(r"\\(textbackslash\{\}|textasciitilde\{\}|textasciicircum\{\}|[&%$#_{}])|\\\\$", "", line)
        assert not re.search(r"[%#_{}]|\$(?![<>]\$)(?<![<>]\$)", plain), line


def test_the_model_info_has_robustbenchs_form():
    result = made_up()
    (source,) = read.named([(result, None)])
    info = json.loads(exports.model_info(source))
    theirs = {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "footnote",
              "architecture", "eps", "clean_acc", "reported", "autoattack_acc", "unreliable"}  # fmt: skip
    assert theirs <= set(info)
    assert info["autoattack_acc"] is None and info["eps"] == "0.1" and info["unreliable"] is False
    assert info["external"] == f"{100 * result.worst_case.robust_accuracy:.2f}"
    official = dataclasses.replace(result.attacks[0], label="autoattack", name="autoattack")
    (source,) = read.named([(dataclasses.replace(result, attacks=(official, *result.attacks[1:])), None)])
    assert json.loads(exports.model_info(source))["autoattack_acc"] == f"{100 * official.robust_accuracy:.2f}"


def test_files_lie_beside_the_page_and_the_users_own_csv_is_kept(tmp_path):
    result = made_up(radii=("0.05", "0.1"))
    write(result, tmp_path / "page.json")
    (tmp_path / "page.csv").write_text("per image")
    made = report(tmp_path / "page.json", tmp_path / "page.html", alone=True)
    names = {path.name for path in made.beside}
    assert names == {f"page-{end}" for end in ("table.csv", "table.md", "table.tex", "model-info.json", "curve.png",
                                               "curve.pdf")}  # fmt: skip
    assert all(path.stat().st_size > 200 for path in made.beside) and (tmp_path / "page.csv").read_text() == "per image"
    with Image.open(tmp_path / "page-curve.png") as drawn:
        assert len(set(np.asarray(drawn.convert("L")).flatten().tolist())) > 20
    again = {path: path.read_bytes() for path in made.beside}
    report(tmp_path / "page.json", tmp_path / "page.html", alone=True)
    assert all(path.read_bytes() == content for path, content in again.items())  # no dates in the files


# -- pictures and the map


class Encoder(nn.Module):
    """Features are a fixed linear map of the pixels; the label is that of ``answer`` for every image."""

    def __init__(self, classes=10):
        super().__init__()
        self.map = nn.Linear(64, 6)
        self.head = nn.Linear(6, classes)

    def features(self, images):
        return self.map(images.flatten(1))

    def forward(self, images):
        return self.head(self.features(images))


def payload_of(path):
    raw = next(raw for attrs, raw in Parsed(path.read_text()).raw["script"] if attrs.get("type") == "application/json")
    return json.loads(raw)


def test_pictures_show_original_magnified_perturbation_and_example(tmp_path):
    result = made_up(40)
    images, file = pictures_of(result, tmp_path)
    made = report(result, tmp_path / "p.html", examples=file, images=images, pictures=25)
    cards = payload_of(made.page)["galleries"]["r0"]["pictures"]
    assert len(cards) == 25 and {card["attack"] for card in cards} == {row.label for row in result.attacks}
    assert "25 of" in made.page.read_text()
    opened = evidence.Examples(file, result)
    for card in cards:
        image = int(re.search(r"image (\d+);", card["text"])[1])
        row, kept = result.row(card["attack"]), Image.open(io.BytesIO(base64.b64decode(card["data"].split(",")[1])))
        shown = np.asarray(kept).astype(float) / 255
        assert shown.shape == (8, 24)
        made_image = opened.one(row.label, image)[0].numpy()
        assert np.abs(shown[:, :8] - images[image, 0].numpy()).max() <= 0.5 / 255 + 1e-6
        assert np.abs(shown[:, 16:] - made_image).max() <= 0.5 / 255 + 1e-6
        change = made_image - images[image, 0].numpy()
        assert np.abs(shown[:, 8:16] - (0.5 + 0.5 * change / np.abs(change).max())).max() <= 0.5 / 255 + 1e-6
        wrong = row.predictions[image]
        assert card["adversarial"] == f"class {wrong if wrong >= 0 else result.labels[image]}"


def test_examples_of_another_result_are_refused(tmp_path):
    result, other = made_up(40, seed=1), made_up(40, seed=2, minimal=())
    images, file = pictures_of(result, tmp_path)
    with pytest.raises(UserError, match="belong to another result"):
        report(result, tmp_path / "p.html", examples=file, images=images.flip(0))
    with pytest.raises(UserError, match="belong to another result"):
        report(made_up(41), tmp_path / "p.html", examples=file)
    with pytest.raises(UserError, match="cannot be read"):
        report(result, tmp_path / "p.html", examples=tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="2 files of examples for 1 result"):
        report(other, tmp_path / "p.html", examples=[file, file])
    assert not (tmp_path / "p.html").exists()


def test_confidence_is_the_softmax_and_left_out_where_the_labels_are_not_the_networks(tmp_path):
    torch.manual_seed(0)
    result, network = made_up(20), Encoder().eval()
    images, file = pictures_of(result, tmp_path)
    opened = evidence.open_beside(read.Source("x", result), examples=file, images=images, network=network)
    found = evidence.gallery(result, opened, 30)
    for picture in found.pictures:
        both = torch.stack([images[picture.image], opened.examples.one(picture.attack, picture.image)])
        shares = network(both).detach().softmax(1).max(1)
        if shares.indices.tolist() == [picture.clean, picture.adversarial]:
            assert picture.confidence == pytest.approx(tuple(shares.values.tolist()), abs=1e-5)
        else:
            assert picture.confidence is None
    assert any(picture.confidence is None for picture in found.pictures)


def test_a_network_that_fails_costs_its_map_and_confidences_alone(tmp_path):
    class Failing(Encoder):
        def features(self, images):
            raise RuntimeError("no memory")

    result = made_up(20)
    images, file = pictures_of(result, tmp_path)
    made = report(result, tmp_path / "p.html", examples=file, images=images, network=Failing())
    assert "RuntimeError: no memory" in Parsed(made.page.read_text()).text
    assert payload_of(made.page)["galleries"]["r0"]["pictures"]
    with pytest.raises(UserError, match="the result has 20 of them"):
        report(result, tmp_path / "p.html", examples=file, images=images[:5])


def test_the_map_is_the_principal_plane_of_the_features(tmp_path):
    torch.manual_seed(0)
    result, network = made_up(50), Encoder().eval()
    images, file = pictures_of(result, tmp_path)
    opened = evidence.open_beside(read.Source("x", result), examples=file, images=images, network=network)
    pca, tsne = evidence.embedding(result, opened, tsne=True)
    rows = [row for row in result.attacks if row.norm == "linf"]
    broke = [next((row.label for row in rows if row.outcomes[k] == BROKEN), rows[-1].label) for k in range(50)]
    adversarial = [opened.examples.one(label, k) for k, label in enumerate(broke)]
    with torch.no_grad():
        features = network.features(torch.cat([images, torch.stack(adversarial)])).double()
    centred = features - features.mean(0)
    _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
    expected, got = centred @ axes[:2].T, torch.tensor([*pca.clean, *pca.adversarial], dtype=torch.float64)
    for axis in range(2):
        sign = torch.sign((expected[:, axis] * got[:, axis]).sum())
        assert torch.allclose(expected[:, axis], sign * got[:, axis], rtol=2e-3, atol=2e-3)
    share = float(scale[0] ** 2 / (scale**2).sum())
    assert f"{share:.0%}" in pca.axes[0] and tsne.method == "t-SNE" and len(tsne.clean) == 50
    fooled = network(torch.stack(adversarial)).argmax(1) != torch.tensor(result.labels)
    assert pca.fooled == tuple(fooled.tolist())


@pytest.mark.slow
def test_a_trained_run_brings_its_pictures_confidences_map_and_training(tmp_path, monkeypatch):
    """The way of the command line: everything is found from the result file, and checked by its fingerprint."""
    import scl_defense

    monkeypatch.chdir(tmp_path)
    small = {"limit": 96, "val_limit": 40, "val_steps": 1, "model_options": {"width": 4}}
    trained = scl_defense.train(generator="none", epochs=2, **small, out="runs", name="a")
    result = scl_defense.benchmark(trained.best, attacks="fgsm,native:pgd:steps=3", n=30, out="r.json", probes="none",
                                   save_examples="e.safetensors")  # fmt: skip
    made = report("r.json", "r.html", examples="e.safetensors")
    data, text = payload_of(made.page), Parsed(made.page.read_text()).text
    assert made.missing == ()
    assert set(data["charts"]) >= {"r0-classes", "r0-map-0", "r0-loss", "r0-validation"}
    assert [len(one["points"]) for one in data["charts"]["r0-validation"]["series"]] == [2, 2]
    assert all("%" in card["clean"] and "%" in card["adversarial"] for card in data["galleries"]["r0"]["pictures"])
    assert gather.verdict_sentence(result) in text
    # Another file in the checkpoint's place is not taken for it, and the page says so.
    Path(trained.best).write_bytes(b"another")
    missing = report("r.json", "r.html").missing
    assert any("The checkpoint that was attacked is not here" in one for one in missing)


def test_nothing_that_a_strangers_result_names_is_run(tmp_path):
    module = tmp_path / "evil.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef data():\n    return None\n")
    result = made_up(20)
    for name in (f"{module}:data", "evil:data", str(module)):
        changed = dataclasses.replace(result, data={**result.data, "name": name}, checkpoint={"path": str(module)})
        made = report(changed, tmp_path / "p.html", plugins=())
        assert any("could not be opened" in text for text in made.missing)
    assert not (tmp_path / "ran").exists()


# -- large, studies, the command


def test_ten_thousand_images_stay_quick_and_small(tmp_path):
    result = made_up(10_000, attacks=[f"attack-{k}" for k in range(12)], seed=1)
    write(result, tmp_path / "r.json")
    started = time.process_time()
    made = report(tmp_path / "r.json", tmp_path / "p.html", alone=True)
    assert time.process_time() - started < 30
    assert made.page.stat().st_size < 1_500_000


def test_a_study_is_a_page_with_the_numbers_of_its_table(tmp_path):
    made = report(STUDY, tmp_path / "s.html")
    parsed = Parsed(made.page.read_text())
    table = [line for line in (STUDY / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) == 12
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] in parsed.text and " ".join(cells[1:3]) in parsed.text, line
    assert "36 cells" in parsed.text and "In words" in parsed.text
    assert {"c0-clean", "c0-cost", "c0-curve"} <= set(payload_of(made.page)["charts"])


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"cell": "a"}', None], ids=["no json", "a list", "a part", "a battery without attacks"]
)
def test_a_damaged_study_is_refused(tmp_path, line):
    good = json.loads((STUDY / "results.jsonl").read_text().splitlines()[0])
    good["batteries"] = {"standard": {"n": 3}}
    (tmp_path / "results.jsonl").write_text((line or json.dumps(good)) + "\n")
    with pytest.raises(UserError, match="run the study again"):
        report(tmp_path, tmp_path / "s.html")
    with pytest.raises(UserError, match="folder without results"):
        report(tmp_path.parent, tmp_path / "s.html")


def test_a_summary_is_read_as_text():
    found = blocks("# title\n\n## <b>x</b>\n\nwords **bold** end\n- one\n- **two**\n")
    assert found == [("head", "<b>x</b>"), ("para", [("words ", False), ("bold", True), (" end", False)]),
                     ("list", [[("one", False)], [("two", True)]])]  # fmt: skip


def test_the_command_writes_and_says_where(tmp_path, capsys):
    write(made_up(), tmp_path / "r.json")
    assert run(["report", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr()
    assert str(tmp_path / "r.html") in out.out and "r-table.csv" in out.out and "note:" in out.err
    assert run(["report", str(tmp_path / "r.json"), "--json", "--alone"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["page"]) == tmp_path / "r.html" and len(said["beside"]) == 6
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["r.json", "--out", "page.pdf"], ".html"),
        (["none.json"], "cannot be read"),
        (["r.json", "--out", "folder.html"], "directory"),
        (["r.json", "--alone", "--examples", "e.safetensors"], "leave one"),
        (["r.json", str(STUDY)], "alone"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write(made_up(), tmp_path / "r.json")
    (tmp_path / "folder.html").mkdir()
    assert run(["report", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


def test_help_imports_nothing_heavy():
    probe = ("import sys; from scl_defense.cli.app import run; run(['report', '--help']); "
             "print([m for m in ('torch', 'jinja2', 'matplotlib', 'sklearn') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert "--examples" in done.stdout and done.stdout.strip().endswith("[]"), done


def test_the_schema_is_documented():
    text = (ROOT / "docs" / "report.md").read_text()
    content = made_up().to_json()
    assert SCHEMA in text
    parts = [content, content["attacks"][0], content["worst_cases"][0], content["flags"][0], content["conclusion"]]
    for name in {name for part in parts for name in part}:
        assert f"`{name}`" in text, name


# -- written by the commands that measure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    line = ["train", "--limit", "64", "--epochs", "1", "--val-limit", "20", "--val-steps", "1", "-m", "width=4",
            "--generator", "none", "--quiet", "--out", str(folder), "--name", "run"]  # fmt: skip
    assert run(line) == 0
    return (folder / "run" / "best.pt").read_bytes()


@pytest.fixture
def trained(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").write_bytes(tiny)
    return tmp_path


def measured(*more):
    line = ["benchmark", "best.pt", "--attacks", "fgsm", "--n", "20", "--probes", "none", "--out", "r.json"]
    assert run([*line, *more]) == 0


def test_benchmark_writes_the_page_beside_its_result(trained, capsys):
    measured("--save-examples", "e.safetensors")
    out, err = capsys.readouterr()
    assert "report: r.html" in out and "note:" not in err
    page = (trained / "r.html").read_text()
    assert "fgsm" in page and "data:image/png" in page  # the gallery: the examples were found
    measured("--restart")  # a page of ours is made anew
    assert "report: r.html" in capsys.readouterr().out


def test_the_page_has_pictures_that_nobody_asked_to_be_saved(trained, capsys, monkeypatch):
    """Kept until the page is there, if they are not large, and if all that a stopped run left has them."""
    names = {"r.json", "r.html", "r-model-info.json", "r-table.csv", "r-table.md", "r-table.tex", "best.pt"}
    measured()
    assert "data:image/png" in (trained / "r.html").read_text()
    assert set(os.listdir(trained)) == names  # nothing else is left
    capsys.readouterr()
    monkeypatch.setattr("scl_defense.cli.benchmark.MOST_PICTURES", 1000)
    measured()
    assert "data:image/png" not in (trained / "r.html").read_text()
    assert set(os.listdir(trained)) == names


def test_pictures_of_a_foreign_network_have_confidences(trained, capsys):
    """The page is written while the network is open; a file of weights alone could not bring it back."""
    (trained / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), trained / "net.pt")
    line = "benchmark net.pt --model net.py:Net --data digits --attacks fgsm --n 30 --probes none --out n.json"
    assert run(line.split()) == 0
    assert re.search(r"\d \d+%", (trained / "n.html").read_text()) is not None
    assert "confidences" not in (trained / "n.html").read_text()


def test_no_chunk_is_attacked_again_for_pictures(trained):
    line = ["benchmark", "best.pt", "--attacks", "fgsm,pgd:steps=1", "--n", "20", "--probes", "none", "--out", "r.json"]
    with mock.patch.object(PGD, "__call__", side_effect=KeyboardInterrupt):
        assert run([*line, "--quiet"]) == 130
    with mock.patch.object(FGSM, "__call__", side_effect=AssertionError("attacked again")):
        assert run(line) == 0
    assert "data:image/png" not in (trained / "r.html").read_text()
    assert json.loads((trained / "r.json").read_text())["attacks"][0]["status"] == "ok"


@pytest.mark.parametrize("more", [["--quiet"], ["--json"], ["--no-report"]])
def test_no_page_where_none_is_wanted(trained, more):
    measured(*more)
    assert (trained / "r.json").exists() and not list(trained.glob("*.html"))


def test_a_page_of_somebody_else_stays_and_the_result_is_whole(trained, capsys):
    (trained / "r.html").write_text("<p>mine</p>")
    measured()
    out, err = capsys.readouterr()
    assert (trained / "r.html").read_text() == "<p>mine</p>" and (trained / "r.json").exists()
    assert "no page of ours" in err and "report:" not in out
