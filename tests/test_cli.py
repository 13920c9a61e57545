"""The command line: exit codes, one line an error, what is imported for which answer."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scl_defense import benchmark, checkpoint
from scl_defense.cli.app import run
from scl_defense.config import TrainConfig

TINY = [
    "--limit",
    "96",
    "--batch-size",
    "32",
    "--val-limit",
    "48",
    "--val-steps",
    "1",
    "--epochs",
    "1",
    "-m",
    "width=4",
]
HEAVY = ("torch", "torchvision", "torchattacks", "art", "sklearn", "scipy")

PROBE = """
import sys
from scl_defense.cli.app import run
code = run(sys.argv[1:])
heavy = [name for name in {heavy!r} if name in sys.modules]
components = [name for name in sys.modules if name.startswith(("scl_defense_plugins.", "scl_defense_benchmarks."))
              and not name.endswith(".hooks")]
print("LOADED", code, heavy + components)
"""


def probe(*arguments):
    """Exit code and heavy modules after a command line in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments], capture_output=True, text=True, timeout=120
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    _, code, loaded = line.split(" ", 2)
    return int(code), loaded, done


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["benchmark", "--help"], 0),
        (["plugins", "--help"], 0),
        (["plugins", "list"], 0),
        (["plugins", "list", "--json"], 0),
        (["plugins", "list", "generators"], 0),
        (["plugins", "list", "contrastve-pgd"], 2),
        (["train", "--generator", "contrastve-pgd"], 2),
        (["train", "--trainer", "advsupcon"], 2),
        (["train", "--model", "resnet-18"], 2),
        (["train", "--logger", "tensorbord"], 2),
        (["train", "--epochs", "0"], 2),
        (["train", "--epoch", "3"], 2),
        (["trian"], 2),
        (["benchmark", "no-such-file.pt"], 2),
    ],
)
def test_naming_answers_import_nothing_heavy(arguments, code):
    got, loaded, done = probe(*arguments)
    assert (got, loaded) == (code, "[]"), done.stderr
    if code == 2:
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


def test_importing_the_package_imports_neither_torch_nor_a_plugin():
    heavy = "[m for m in sys.modules if m in ('torch', 'art') or m.startswith('scl_defense_')]"
    code = f"import scl_defense, sys; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_probe_itself_sees_torch():
    """The check above can fail: listing one component's options does import torch."""
    assert "torch" in probe("plugins", "list", "pgd")[1]


