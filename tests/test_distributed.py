"""Several processes as one run: two real ones, over gloo on this machine, against one."""

import json
import re
import signal
from pathlib import Path

import pytest
import together
import torch

from scl_defense import ThreatModel, UserError, train
from scl_defense.ascent import ascend
from scl_defense.cli.app import run
from scl_defense.draws import RowsOf
from scl_defense.errors import Interrupted
from scl_defense.launcher import launched, leads
from scl_defense.losses import infonce
from scl_defense.runtime import Ranks, anywhere, joined, ranks, select_device, stream

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)  # imports in several processes, on a machine that may be busy
TINY = {"limit": 30, "batch_size": 15, "val_limit": 21, "val_steps": 2, "epochs": 2, "model_options": {"width": 4},
        "sync_bn": True}  # fmt: skip
ONLINE = {**TINY, "trainer": "wide-adv-supcon", "generator": "contrastive-pgd-online",
          "generator_options": {"steps": 2}}  # fmt: skip
CASES = {
    "adv-supcon online": {**ONLINE, "epochs": 1},
    "cross-entropy pgd": {**TINY, "trainer": "wide-cross-entropy", "generator": "pgd", "optimizer": "sgd", "epochs": 1,
                          "generator_options": {"steps": 2}},
}  # fmt: skip
MORE = {
    "supcon, labels, AWP, average": {
        **TINY, "trainer": "wide-supcon", "generator": "contrastive-pgd-online", "awp": 0.005, "awp_after": 0.0,
        "average": 0.9, "generator_options": {"objective": "supcon", "steps": 2}, "epochs": 1},
    "two batch norms, joint ascent": {
        **TINY, "trainer": "wide-acl", "generator": "contrastive-pgd-online", "augment": "simclr", "epochs": 1,
        "generator_options": {"objective": "ntxent-joint", "views": 2, "steps": 2}},
    "twin, other classes": {
        **ONLINE, "epochs": 1, "generator_options": {"steps": 1, "ema": 0.9, "negatives": "other-classes", "views": 2}},
    "a trainer that sees all images": {**ONLINE, "epochs": 1, "trainer": "wide-unsplit"},
    "mixture, without the network": {
        **TINY, "trainer": "wide-adv-supcon", "generator": "mix:contrastive-pgd=1,corner-noise=1", "epochs": 1,
        "generator_options": {"contrastive-pgd.steps": 2}},
}  # fmt: skip


def in_two(tmp_path, cases, **more):
    out = tmp_path / "two"
    out.mkdir()
    started = together.processes([HERE / "together.py", json.dumps(cases), out], 2, tmp_path, **more)
    return together.finished(started, timeout=560), out


def the_same(one, two, tolerance=1e-10):
    """Losses, validation, gradients and weights of two runs."""
    assert len(one["records"]) == len(two["records"]) > 0
    for mine, theirs in zip(one["records"], two["records"], strict=True):
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert one["gradients"].keys() == two["gradients"].keys() and one["gradients"]
    assert max(float(gradient.abs().max()) for gradient in one["gradients"].values()) > 1e-4
    for name, gradient in one["gradients"].items():
        assert gradient.dtype == torch.float64
        assert torch.allclose(gradient, two["gradients"][name], rtol=0, atol=tolerance), name
    the_same_weights(one["network"], two["network"], tolerance)


def the_same_weights(one, two, tolerance=1e-10):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value.double(), two[name].double(), rtol=0, atol=tolerance), name


def check_against_one(tmp_path, cases):
    ends, out = in_two(tmp_path, cases)
    assert [code for code, *_ in ends] == [0, 0], ends
    found = torch.load(out / "found.pt", weights_only=True)
    for name, options in cases.items():
        assert found[name]["ranks"]["world"] == 2 and found[name]["ranks"]["backend"] == "gloo"
        the_same(together.trained(options, tmp_path / "one"), found[name])
        (folder,) = (out / name).iterdir()  # one run, written by one process
        assert {path.name for path in folder.iterdir()} - {".lock"} == {
            "best.pt", "last.pt", "config.toml", "metrics.jsonl",
        }  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    check_against_one(tmp_path, CASES)


@pytest.mark.slow
def test_two_processes_train_as_one_whatever_the_method(tmp_path):
    check_against_one(tmp_path, MORE)


