"""What a user meets around the attacks: files that stay theirs, several outputs, a foreign surrogate, clear lines."""

import json
import os

import foreign_modules
import pytest
import torch
from safetensors.torch import load_file, save_file
from scl_defense_benchmarks import transfer
from scl_defense_benchmarks.benchmark import benchmark
from scl_defense_benchmarks.results import COLUMNS
from scl_defense_benchmarks.state import locked
from torch import nn

from scl_defense.cli.app import main
from scl_defense.errors import UserError

FAST = {"attacks": "native:fgsm", "norm": "linf", "eps": "0.1", "probes": "none", "n": 20}


@pytest.fixture(scope="module")
def lenet(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = foreign_modules.LeNet()
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for batch in torch.randperm(1400).split(64) * 3:
            loss = nn.functional.cross_entropy(net(digits[0][batch]), digits[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def weights(lenet, tmp_path, monkeypatch):
    """The file of a foreign network, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_file(lenet.state_dict(), "m.safetensors")
    return tmp_path / "m.safetensors"


LENET = {"model": "foreign_modules:LeNet", "data": "digits", **FAST}


# -- files


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_examples": "m.safetensors"}, "--save-examples 'm.safetensors' is the checkpoint, which is read"),
        ({"save_examples": "./x/../m.safetensors"}, "is the checkpoint"),
        ({"save_examples": "soft.safetensors"}, "is the checkpoint"),
        ({"save_examples": "hard.safetensors"}, "is the checkpoint"),
        ({"save_examples": "other.safetensors"}, "exists and was not written by --save-examples; it is kept"),
        ({"save_examples": "s.safetensors", "surrogate": "s.safetensors"}, "is the surrogate, which is read"),
        (
            {"save_examples": "s.safetensors",
             "attacks": "noise,transfer:surrogate=s.safetensors:model=foreign_modules:LeNet"},
            "exists and was not written",
        ),
        ({"save_examples": "h.safetensors", "head": "h.safetensors"}, r"is the head \(--head\), which is read"),
        ({"per_image": "labels.csv", "label_map": "labels.csv"}, "which is read"),
        ({"per_image": "table.csv"}, "exists and was not written by --per-image"),
        ({"per_image": "empty.csv"}, "exists and was not written by --per-image"),
        ({"per_image": "folder.csv"}, "is a directory"),
        ({"per_image": "pipe.csv"}, "is no regular file"),
        ({"out": "m.safetensors"}, "--out 'm.safetensors' is the checkpoint"),
        ({"out": "r.csv", "per_image": "r.csv"}, "--out and --per-image are both 'r.csv'"),
        ({"out": "table.csv"}, "is no benchmark result"),
    ],
)  # fmt: skip
def test_no_file_of_the_user_is_replaced(weights, tmp_path, monkeypatch, change, message):
    (tmp_path / "x").mkdir()
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    os.symlink("m.safetensors", "soft.safetensors")
    os.link("m.safetensors", "hard.safetensors")
    for name in ("other", "s"):
        save_file({"a": torch.zeros(2)}, f"{name}.safetensors")
    save_file({"weight": torch.zeros(10, 16)}, "h.safetensors")
    (tmp_path / "table.csv").write_text("day,sold\n1,2\n")
    (tmp_path / "labels.csv").write_text(",".join("0123456789"))
    (tmp_path / "empty.csv").touch()
    before = content(tmp_path)
    # Where opening the question would fail first (a head that does not fit), nothing is written either way.
    monkeypatch.setattr("scl_defense_benchmarks.question.open_subject", lambda *_: opened(weights))
    monkeypatch.setattr("scl_defense_benchmarks.benchmark.evaluate", None)  # nothing may be attacked
    with pytest.raises(UserError, match=message) as caught:
        benchmark(weights, **{**LENET, **change})
    assert "\n" not in str(caught.value) and content(tmp_path) == before


def opened(path):
    from scl_defense_benchmarks.subject import _from_memory

    net = foreign_modules.LeNet()
    net.load_state_dict(load_file(path))
    return _from_memory(net.eval(), "cpu", {})


def test_our_own_files_are_replaced(weights, tmp_path):
    files = {"per_image": "r.csv", "save_examples": "r.safetensors", "out": "r.json"}
    benchmark(weights, **LENET, **files)
    first = content(tmp_path)
    benchmark(weights, **{**LENET, "eps": "0.2"}, **files)
    second = content(tmp_path)
    assert set(first) == set(second) == {"m.safetensors", *files.values()}
    assert all((first[name] == second[name]) == (name == "m.safetensors") for name in first)
    assert first["r.csv"].decode().splitlines()[0] == ",".join(COLUMNS)


def test_the_command_ends_with_2_and_one_line(weights, tmp_path):
    before = content(tmp_path)
    given = ["benchmark", "m.safetensors", "--model", "foreign_modules:LeNet", "--data", "digits", "--quiet"]
    for more in (["--save-examples", "m.safetensors"], ["--out", "/proc/x.json"]):
        code, _, err = command([*given, "--attacks", "noise", "--n", "10", *more])
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        assert "m.safetensors" in err or "cannot write" in err
    assert content(tmp_path) == before


def command(arguments):
    """Exit code, stdout and stderr of the command line."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue(), err.getvalue()


def test_a_folder_that_cannot_be_written_is_not_somebody_else_writing(tmp_path):
    with pytest.raises(UserError, match="cannot write"), locked("/proc/x.json"):
        raise AssertionError("locked")
    with locked(tmp_path / "r.json"), pytest.raises(UserError, match="another"), locked(tmp_path / "r.json"):
        raise AssertionError("locked twice")
    assert os.listdir(tmp_path) == []


# -- several outputs


class Several(nn.Module):
    """network: images -> logits; how: what else is returned with them, and in which form."""

    def __init__(self, network, how):
        super().__init__()
        self.network, self.how = network, how

    def forward(self, images):
        return self.how(self.network(images), images.flatten(1))


@pytest.mark.parametrize(
    ("how", "output"),
    [
        (lambda logits, features: (logits, features), 0),
        (lambda logits, features: [features, logits], 1),
        (lambda logits, features: {"features": features, "logits": logits, "loss": None}, "logits"),
        (lambda logits, features: (logits, logits.argmax(1), (logits, 3)), 0),
    ],
)
def test_the_logits_among_several_outputs_are_found(network, digit_images, how, output):
    several = Several(network, how).train()
    plain = benchmark(network, data="digits", **FAST)
    found = benchmark(several, data="digits", **FAST)
    assert found.checkpoint["output"] == output and "output" not in plain.checkpoint
    assert [row.outcomes for row in found.attacks] == [row.outcomes for row in plain.attacks]
    assert several.training and json.dumps(found.to_json())
    own = benchmark(several, *digit_images, **{**FAST, "n": None})
    assert own.checkpoint["output"] == output and own.clean_accuracy > 0.9


@pytest.mark.parametrize(
    "how",
    [
        lambda logits, features: (logits, logits + 1),  # which one?
        lambda logits, features: (features, features),
        lambda logits, features: {"a": {"logits": logits}},
        lambda logits, features: (logits.long(), features),
        lambda logits, features: None,
    ],
)
def test_other_outputs_stay_an_error(network, how):
    with pytest.raises(UserError, match=r"the network returns a (tuple|dict|NoneType); an attack needs one tensor"):
        benchmark(Several(network, how), data="digits", **FAST)


def test_a_label_map_reads_the_logits_that_were_found(network):
    turned = Several(network, lambda logits, features: (features, logits.flip(1)))
    found = benchmark(turned, data="digits", label_map=[str(9 - k) for k in range(10)], **FAST)
    assert found.clean_accuracy > 0.9 and found.checkpoint["output"] == 1


def test_the_command_says_which_output_it_took(weights, lenet, tmp_path):
    (tmp_path / "pair.py").write_text(
        "import foreign_modules\nclass Pair(foreign_modules.LeNet):\n"
        "    def forward(self, images):\n        return images, super().forward(images)\n"
    )
    code, out, _ = command(
        ["benchmark", "m.safetensors", "--model", "pair.py:Pair", "--data", "digits", "--quiet",
         "--attacks", "noise", "--n", "10", "--probes", "none"]
    )  # fmt: skip
    assert code == 0 and "the network returns several outputs: 1 holds the logits" in out


# -- a surrogate of somebody else's


def test_a_foreign_surrogate_is_read_like_the_subject(weights, lenet, digits):
    settings = {**FAST, "attacks": "noise,transfer", "data": "digits", "eps": "0.3", "n": 100}
    mine = benchmark(weights, model="foreign_modules:LeNet", surrogate=weights, **settings)
    assert mine.row("transfer").options["model"] == "foreign_modules:LeNet"
    named = benchmark(lenet, surrogate=weights, surrogate_model="foreign_modules:LeNet", **settings)
    assert named.row("transfer").outcomes == mine.row("transfer").outcomes
    assert named.row("transfer").broken > named.row("noise").broken + 20  # it sees what it was made on
    scaled = benchmark(
        weights, model="foreign_modules:LeNet", surrogate=weights, mean=(0.3,), std=(0.4,), **settings
    ).row("transfer")
    assert (list(scaled.options["mean"]), list(scaled.options["std"])) == ([0.3], [0.4])
    text = "noise,transfer:surrogate=m.safetensors:model=foreign_modules"
    with pytest.raises(UserError, match="no model named 'foreign_modules'"):
        benchmark(lenet, **{**settings, "attacks": text})
    with pytest.raises(UserError, match="name its file too"):
        benchmark(lenet, surrogate_model="small-cnn", **settings)
    with pytest.raises(UserError, match=r"holds bare weights|no model"):
        benchmark(lenet, surrogate=weights, **settings)  # no model of ours fits


def test_normalisation_reaches_the_surrogate(weights, lenet, digits):
    images = digits[0][:4]
    attack = transfer.Transfer(surrogate="m.safetensors", model="foreign_modules:LeNet", mean=(0.3,), std=(0.4,))
    read = attack._opened(10, (1, 8, 8), "cpu").network
    torch.testing.assert_close(read(images), lenet((images - 0.3) / 0.4))
    options = {"model": "foreign_modules:LeNet", "model_options": {"hidden": "16"}, "mean": [0.3], "channels": None}
    assert transfer.reading(options, None) == {
        "model": "foreign_modules:LeNet", "model_options": ("hidden=16",), "mean": (0.3,)
    }  # fmt: skip
    assert transfer.reading(options, "resnet18") == {"model": "resnet18", "mean": (0.3,)}


def test_a_surrogate_that_brings_its_own_network_ignores_the_subject_s_model(weights, lenet, digits):
    torch.jit.script(lenet).save("s.pt")
    attack = transfer.Transfer(surrogate="s.pt", model="foreign_modules:LeNet")
    read = attack._opened(10, (1, 8, 8), "cpu").network
    torch.testing.assert_close(read(digits[0][:4]), lenet(digits[0][:4]))


# -- small ones


def test_a_directory_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("benchmark", "agreement"):
        code, _, err = command([name, "."])
        assert code == 2 and "'.' is a directory" in err and len(err.strip().splitlines()) == 1


def test_more_images_than_there_are_means_all_of_them_everywhere(network, digit_images, capsys):
    settings = {**FAST, "attacks": "noise", "n": 5000}
    own = benchmark(network, *digit_images, **settings)
    assert own.n == 100
    assert capsys.readouterr().err == "n is 5000, but 'your images' has 100 images: all of them are taken\n"
    named = benchmark(network, data="digits", **settings)
    assert named.n < 5000 and f"'digits' has {named.n} images: all of them are taken" in capsys.readouterr().err
    benchmark(network, *digit_images, **{**settings, "n": 100})
    assert capsys.readouterr().err == ""


def test_a_trusted_pickle_without_a_network_says_what_it_holds(tmp_path, lenet):
    torch.save({"n": 1, "x": lenet}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"holds no weights.*only 'n' \(int\), 'x' \(LeNet\).*under 'model'"):
        benchmark(tmp_path / "odd.pt", data="digits", trust_pickle=True, say=lambda text: None, **FAST)


def test_the_default_attacks_run_on_images_of_ones_own(network, digit_images):
    """``cw`` has no usual budget there: it is skipped, and the others run."""
    found = benchmark(network, *digit_images, attacks="fgsm,pgd:steps=2,cw", eps=0.1, probes="none", n=20)
    assert [row.label for row in found.attacks] == ["fgsm", "pgd:steps=2"]
    ((label, tier, reason),) = [(one["label"], one["tier"], one["reason"]) for one in found.left_out]
    assert (label, tier) == ("cw", "") and reason.endswith("cw:eps=...")
    assert "cw" in found.table(200) and "no usual l2 budget" in found.table(200)


def test_a_curve_is_told_from_the_smallest_ball_on(network, digit_images):
    found = benchmark(
        network, *digit_images, attacks="noise,native:fgsm", norm="linf", eps="0.2,0.05,0.1", probes="none", n=20
    )
    assert [case.eps for case in found.worst_cases] == ["0.05", "0.1", "0.2"]
    assert found.worst_case.eps == found.eps == "0.2"