def error_of(capsys, *arguments):
    code = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--generator", "contrastve-pgd"], "did you mean 'contrastive-pgd'"),
        (["train", "-g", "stepz=3"], "did you mean 'steps'"),
        (["train", "-g", "steps"], "must be written name=value"),
        (["train", "-g", "steps=3", "-g", "steps=4"], "given twice"),
        (["train", "-g", "steps=0"], "greater than or equal to 1"),
        (["train", "--eps", "-1"], "eps '-1'"),
        (["train", "--eps=8"], "larger than the whole range"),
        (["train", "--norm", "l7"], "'norm'"),
        (["train", "--lr", "nan"], "'lr'"),
        (["train", "--data", "no-such"], "no data set named 'no-such'"),
        (["train", "--data", "digit"], "did you mean 'digits'"),
        (["train", "--config", "missing.toml"], "cannot be read"),
        (["train", "--resume", "nowhere"], "nothing to resume"),
        (["train", "--resume", "nowhere", "--epochs", "3"], "own recipe"),
        (["train", "--plugin", "missing.py"], "does not exist"),
        (["train", "--device", "cuda:7", "--limit", "20"], "device 'cuda:7' is not there"),
        (["plugins", "list", "pdg"], "did you mean 'pgd'"),
        (["info", "missing.pt"], "cannot be read"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, line = error_of(capsys, *arguments)
    assert code == 2 and message in line
    assert not list(tmp_path.rglob("*.pt"))


def test_debug_shows_the_traceback(capsys):
    assert run(["--debug", "train", "--eps", "-1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_train_prints_accuracies_and_the_next_command(capsys, tmp_path):
    assert run(["train", *TINY, "--generator", "corner-noise", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    folder = tmp_path / "adv-supcon-corner-noise-digits-s0"
    assert "clean" in captured.out and "robust (linf:0.1" in captured.out
    assert (
        captured.out.strip().splitlines()[-1] == f"next: scl-defense benchmark {folder}/best.pt --attacks fgsm,pgd,cw"
    )
    assert "epoch 1/1" in captured.err
    assert all(len(line) <= 100 for line in captured.err.splitlines())
    assert run(["info", str(folder / "best.pt"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["threat"] == "linf:0.1" and info["config"]["generator"] == "corner-noise"
    assert run(["info", str(folder / "best.pt")]) == 0
    assert "small-cnn" in capsys.readouterr().out


def test_info_shows_what_a_file_of_another_program_holds(capsys, tmp_path):
    """Names and shapes of the weights, wherever they are; the optimizer's are none. No terminal obeys it."""
    network = torch.nn.Linear(3, 2)
    state, optimizer = network.state_dict(), torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = {"epoch": 2, "model": state, "optimizer": optimizer.state_dict(), "by\x1b[31m": "me"}
    torch.save(whole, tmp_path / "net.pt")
    save_file(state, tmp_path / "net.safetensors", {"author": "me", "format": "pt"})
    assert run(["info", str(tmp_path / "net.pt")]) == 0
    said = capsys.readouterr().out
    assert "tensors: 2" in said and "model.weight: 2 x 3" in said and "epoch: 2" in said and "\x1b" not in said
    assert f"next: scl-defense benchmark {tmp_path}/net.pt --model" in said
    for name, prefix in (("net.pt", "model."), ("net.safetensors", "")):
        assert run(["info", str(tmp_path / name), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["tensors"] == {f"{prefix}weight": [2, 3], f"{prefix}bias": [2]} and told["format"] is None
        assert told["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert told["other"] == {"author": "me", "format": "pt"}
    assert (
        run(["generate", "--generator", "corner-noise", "--limit", "50", "--out", str(tmp_path / "made.safetensors")])
        == 0
    )
    capsys.readouterr()
    assert run(["info", str(tmp_path / "made.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "format: scl-defense-examples/" in said and "adversarial: 1 x 50 x 1 x 8 x 8" in said
    assert said.endswith(f"next: scl-defense train --generator file:{tmp_path}/made.safetensors\n")
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 50)
    code, line = error_of(capsys, "info", str(tmp_path / "net.safetensors"))
    assert code == 2 and "no readable safetensors file" in line


def test_json_is_the_only_thing_on_stdout(capsys, tmp_path):
    assert run(["train", *TINY, "--generator", "none", "--out", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["epochs"] == 1 and captured.err == ""


def test_dry_run_writes_nothing(capsys, tmp_path):
    assert run(["train", *TINY, "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_flags_win_over_the_recipe_file_and_a_written_recipe_can_be_used_again(capsys, tmp_path):
    recipe = tmp_path / "run.toml"
    recipe.write_text('generator = "pgd"\nepochs = 7\nseed = 3\n[generator_options]\nsteps = 1\nloss = "kl"\n')
    base = ["train", *TINY, "--config", str(recipe), "--json"]
    assert run([*base, "--out", str(tmp_path / "a"), "-g", "steps=2"]) == 0
    first = json.loads(capsys.readouterr().out)
    written = (tmp_path / "a" / "adv-supcon-pgd-digits-s3" / "config.toml").read_text()
    assert "epochs = 1\n" in written and '"loss" = "kl"' in written and '"steps" = "2"' in written
    assert run(["train", "--config", first["run_dir"] + "/config.toml", "--out", str(tmp_path / "b"), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["clean"], second["robust"]) == (first["clean"], first["robust"])
    # Another generator on the command line: the file's options were for the other one.
    assert run([*base, "--generator", "corner-noise", "--out", str(tmp_path / "c")]) == 0


def test_a_wrong_name_in_a_recipe_file_is_an_error(capsys, tmp_path):
    (tmp_path / "run.toml").write_text("epoch = 3\n")
    code, line = error_of(capsys, "train", "--config", tmp_path / "run.toml")
    assert code == 2 and "did you mean 'epochs'" in line


def test_every_field_of_the_recipe_is_an_option(capsys):
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_options", "_option").replace("_", "-") in text


def test_plugins_list_describes_one_component_and_all(capsys):
    assert run(["plugins", "list", "contrastive-pgd"]) == 0
    text = capsys.readouterr().out
    assert "space (pixel|filterbank|scattering|random-conv|checkpoint)" in text and "from scl-defense" in text
    assert run(["plugins", "list", "pgd", "--json"]) == 0
    kinds = {row["kind"] for row in json.loads(capsys.readouterr().out)}
    assert kinds == {"generator", "attack"}
    assert run(["plugins", "list", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything["quarantined"] == [] and len(everything["components"]) > 20


def test_a_plugin_file_is_listed_used_and_its_faults_are_one_line(capsys, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from scl_defense import hookimpl\n"
        "from scl_defense.types import component\n"
        "@component\n"
        "class Same:\n"
        "    '''The views themselves.'''\n"
        "    needs = frozenset()\n"
        "    def __call__(self, batch, context):\n"
        "        return batch.views[:1].clone()\n"
        "@hookimpl\n"
        "def register_generators(register):\n"
        "    register('same', Same, summary='the views themselves')\n"
    )
    assert run(["plugins", "list", "--plugin", str(plugin)]) == 0
    assert "same" in capsys.readouterr().out
    assert run(["train", *TINY, "--plugin", str(plugin), "--generator", "same", "--out", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    plugin.write_text("import no_such_module_at_all\n")
    code, line = error_of(capsys, "plugins", "list", "--plugin", plugin)
    assert code == 2 and "No module named 'no_such_module_at_all'" in line


def test_the_contract_test_is_a_command(capsys, tmp_path):
    assert run(["plugins", "check", "corner-noise"]) == 0
    text = capsys.readouterr().out
    assert "pass  corner-noise  inside-ball" in text and text.strip().endswith("0 failed")
    assert run(["plugins", "check", "generator:pgd", "-o", "steps=2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 15 and all(row["passed"] for row in rows)
    assert run(["plugins", "check", "npz", "-o", f"path={tmp_path}"]) == 1  # nothing there to check
    assert "FAIL  npz" in capsys.readouterr().out
    code, line = error_of(capsys, "plugins", "check", "corner-nois")
    assert code == 2 and "did you mean 'corner-noise'" in line


def test_a_benchmark_destroys_nothing_and_says_so_before_it_attacks(capsys, tmp_path):
    assert run(["train", *TINY, "--generator", "none", "--out", str(tmp_path), "--name", "a"]) == 0
    capsys.readouterr()
    best = tmp_path / "a" / "best.pt"
    before = best.read_bytes()
    base = ["benchmark", best, "--attacks", "native:fgsm", "--n", "20"]
    for out, message in (
        (best, "is the checkpoint, which is read"),
        (tmp_path / "a" / "metrics.jsonl", "is no benchmark result"),
        (tmp_path, "is a directory"),
        ("/proc/no/x.json", "cannot make the folder"),
    ):
        code, line = error_of(capsys, *base, "--out", out)
        assert code == 2 and message in line
    code, line = error_of(capsys, *base, "--mean", "0.5")
    assert code == 2 and "knows its own network" in line
    code, line = error_of(capsys, *base[:3], "fgsm", "--norm", "l2")
    assert code == 2 and "cannot work in l2" in line
    assert best.read_bytes() == before
    assert run([str(a) for a in base]) == 0
    table = capsys.readouterr().out
    shown, _, written = table.partition("result: ")
    assert "worst case" in shown and all(len(line) <= 80 for line in shown.splitlines()) and ".json" in written
    assert run([*[str(a) for a in base], "--json"]) == 0  # the same question into the same file
    assert json.loads(capsys.readouterr().out)["n"] == 20
    results = [file for file in (tmp_path / "a").glob("best-benchmark-*.json") if "model-info" not in file.name]
    assert len(results) == 1


def test_libraries_are_compared_from_the_command_line(capsys, tmp_path):
    assert run(["train", *TINY, "--generator", "none", "--out", str(tmp_path), "--name", "a"]) == 0
    weights, best = str(tmp_path / "w.pt"), str(tmp_path / "a" / "best.pt")
    content, _ = checkpoint.read(Path(best))
    torch.save(content["network"], weights)
    capsys.readouterr()
    base = ["--attacks", "fgsm", "--n", "30", "--json"]
    assert run(["agreement", best, *base]) == 0
    own = json.loads(capsys.readouterr().out)
    assert {side["library"] for side in own["sides"]["fgsm"]} == {"torchattacks", "art", "native"}
    # A file of bare weights needs what the other commands need, and gives the same answer.
    code, line = error_of(capsys, "agreement", weights, *base)
    assert code == 2 and "data" in line
    foreign = ["--data", "digits", "--model", "small-cnn", "-m", "width=4", "--eps", "0.1"]
    assert run(["agreement", weights, *foreign, *base]) == 0
    assert json.loads(capsys.readouterr().out)["sides"] == own["sides"]
    code, line = error_of(capsys, "agreement", best, *base, "--eps", "0.1,0.2")
    assert code == 2 and "one eps" in line
    code, line = error_of(capsys, "agreement", str(tmp_path / "no.pt"))
    assert code == 2 and "does not exist" in line


def test_a_network_that_is_not_the_one_that_was_validated_is_not_trusted(tmp_path):
    """The file says how accurate its network was; compared where the data are the same and the accuracy is its own."""
    assert run(["train", *TINY, "--generator", "none", "--out", str(tmp_path), "--name", "a"]) == 0
    best = tmp_path / "a" / "best.pt"
    content, _ = checkpoint.read(best)

    def flags(**changed):
        checkpoint.save(tmp_path / "b.pt", {**content, **changed})
        found = benchmark(tmp_path / "b.pt", attacks="noise", probes="none")
        return {flag.id for flag in found.flags}

    name = "clean-accuracy-not-as-recorded"
    other = {**content["best"], "clean": 1.0 if content["best"]["clean"] < 0.5 else 0.0, "images": 2000}
    assert content["best"]["images"] == 48 and name not in flags()
    assert name in flags(best=other)
    assert name not in flags(best=other, epoch=content["epoch"] + 1)  # as last.pt: that was another epoch's network


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_its_code(tmp_path, signum, code):
    arguments = [
        "train",
        *TINY[:-4],
        "--epochs",
        "100000",
        "-m",
        "width=4",
        "--generator",
        "none",
        "--out",
        "runs of mine",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from scl_defense.cli import main; main()", *arguments],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    log = tmp_path / "runs of mine" / "adv-supcon-none-digits-s0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert process.returncode == code and last.startswith("error: stopped and saved"), err
    assert "scl-defense train --resume 'runs of mine/adv-supcon-none-digits-s0'" in last
    assert (log.parent / "last.pt").exists() and "Traceback" not in err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["RuntimeError", "scl_defense.UserError", "KeyboardInterrupt", "BaseException"])
def test_a_stop_that_compiled_code_made_an_error_of_is_a_stop(kind, signum, code):
    """As pydantic's does while it is imported: the KeyboardInterrupt is but a word in its error."""
    script = f"""
import os, click, scl_defense
from scl_defense.cli import app
@click.command()
def wait():
    try:
        os.kill(os.getpid(), {int(signum)})
        while True: pass
    except KeyboardInterrupt as error:
        text = repr(error)
    raise {kind}(text)
app.cli.add_command(wait)
app.main(["wait"])
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    # Click ends the line of a KeyboardInterrupt, on which a terminal shows ^C.
    assert (process.returncode, process.stderr.lstrip("\n")) == (code, "error: stopped\n")


def test_a_stop_that_was_answered_long_ago_hides_no_error():
    script = """
import os, signal, time, click, scl_defense
from scl_defense.cli import app
@click.command()
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
    except KeyboardInterrupt:
        app._stops = [(number, when - 60) for number, when in app._stops]
    raise scl_defense.UserError("the file is missing")
app.cli.add_command(work)
app.main(["work"])
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (2, "error: the file is missing\n")


def test_a_run_whose_caller_ignores_ctrl_c_ignores_it_too():
    script = """
import os, signal, click
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell's background do
from scl_defense.cli import app
@click.command()
def go_on():
    os.kill(os.getpid(), signal.SIGINT)
    print("went on")
app.cli.add_command(go_on)
app.main(["go-on"])
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout, process.stderr) == (0, "went on\n", "")


def test_two_processes_do_not_share_a_run(tmp_path):
    from scl_defense import UserError
    from scl_defense.logs import locked

    with (
        locked(tmp_path),
        pytest.raises(UserError, match=rf"in use by process {os.getpid()}"),
        locked(tmp_path),
    ):
        raise AssertionError("the lock was given twice")
    with locked(tmp_path):
        assert (tmp_path / ".holder").exists()
    assert not (tmp_path / ".holder").exists()


def test_what_a_pipeline_demands_of_a_benchmark(capsys, tmp_path):
    assert run(["train", *TINY, "--generator", "none", "--out", str(tmp_path), "--name", "a"]) == 0
    capsys.readouterr()
    best = str(tmp_path / "a" / "best.pt")
    base = ["benchmark", best, "--attacks", "native:pgd:steps=2:restarts=2", "--n", "20", "--probes", "none", "--quiet"]
    for value, message in (
        (["--time-limit", "soon"], "must be a time above 0"),
        (["--eps", "0.1,much"], "much"),
        (["--per-image", "x.txt"], "must end in .csv"),
    ):
        code, line = error_of(capsys, *base, *value)
        assert code == 2 and message in line
    table = tmp_path / "images.csv"
    curve = [*base, "--eps", "0,0.9", "--mode", "cascade", "--time-limit", "10m", "--per-image", str(table), "--json"]
    assert run([*curve, "--fail-under", "0.9"]) == 1  # the largest radius is the main one
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "is below --fail-under 0.9" in captured.err and found["mode"] == "cascade" and found["eps"] == "0.9"
    assert [case["eps"] for case in found["worst_cases"]] == ["0", "0.9"] and found["attacks"][0]["restarts"] == 2
    assert len(table.read_text().splitlines()) == 1 + 2 * 20
    grave = {flag["id"] for flag in found["flags"] if flag["severity"] == "error"}
    assert run([*curve, "--fail-under", "0", "--strict"]) == (1 if grave else 0)
    assert run([*curve, "--fail-under", "0"]) == (1 if grave else 0)  # at chance: no number to go by
    assert grave == {"clean-accuracy-at-chance"}
    capsys.readouterr()
    # How many at a time reaches no number and no file name; what attacks run in is part of the question.
    assert run([*curve, "--workers", "2"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["worst_cases"] == found["worst_cases"] and again["file"] == found["file"] and again["workers"] == 2
    assert run([*curve, "--precision", "bf16"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert half["precision"] == "bf16" and half["attacks"][0]["precision"] == "bf16+fp32"
    assert half["file"] != found["file"]
    assert not list((tmp_path / "a").glob("best-benchmark-*.state*"))
    assert not list((tmp_path / "a").glob("best-benchmark-*.lock"))
    # Nothing was tried: no success, whatever was demanded.
    assert run([*base, "--time-limit", "0.000001", "--seed", "5"]) == 1
    assert "no attack was run" in capsys.readouterr().err
