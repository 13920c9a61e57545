"""Sharing: what is pushed comes back, a card tells the numbers and their limits, strangers' files are checked."""

import json
import sys
from pathlib import Path

import hub_stand_in
import pytest
import torch
from safetensors.torch import load_file, save_file

import scl_defense
from scl_defense import SclDefenseError, UserError, checkpoint
from scl_defense.cli.app import run as cli

FILES = ("README.md", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    run = scl_defense.train(trainer="cross-entropy", generator="none", epochs=1, limit=64, batch_size=32, val_limit=32,
                            val_steps=1, model_options={"width": 4}, out=str(folder), device="cpu")  # fmt: skip
    out = folder / "result.json"
    scl_defense.benchmark(run.best, attacks="native:fgsm", n=20, probes="none", out=out, command="try `it`")
    return run.best, out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    found = hub_stand_in.Hub()
    yield found
    found.close()


@pytest.fixture
def folder(trained, tmp_path):
    made = scl_defense.push(trained[0], "me/net", result=trained[1], folder=tmp_path / "folder")
    assert made.files == (*FILES, "results.json")
    return made.folder


def same_network(one, two):
    one, two = scl_defense.load(one), scl_defense.load(two)
    images = torch.rand(4, *one.image_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.network(images), two.network(images))
    assert (one.classes, one.threat, one.data, one.mean) == (two.classes, two.threat, two.data, two.mean)


def test_what_is_pushed_comes_back(trained, hub, tmp_path):
    best, result = trained
    made = scl_defense.push(best, "me/net", result=result, endpoint=hub.endpoint)
    assert made.url == f"{hub.endpoint}/me/net" and hub.private["me/net"] is True
    assert sorted(hub.repositories["me/net"]) == [*FILES, "results.json"]
    back = scl_defense.pull("me/net", tmp_path / "net.pt", endpoint=hub.endpoint)
    assert back.revision == hub_stand_in.COMMIT and back.card.read_text().startswith("---\n")
    same_network(best, back.checkpoint)
    assert scl_defense.Report.load(back.result) == scl_defense.Report.load(result)
    origin = scl_defense.load(back.checkpoint).meta["origin"]
    assert origin == {"hub": "me/net", "revision": back.revision,
                      "checkpoint_sha256": checkpoint.read(best)[1]}  # fmt: skip
    again = scl_defense.push(best, "me/net", endpoint=hub.endpoint)  # the repository is there: a new commit
    assert again.files == FILES


def test_a_public_repository_is_asked_for(trained, hub):
    scl_defense.push(trained[0], "me/open", public=True, endpoint=hub.endpoint)
    assert hub.private["me/open"] is False


def test_the_commands(trained, hub, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.endpoint)
    assert cli(["push", str(trained[0]), "me/net", "--folder", "here"]) == 0
    said = capsys.readouterr()
    assert "next: scl-defense pull here" in said.out and "nothing was measured" in said.err
    assert cli(["pull", "here", "--out", "back.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "back.pt"
    same_network(trained[0], "back.pt")
    assert cli(["pull", "here", "--out", "back.pt"]) == 2 and "--force" in capsys.readouterr().err
    assert cli(["pull", "here", "--out", "back.pt", "--force"]) == 0


def test_the_card_tells_the_numbers_and_their_limits(folder, trained):
    card = (folder / "README.md").read_text()
    report = scl_defense.Report.load(trained[1])
    _, front, text = card.split("---\n", 2)
    tags = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert tags["library_name"] == '"scl-defense"' and "adversarial-robustness" in json.loads(tags["tags"])
    assert f"| native:fgsm | linf 0.1 | {100 * report.row('native:fgsm').robust_accuracy:.1f} |" in text
    assert f"**{100 * report.worst_case.robust_accuracy:.1f}**" in text and "n = 20 test images" in text
    assert report.conclusion.text in text and "## Limits" in text and "`try  it `" in text
    assert all(flag.id in text for flag in report.flags)
    assert "scl-defense pull me/net" in text and '"trainer": "cross-entropy"' in text


def test_a_card_without_a_result_says_so(trained, tmp_path):
    made = scl_defense.push(trained[0], "me/net", folder=tmp_path / "bare")
    card = (made.folder / "README.md").read_text()
    assert "**Not measured.**" in card and "worst case" not in card


def test_names_of_strangers_are_no_markup(trained, tmp_path):
    from scl_defense_benchmarks.card import model_card

    content, _ = checkpoint.read(trained[0])
    content["classes"] = ["<script>", "a|b", "[x](y)", "`c`", *content["classes"][4:]]
    card = model_card(content, "me/net", None)
    assert "<script>" not in card and "\\[x\\](y)" in card and "a\\|b" in card


def test_a_result_of_another_checkpoint_is_refused(trained, tmp_path):
    plain = json.loads(trained[1].read_text())
    plain["checkpoint"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="is a result of another checkpoint"):
        scl_defense.push(trained[0], "me/net", result=tmp_path / "other.json", folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no readable config.json"),
        (lambda f: (f / "config.json").write_text("{"), "no readable config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "is not scl-defense-hub/1"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "SHA-256 differs"),
        (lambda f: edit(f, lambda config: config["checkpoint"].pop("classes")), "lacks classes"),
        (lambda f: edit(f, lambda config: config["checkpoint"].update(format="x/9")), "format that this version"),
        (lambda f: edit(f, lambda config: config["checkpoint"].update(mean="")), "mean is a str"),
        (lambda f: swap(f), "cannot be read"),
    ],
)
def test_a_spoiled_repository_is_one_line_and_leaves_nothing(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        scl_defense.pull(folder, tmp_path / "out" / "net.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def swap(folder):
    """Weights that are no safetensors, with a configuration that names their hash."""
    import hashlib

    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(weights_sha256=digest))


def test_weights_of_another_network_are_refused_when_loaded(folder, tmp_path):
    import hashlib

    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.startswith("encoder.") and name.endswith(".weight")))
    save_file(weights, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(weights_sha256=digest))
    back = scl_defense.pull(folder, tmp_path / "net.pt")
    with pytest.raises(UserError, match="do not fit its model"):
        scl_defense.load(back.checkpoint)


def test_a_repository_that_is_not_there(hub, tmp_path):
    with pytest.raises(UserError, match="no such repository"):
        scl_defense.pull("me/nothing", tmp_path / "net.pt", endpoint=hub.endpoint)
    hub.repositories["me/other"] = {"pytorch_model.bin": b"x", "config.json": b"{}"}
    with pytest.raises(UserError, match=r"was not written by scl-defense push: it lacks model\.safetensors"):
        scl_defense.pull("me/other", tmp_path / "net.pt", endpoint=hub.endpoint)
    assert not any("resolve" in path for path in hub.asked)  # nothing of it was downloaded


def test_a_hub_that_refuses_is_one_line(trained, hub):
    hub.allowed = False
    with pytest.raises(SclDefenseError, match=r"the hub refused: .*hf auth login") as caught:
        scl_defense.push(trained[0], "me/net", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["net", "a/b/c", "../x", "me/", "me/ne t"])
def test_a_name_that_is_none(trained, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="OWNER/NAME"):
        scl_defense.push(trained[0], name, folder=tmp_path / "x")
    with pytest.raises(UserError, match="OWNER/NAME"):
        scl_defense.pull(name)


def test_without_the_extra_it_says_how(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'scl-defense\[hub\]'"):
        scl_defense.push(trained[0], "me/net")


# -- export


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_an_exported_graph_predicts_the_same(trained, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
        pytest.importorskip("onnx2torch", reason="the extra onnx is not installed")
    from scl_defense_benchmarks.containers import kind_of
    from scl_defense_benchmarks.exported import load_graph

    made = scl_defense.export(trained[0], tmp_path / f"net{'.onnx' if format == 'onnx' else '.pt2'}", format=format)
    assert made.agree == made.images and made.difference < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]
    loaded, graph = scl_defense.load(trained[0]), load_graph(made.path, kind_of(made.path))
    for count in (1, 5):
        images = torch.rand(count, *loaded.image_shape, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(graph(images), loaded.network(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--force"):
        scl_defense.export(trained[0], made.path, format=format)


def test_a_graph_that_disagrees_is_not_written(trained, tmp_path, monkeypatch):
    from scl_defense_benchmarks import exported

    honest = exported.load_graph

    def other(path, kind):
        graph = honest(path, kind)
        return lambda images: graph(images) + torch.arange(10) * 1e-2

    monkeypatch.setattr(exported, "load_graph", other)
    with pytest.raises(SclDefenseError, match=r"the graph disagrees with its network: a logit differs by 0\.09"):
        scl_defense.export(trained[0], tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "format 'tflite' is unknown"),
        ({"out": "net.pt"}, r"must end in \.pt2"),
        ({"out": "nowhere/net.pt2"}, "the folder 'nowhere' does not exist"),
    ],
)
def test_what_cannot_be_exported_is_said_first(trained, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        scl_defense.export(trained[0], **settings)
    assert not list(Path(tmp_path).iterdir())
