"""Tables and figures that show themselves: the text, the HTML of a notebook, the numbers behind both, the pictures."""

import io
import pickle
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_results
import torch
from PIL import Image
from scl_defense_benchmarks.results import Report
from scl_defense_benchmarks.study import StudyResult
from scl_defense_benchmarks.study.tables import Row

import scl_defense
from scl_defense import ThreatModel, UserError
from scl_defense.shown import Table, img, new_figure, png, styled
from scl_defense.trained import TrainResult

HOSTILE = '<script>alert("1")</script>'


class Cells(HTMLParser):
    """Every cell of every table, and every tag that was opened."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.sources, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "img":
            self.sources.append(dict(attributes)["src"])

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")


def picture(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def drawn(figure):
    """The share of pixels that are not paper."""
    colours = picture(png(figure)).getcolors(1 << 24)
    return 1 - max(count for count, _ in colours) / sum(count for count, _ in colours)


@pytest.fixture
def table():
    cells = [("pgd", "42.2", "ok"), (HOSTILE, "-", "failed")]
    rows = [{"attack": "pgd", "accuracy": 0.4217}, {"attack": HOSTILE, "accuracy": None}]
    return Table(("attack", "accuracy %", "status"), cells, rows, caption="A & B", notes=["n = 20 <images>"])


def test_a_table_is_its_text(table):
    assert isinstance(table, str) and "42.2" in table and repr(table) == str(table) and "A & B" in table
    header, *lines = [line for line in table.splitlines() if "accuracy" in line or "ok" in line or "failed" in line]
    assert header.split() == ["attack", "accuracy", "%", "status"] and len(lines) == 2
    narrow = Table(("method", "x"), [("long " * 30, "1.0")], [{}], width=40)
    assert max(map(len, narrow.splitlines())) <= 40 and narrow.count("long") == 30


def test_a_notebook_sees_cells_and_no_markup_of_strangers(table):
    found = Cells(table._repr_html_())
    assert found.rows == [["attack", "accuracy %", "status"], ["pgd", "42.2", "ok"], [HOSTILE, "-", "failed"]]
    assert "script" not in found.tags and "images" not in found.tags
    assert table._repr_html_().count("text-align:right") == 3  # a column of numbers and of dashes, header and all


def test_a_table_survives_a_pickle(table):
    again = pickle.loads(pickle.dumps(table))
    assert again == table and again.rows == table.rows and again._repr_html_() == table._repr_html_()


def test_a_frame_has_the_numbers(table):
    pandas = pytest.importorskip("pandas")
    frame = table.to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame["accuracy"][0] == 0.4217
    assert frame["accuracy"].isna()[1]


def test_a_frame_without_pandas_is_one_line(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"needs pandas.*pip install 'scl-defense\[frame\]'"):
        table.to_frame()
    with pytest.raises(UserError, match="needs pandas"):
        report_results.made_up(20).to_frame()


def test_a_figure_shows_itself_without_pyplot():
    with styled():
        figure = new_figure(2, 1)
        figure.subplots().set_title("costs $5 and $6")  # no mathematics
    assert picture(figure._repr_png_()).size == (320, 160) and drawn(figure) > 0.01
    assert 'alt="&lt;x&gt;"' in img(figure, "<x>")


# -- a training run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return scl_defense.train(trainer="cross-entropy", generator="none", epochs=2, limit=64, batch_size=32, val_limit=32,
                             val_steps=1, model_options={"width": 4}, out=str(folder), device="cpu")  # fmt: skip


def test_a_run_shows_its_numbers_and_curves(run):
    table = run.table()
    assert table.rows[0]["clean"] == run.clean and table.rows[0]["best_epoch"] == run.best_epoch
    assert f"{100 * run.robust:.1f} %" in table and str(run.best) in run.table(300)
    assert [line["epoch"] for line in run.history()] == [0, 1] and run.history()[1]["val_clean"] is not None
    assert drawn(run.figure()) > 0.01
    left, right = run.figure().axes
    assert list(left.lines[0].get_xdata()) == [1, 2]
    assert list(left.lines[0].get_ydata()) == [line["loss"] for line in run.history()]
    assert list(right.lines[1].get_ydata()) == [100 * line["val_robust"] for line in run.history()]
    found = Cells(run._repr_html_())
    assert len(found.sources) == 1 and found.sources[0].startswith("data:image/png;base64,")


def test_a_run_without_a_log_says_so(tmp_path):
    bare = TrainResult(tmp_path, tmp_path / "best.pt", tmp_path / "last.pt", 1, 0, 0.9, 0.5, ThreatModel("linf", "0.1"),
                       1.0, 2.0, 2.0)  # fmt: skip
    assert bare.history() == () and "<img" not in bare._repr_html_()
    with pytest.raises(UserError, match=r"no metrics.jsonl to draw; train with the logger jsonl"):
        bare.figure()


def test_load_is_the_short_name(run):
    loaded = scl_defense.load(run.best)
    assert loaded.network(torch.zeros(2, *loaded.image_shape)).shape == (2, len(loaded.classes))
    (row,) = loaded.table().rows
    assert row["data"] == "digits" and row["trainer"].startswith("CrossEntropy") and row["sha256"] in loaded.table(120)
    assert row["parameters"] == sum(p.numel() for p in loaded.network.parameters())
    assert ["data", "digits"] in Cells(loaded._repr_html_()).rows


# -- a report


def test_a_report_shows_verdict_table_flags_and_figure():
    report = report_results.made_up(40, attacks=("fgsm", "pgd"), radii=("0.05", "0.1"), names=(HOSTILE, "b", "c"))
    table = report.table()
    assert table.rows[0]["accuracy"] == report.clean_accuracy
    assert len(table.rows) == 1 + len(report.attacks) + len(report.worst_cases)
    assert all(row.label in table for row in report.attacks)
    found = Cells(report._repr_html_())
    assert "script" not in found.tags and len(found.sources) == 1
    assert [row[0] for row in found.rows if row[0] == "worst case"] == ["worst case"] * len(report.worst_cases)
    figure = report.figure()
    bars, *curves = figure.axes
    assert len(curves) == 2 and drawn(figure) > 0.01  # linf was measured at two radii, cw gives a curve of l2
    shown = sorted(float(line.get_xdata()[0]) for line in bars.lines if len(line.get_xdata()) == 1)
    assert shown == pytest.approx(sorted(100 * row["accuracy"] for row in table.rows))


def test_a_report_of_one_ball_has_one_panel():
    report = report_results.made_up(20, attacks=("fgsm",), minimal=())
    assert len(report.figure().axes) == 1


def test_a_report_is_read_back(tmp_path):
    report = report_results.made_up(20)
    report.save(tmp_path / "result.json")
    assert Report.load(tmp_path / "result.json") == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json"):
        Report.load(tmp_path / "other.json")


# -- a study


def line(seed, worst, clean=0.9, curve=None):
    return {"seed": seed, "clean": clean, "worst": worst, "threat": "linf:0.1", "curve": curve or {}, "generator": "x",
            "batteries": {"standard": {"attacks": {"pgd": {"robust": worst}}, "worst": worst}}, "backwards": 3.0,
            "forwards": 4.0, "epochs": 2, "finetune": None}  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    rows = (
        Row("", "plain", HOSTILE, None, 2, {0: line(0, 0.2), 1: line(1, 0.3)}),
        Row("", "pgd", "PGD-AT", "reference", 2, {0: line(0, 0.6, curve={"0.1": 0.6, "0.2": 0.3})}),
        Row("", "broken", "Broken", None, 2, {}),
    )
    return StudyResult(tmp_path, tuple(one for row in rows for one in row.lines.values()), {"broken--s0": "it broke"},
                       ("pgd--s1",), (tmp_path / "table.md",), rows)  # fmt: skip


def test_a_study_shows_its_table_and_figures(finished):
    table = finished.table()
    assert "25.0 ± 7.1" in table and "60.0" in table and "failed: broken--s0: it broke" in table
    assert "not run: 1 cells" in table and [row["seeds"] for row in table.rows] == [2, 1, 0]
    found = Cells(finished._repr_html_())
    assert len(found.sources) == 1 and "script" not in found.tags
    assert [HOSTILE, "2", "90.0 ± 0.0", "25.0 ± 7.1", ""] in found.rows
    for name in ("clean-robust", "curve", "cost"):
        assert drawn(finished.figure(name)) > 0.01


def test_a_study_figure_that_is_not_there_is_one_line(finished):
    with pytest.raises(UserError, match=r"no figure 'curves'; did you mean 'curve'\?"):
        finished.figure("curves")
    with pytest.raises(UserError, match="no context 'mnist'"):
        finished.figure(context="mnist")
    nothing = StudyResult(Path("here"), (), {}, ("a",), ())
    with pytest.raises(UserError, match="nothing to draw"):
        nothing.figure()
    assert "<img" not in nothing._repr_html_()


def test_the_json_of_a_study_keeps_its_fields(finished):
    plain = finished.to_json()
    assert set(plain) == {"out", "lines", "failed", "missing", "files", "table"} and plain["table"] == finished.rows
