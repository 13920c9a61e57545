"""A battery that is killed goes on where it was, and nowhere else; its files are those of an unbroken one."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from planted_attacks import HONEST, LINF, Brightness, Planted, shift
from safetensors import safe_open
from scl_defense_benchmarks.battery import Plan, PlannedAttack
from scl_defense_benchmarks.benchmark import benchmark
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.results import COLUMNS, OUTCOMES, per_image, without_times
from scl_defense_benchmarks.state import locked, open_state, state_path

from scl_defense.errors import UserError

# Run in a process of its own, to be killed: 6 chunks for each of 8 attacks, with random starts and restarts, a search
# without gradients, one image by image, one for the smallest distance, and ART's.
SCRIPT = """
import sys
import torch
from torch import nn
from scl_defense import benchmark

torch.set_num_threads(1)
torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
images = torch.rand(700, 1, 8, 8)
labels = network(images).argmax(1)
folder = sys.argv[1]
benchmark(
    network, images, labels, norm="linf", eps="0.02,0.05", seed=3, mode=sys.argv[2],
    attacks="noise:draws=40,native:pgd:steps=60:restarts=3,pgd:steps=60,fgsm,square:queries=20,"
    "onepixel:norm=l0:eps=1:limit=1000:steps=2:population=10,cw:c=10:steps=10:eps=0.5,art:pgd:steps=5",
    out=f"{folder}/result.json",
    per_image=f"{folder}/images.csv", save_examples=f"{folder}/examples.safetensors", probes="none",
)
"""


def start(folder, mode):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), mode], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["independent", "cascade"])
def test_two_kills_at_random_change_nothing(tmp_path, mode):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = start(whole, mode)
    state = broken / "result.json.state"
    draw = random.Random(mode)
    lines, killed = 0, []
    for _ in range(2):
        wanted = lines + draw.randint(1, 12)
        process = start(broken, mode)
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.read_bytes().count(b"\n") > wanted:
                break
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        now = state.read_bytes().count(b"\n")
        assert now > lines  # the second one went on, it did not begin again
        lines = now
        killed.append(state.read_bytes())
    assert killed[1].startswith(killed[0][: killed[0].rfind(b"\n") + 1])
    assert not (broken / "result.json").exists()
    last = start(broken, mode)
    for process in (last, unbroken):
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    one, two = (without_times(json.loads((folder / "result.json").read_text())) for folder in (whole, broken))
    assert one == two and len(one["attacks"]) == 14 and one["worst_cases"][0]["broken"] > 0
    for name in ("images.csv", "examples.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert sorted(os.listdir(broken)) == sorted(os.listdir(whole)) == [
        "examples.safetensors", "images.csv", "result.json"
    ]  # fmt: skip


# -- in this process: chunks of ten images, and an attack that stops the whole evaluation like a kill


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 10)


class Killed(BaseException):
    """What no handler of faults may catch."""


def dying(calls):
    """HONEST, which dies in the call of that number (from 0)."""
    count = [0]

    def make(classifier, images, labels, threat, rng):
        count[0] += 1
        if count[0] == calls + 1:
            raise Killed
        return HONEST(classifier, images, labels, threat, rng)

    return Planted(make), count


def planned(*attacks):
    return Plan(LINF, tuple(PlannedAttack(f"a{i}", "planted", attack, LINF) for i, attack in enumerate(attacks)))


def test_what_is_done_is_not_done_again(images, labels, tmp_path, small_chunks):
    attack, count = dying(2)
    state = tmp_path / "state"
    arguments = {"seed": 0, "state_file": state}
    with pytest.raises(Killed):
        evaluate(Brightness(), images, labels, planned(attack), **arguments)
    assert count == [3] and state.read_bytes().count(b"\n") == 3  # the header and two chunks
    with open(state, "ab") as stream:
        stream.write(b'{"attack":0,"chunk":2,"pla')  # a line that the kill cut off
    told = []
    result = evaluate(
        Brightness(), images, labels, planned(attack), **arguments, progress=lambda *news: told.append(news)
    )
    assert count == [5] and told[0] == ("a0", 20, 40)
    again = evaluate(Brightness(), images, labels, planned(HONEST), seed=0)
    for one, two in zip(result.attacks, again.attacks, strict=True):
        assert (one.outcomes, one.distances, one.predictions) == (two.outcomes, two.distances, two.predictions)
    assert result.worst_case == again.worst_case
    assert all(json.loads(line) for line in state.read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "another seed"),
        ({"mode": "cascade"}, "another mode"),
        ({"network": torch.nn.Sequential(Brightness())}, "another model"),
        ({"about": {"sha256": "b"}}, "another model"),
        ({"images": 0.001}, "another data"),
        ({"labels": [0]}, "another data"),
        ({"attacks": (HONEST, HONEST)}, "another battery"),
        ({"seed": 1, "mode": "cascade"}, "another seed and another mode"),
    ],
)
def test_a_state_of_another_question_is_refused_with_one_line(images, labels, tmp_path, small_chunks, change, what):
    attack, _ = dying(2)
    state = tmp_path / "state"
    given = {"seed": 0, "state_file": state, "about": {"sha256": "a"}}
    with pytest.raises(Killed):
        evaluate(Brightness(), images, labels, planned(attack), **given)
    before = state.read_bytes()
    change = dict(change)
    network, attacks = change.pop("network", Brightness()), change.pop("attacks", (attack,))
    images = images + change.pop("images", 0)
    labels = labels.clone()
    labels[change.pop("labels", [])] ^= 1
    with pytest.raises(UserError, match=f"{what}.*--restart") as caught:
        evaluate(network, images, labels, planned(*attacks), **given | change)
    assert "\n" not in str(caught.value) and state.read_bytes() == before
    result = evaluate(network, images, labels, planned(*attacks), **given | change, restart=True)
    assert result.attacks[0].status == "ok" and state.read_bytes() != before


def test_weights_that_differ_are_another_model(images, labels, tmp_path):
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)) for _ in range(2)]
    state = tmp_path / "state"
    evaluate(networks[0], images, labels, planned(HONEST), seed=0, state_file=state)
    with pytest.raises(UserError, match="another model"):
        evaluate(networks[1], images, labels, planned(HONEST), seed=0, state_file=state)


@pytest.mark.parametrize("content", [b"", b"\n", b"no json\n", b'{"format":"else"}\n', b"[1]\n", b"\xff\xfe\n"])
def test_a_damaged_state_is_said_to_be_so(tmp_path, content):
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no readable state.*--restart"):
        open_state(path, {"seed": 0})
    open_state(path, {"seed": 0}, restart=True).put(0, 0, {"places": [1]})
    assert open_state(path, {"seed": 0}).get(0, 0) == {"places": [1]}


@pytest.mark.parametrize("saving", [False, True])
def test_more_time_goes_on_where_the_limit_came(images, labels, tmp_path, small_chunks, clock, saving):
    def slow(classifier, images, labels, threat, rng):
        clock.sleep(0.15)
        return HONEST(classifier, images, labels, threat, rng)

    given = {"seed": 0, "state_file": tmp_path / "state", "mode": "cascade"}
    given |= {"examples_file": tmp_path / "examples.safetensors"} if saving else {}
    attacks = Planted(slow), Planted(shift(0.05))
    stopped = evaluate(Brightness(), images, labels, planned(*attacks), **given, time_limit=0.3)
    assert [row.status for row in stopped.attacks] == ["not run", "ok"]
    before = clock.now
    done = evaluate(Brightness(), images, labels, planned(*attacks), **given)
    spent = clock.now - before
    whole = evaluate(Brightness(), images, labels, planned(*attacks), seed=0, mode="cascade")
    assert 0 < spent < clock.now - before - spent  # what was done is not done again
    # The second attack of the cascade gets fewer images now that the first one is through.
    assert [row.outcomes for row in done.attacks] == [row.outcomes for row in whole.attacks]
    assert done.worst_case == whole.worst_case


def test_one_process_a_result(tmp_path):
    out = tmp_path / "result.json"
    with locked(out), pytest.raises(UserError, match=r"process .* is writing"), locked(out):
        raise AssertionError("the lock was given twice")
    with locked(out):
        pass
    assert os.listdir(tmp_path) == []


# -- the files, and tensors of one's own


def test_the_call_on_tensors_and_its_files(network, digit_images, tmp_path):
    images, labels = digit_images
    before = [module.training for module in network.train().modules()]
    files = {"out": tmp_path / "r.json", "per_image": tmp_path / "r.csv", "save_examples": tmp_path / "r.safetensors"}
    report = benchmark(
        network, images, labels, attacks="fgsm,pgd:steps=5,cw:c=10:steps=30:eps=0.5", norm="linf", eps=0.2,
        probes="none", **files,
    )  # fmt: skip
    assert [module.training for module in network.modules()] == before
    network.eval()
    assert report.data is None and report.n == 100 and "worst case" in report.table(80)
    saved = json.loads(files["out"].read_text())
    assert saved == report.to_json() and not state_path(files["out"]).exists()
    with open(files["per_image"], newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 300
    with safe_open(files["save_examples"], "pt") as stored:
        assert set(stored.keys()) == {row.label for row in report.attacks}
        assert json.loads(stored.metadata()["attacks"])["fgsm"] == "linf:0.2"
        examples = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for line in lines:
        image = int(line["image"])
        example = examples[line["attack"]][image]
        said = int(network(example[None]).argmax(1))
        assert int(line["label"]) == int(labels[image])
        if line["success"] == "1":
            assert line["outcome"] == "broken" and said == int(line["adversarial_label"]) != int(line["label"])
        elif line["norm"] == "linf":
            assert said == int(labels[image]) or line["outcome"] == "misclassified"
        if line["distance"] and line["norm"] == "linf":
            assert float((example - images[image]).abs().max()) == pytest.approx(float(line["distance"]), abs=1e-6)
    assert {line["outcome"] for line in lines} <= set(OUTCOMES)
    assert sum(float(line["queries"]) == 1 for line in lines if line["attack"] == "fgsm") == report.clean_correct
    copy = tmp_path / "copy.csv"
    report.save(copy)
    assert copy.read_bytes() == files["per_image"].read_bytes()
    with pytest.raises(UserError, match=r"must end in \.json .* or \.csv"):
        report.save(tmp_path / "report.txt")


def test_arrays_are_as_good_as_tensors(network, digit_images):
    images, labels = digit_images
    settings = {"attacks": "native:pgd:steps=3", "eps": "0.1", "probes": "none"}
    expected = benchmark(network, images, labels, **settings)
    for other in ((images.numpy(), labels.numpy()), (images.double().numpy(), labels.int().tolist())):
        assert benchmark(network, *other, **settings).attacks[0].outcomes == expected.attacks[0].outcomes
    eight_bit = (images * 255).round().to(torch.uint8)
    same = benchmark(network, eight_bit.float() / 255, labels, **settings)
    assert benchmark(network, eight_bit, labels, **settings).attacks[0].outcomes == same.attacks[0].outcomes
    few = benchmark(network, images, labels, n=30, **settings)
    assert few.n == 30 and few.indices == tuple(sorted(few.indices)) and set(few.labels) == set(range(10))
    assert few.labels == tuple(labels[list(few.indices)].tolist())
    assert next(per_image(few))["index"] == few.indices[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "belong together"),
        ({"images": "photo.png"}, "must be a tensor or an array of numbers, not str"),
        ({"images": object()}, "images must be"),
        ({"eps": None}, "no usual linf radius is known for 'your images'"),
        ({"data": "digits"}, "images and data are both given"),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "there are 0 images; give at least one"),
        ({"eps": "0.1,1/10"}, "a radius is given twice"),
        ({"labels": torch.zeros(100)}, "labels must be integers"),
        ({"save_examples": "x.npz"}, "must end in .safetensors"),
        ({"per_image": "x.txt"}, r"must end in \.csv"),
    ],
)
def test_what_cannot_be_attacked_is_said(network, digit_images, change, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = {"images": digit_images[0], "labels": digit_images[1], "eps": 0.1, "attacks": "fgsm"} | change
    with pytest.raises(UserError, match=message):
        benchmark(network, given.pop("images"), given.pop("labels"), probes="none", **given)


def test_a_data_frame_or_what_is_missing_for_one(network, digit_images):
    report = benchmark(network, *digit_images, attacks="native:fgsm", eps="0.1", probes="none")
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install pandas"):
            report.to_frame()
    else:
        frame = report.to_frame()
        assert (
            list(frame["label"]) == ["native:fgsm"] and frame["robust_accuracy"][0] == report.worst_case.robust_accuracy
        )