@pytest.mark.slow
def test_without_shared_batch_norm_the_networks_still_agree_with_each_other(tmp_path):
    """Not equal to one process; but what is saved is one network, whose statistics are finite."""
    ends, out = in_two(tmp_path, {"apart": {**ONLINE, "sync_bn": False, "epochs": 1}})
    assert [code for code, *_ in ends] == [0, 0], ends
    found = torch.load(out / "found.pt", weights_only=True)["apart"]
    one = together.trained({**ONLINE, "epochs": 1}, tmp_path / "one")
    with pytest.raises(AssertionError):
        the_same(one, found)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One process in the middle: two before it, two after it; told to one of two, both stop at the same step."""
    whole = together.trained({**ONLINE, "epochs": 3}, tmp_path / "one")
    ends, out = in_two(tmp_path, {"run": {**ONLINE, "epochs": 3, "_stop": [1, 0]}})
    assert [code for code, *_ in ends] == [143, 143], ends
    (folder,) = (out / "run").iterdir()

    def stop(event):
        if event["event"] == "step" and event["epoch"] == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(resume=folder, plugins=[together.PLUGIN], on_event=stop)
    (tmp_path / "again").mkdir()
    ends, out = in_two(tmp_path / "again", {"run": {"resume": str(folder)}})
    assert [code for code, *_ in ends] == [0, 0], ends
    found = torch.load(out / "found.pt", weights_only=True)["run"]
    the_same_weights(whole["network"], found["network"])
    assert [record["epoch"] for record in found["records"]] == [0, 1, 2]


@pytest.mark.slow
def test_a_process_that_dies_is_missed(tmp_path):
    ends, _ = in_two(tmp_path, {"run": {**ONLINE, "_die": [1, 1]}}, SCL_DEFENSE_RANK_TIMEOUT="60")
    assert ends[1][0] == 7
    assert ends[0][0] == 1 and "SclDefenseError: process 1 of this run has gone" in ends[0][2], ends[0]


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all(tmp_path):
    ends, out = in_two(tmp_path, {"run": {**ONLINE, "_raise": [1, 1]}})
    assert [code for code, *_ in ends] == [1, 9]
    assert "PeerFailed" in ends[0][2] and "ValueError: planted" in ends[1][2], ends
    assert not (out / "run").exists()  # as with one process: a run without a checkpoint leaves nothing


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_halves_the_batch_of_all(tmp_path):
    ends, out = in_two(tmp_path, {"run": {**ONLINE, "epochs": 1, "_memory": [1, 1]}})
    assert [code for code, *_ in ends] == [0, 0], ends
    one = together.trained({**ONLINE, "epochs": 1, "_memory": [0, 1]}, tmp_path / "one")
    two = torch.load(out / "found.pt", weights_only=True)["run"]
    assert one["parts"] == two["parts"] == 2
    the_same_weights(one["network"], two["network"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--generator", "pgdd"], "error: .*'pgdd'.*"),
        (["train", "--limit", "30", "--batch-size", "3"], "error: a batch of 3 images is too small for 2 processes.*"),
        (["train", "--device", "cuda:0"], "error: device 'cuda:0' is one device, for 2 processes.*"),
        (["study", "none.toml"], "error: 'study' runs in one process; start it without torchrun"),
    ],
)
def test_a_users_mistake_under_torchrun_is_one_line_once(tmp_path, arguments, said):
    started = together.torchrun(["-m", "scl_defense", *arguments], 2, tmp_path)
    ((code, _, stderr),) = together.finished([started], timeout=560)
    assert code == 1
    lines = re.findall(r"^error: .*$", stderr, flags=re.MULTILINE)
    assert len(lines) == 1 and re.fullmatch(said, lines[0]), stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_benchmark_under_torchrun_gives_the_same_verdicts(tmp_path):
    """Of every image, with every attack, in a cascade too; one file, and nothing said twice."""
    from scl_defense_benchmarks.results import without_times

    quick = {"limit": 600, "epochs": 4, "batch_size": 30, "val_limit": 20, "val_steps": 1}
    done = train(out=str(tmp_path), trainer="cross-entropy", generator="none", model_options={"width": 4}, **quick)
    command = ["benchmark", done.best, "--attacks", "fgsm,pgd:steps=3:restarts=2,torchattacks:cw:steps=5",
               "--mode", "cascade", "--eps", "0.05,0.15", "--n", "330", "--probes", "none", "--no-report"]  # fmt: skip
    examples = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    assert run(list(map(str, [*command, "--out", tmp_path / "1.json", "--save-examples", examples[0]]))) == 0
    more = ["--out", tmp_path / "2.json", "--save-examples", examples[1]]
    started = together.torchrun(["-m", "--", "scl_defense", *command, *more], 2, tmp_path)
    ((code, stdout, stderr),) = together.finished([started], timeout=560)
    assert code == 0, stderr
    assert stdout.count("result: ") == 1
    one, two = (without_times(json.loads((tmp_path / f"{number}.json").read_text())) for number in (1, 2))
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    for differs in ("command", "workers", "threads"):
        one.pop(differs), two.pop(differs)
    assert one == two
    assert one["clean_correct"] > 128  # there is more than one chunk to share out
    assert {1, 2} <= set(one["attacks"][0]["outcomes"])
    assert examples[0].read_bytes() == examples[1].read_bytes()
    assert not list(tmp_path.glob("*.state"))


# -- in one process


@pytest.fixture
def second_of_three(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": 9}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


def test_torchrun_tells_a_process_its_place(second_of_three):
    assert launched() == (1, 3, 1, 2) and not leads()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("RANK", "x"), ("MASTER_PORT", None)])
def test_a_process_without_company_is_alone(second_of_three, monkeypatch, name, value):
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert launched() is None and leads()


def test_each_process_takes_a_card_of_its_own(second_of_three, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:1")
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="one device, for 3 processes"):
        select_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on this machine, but 1 CUDA devices"):
        select_device("cuda")


def test_one_process_alone_has_nobody_to_meet():
    with joined(torch.device("cpu")) as alone:
        assert alone is ranks() and alone.leads and alone.world == 1
        assert alone.rows(7) == slice(0, 7) and alone.most(3) == 3 and alone.everyones("x") == ["x"]
        assert not anywhere(torch.tensor(False)) and anywhere(torch.tensor(True))


@pytest.mark.parametrize(("total", "world"), [(25, 2), (7, 3), (2, 4), (0, 2), (64, 8)])
def test_every_image_belongs_to_one_process(total, world):
    shares = [Ranks(rank, world).rows(total) for rank in range(world)]
    assert [place for share in shares for place in range(total)[share]] == list(range(total))
    sizes = Ranks(0, world).sizes(total)
    assert [share.stop - share.start for share in shares] == sizes and max(sizes) - min(sizes) <= 1


def test_a_process_draws_its_rows_of_what_is_drawn_for_all():
    whole = torch.rand((8, 3), generator=stream(0, "x"))
    rng, other = stream(0, "x"), stream(0, "x")
    with RowsOf(5, 8, 8, rng):
        own, weights = torch.rand((3, 3), generator=rng), torch.rand((3, 3), generator=other)
    assert torch.equal(own, whole[5:])
    assert torch.equal(weights, whole[:3])  # not an image a row: another generator draws what it always draws
    following = stream(0, "x")
    torch.rand((8, 3), generator=following)
    assert torch.equal(torch.rand(2, generator=rng), torch.rand(2, generator=following))


@pytest.mark.parametrize("stuck", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(4, 4)])
def test_a_process_draws_for_the_stuck_images_of_others(monkeypatch, rows, stuck):
    """Image 0 has no gradient and gets random directions: elsewhere as many are drawn, and the next start is right.

    Where nobody is stuck nothing is drawn, not even by a process without an image.
    """

    class Second(Ranks):
        def most(self, value=0, **how):
            return max(int(value), int(stuck))  # the process of image 0 says so, at every step

    monkeypatch.setattr("scl_defense.runtime._joined", [])
    threat, slope = ThreatModel("linf", "0.1"), torch.ones(4, 1, 3, 3)
    slope[0] = 0 if stuck else 1
    images = torch.rand((4, 1, 3, 3), generator=stream(0, "z"))

    def climbed(rows, rng):
        def objective(points):
            return (points * slope[rows]).sum((1, 2, 3))

        return [ascend(objective, images[rows], threat, steps=3, rel_step=0.1, rng=rng) for _ in range(2)]

    rng, own = stream(0, "w"), stream(0, "w")
    whole = climbed(slice(0, 4), rng)
    second = Second(1, 2)
    monkeypatch.setattr("scl_defense.runtime._joined", [second])
    with second.lockstep(rows, 4, own):
        part = climbed(rows, own)
    for mine, all_of_them in zip(part, whole, strict=True):
        assert torch.equal(mine, all_of_them[rows])
    assert torch.equal(own.get_state(), rng.get_state())


def test_infonce_of_some_rows_is_infonce_of_all():
    rng = stream(0, "y")
    embed, references = torch.randn((9, 4), generator=rng), torch.randn((9, 4), generator=rng)
    exclude = torch.rand((9, 9), generator=rng) < 0.3
    whole = infonce(embed, references, 0.2, exclude=exclude)
    assert torch.allclose(infonce(embed[3:7], references, 0.2, exclude=exclude[3:7], first=3), whole[3:7])
