"""The loggers against what the trackers themselves read back; skipped where a tracker is not installed."""

import json
import time
import warnings

import pytest
from scl_defense_tracking import common, hooks
from scl_defense_tracking.with_mlflow import MLflow
from scl_defense_tracking.with_wandb import WandB

from scl_defense import UserError
from scl_defense.testing import assert_contract

CONFIG = {"data": "digits", "epochs": 4, "eps": None, "trainer_options": {"temperature": 0.1}}


def record(epoch, mark=0.0):
    return {"epoch": epoch, "loss": 1.0 / (epoch + 1) + mark, "val_clean": epoch / 10, "note": "text",
            "broken": float("nan"), "parts": {"ce": 1.0}}  # fmt: skip


def told(logger, run_dir, first, last, mark=0.0):
    writer = logger(run_dir, dict(CONFIG), first)
    for epoch in range(first, last):
        writer.log(record(epoch, mark))
    writer.close()


# -- MLflow


@pytest.fixture
def store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny without sqlalchemy has no local store")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient(uri)


def runs_of(client, experiment="scl-defense"):
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def curve(client, run, name="loss"):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_holds_the_recipe_and_the_numbers(store, tmp_path):
    (tmp_path / "run").mkdir()
    told(MLflow(), tmp_path / "run", 0, 4)
    (run,) = runs_of(store)
    assert run.data.params == {"data": "digits", "epochs": "4", "trainer_options.temperature": "0.1"}
    assert curve(store, run) == [(epoch, 1.0 / (epoch + 1)) for epoch in range(4)]
    assert set(run.data.metrics) == {"loss", "val_clean"}
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")


def test_mlflow_goes_on_in_the_same_run(store, tmp_path):
    told(MLflow(), tmp_path, 0, 2)
    told(MLflow(), tmp_path, 2, 4)
    (run,) = runs_of(store)
    assert [step for step, _ in curve(store, run)] == [0, 1, 2, 3]


def test_an_epoch_that_is_done_again_stands_in_mlflow_once(store, tmp_path):
    told(MLflow(), tmp_path, 0, 4, mark=100.0)
    told(MLflow(), tmp_path, 2, 4)
    (run,) = runs_of(store)  # the old one is in the bin
    assert curve(store, run) == [(0, 101.0), (1, 100.5), (2, 1 / 3), (3, 0.25)]
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == run.info.run_id


def test_a_new_run_in_a_folder_does_not_touch_an_older_one(store, tmp_path):
    told(MLflow(), tmp_path, 0, 2)
    told(MLflow(), tmp_path, 0, 3)
    assert sorted(len(curve(store, run)) for run in runs_of(store)) == [2, 3]


def test_mlflow_experiments_have_names(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    told(MLflow(), tmp_path, 0, 1)
    told(MLflow(experiment="mine"), tmp_path, 0, 1)
    assert len(runs_of(store, "from the environment")) == len(runs_of(store, "mine")) == 1


def test_mlflow_keeps_the_contract(store):
    assert_contract(MLflow(), "logger", "mlflow")


def test_a_store_that_cannot_be_opened_is_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UserError, match=r"logger 'mlflow' cannot open its record: .*nonsense") as caught:
        MLflow()(tmp_path, CONFIG, 0)
    assert "\n" not in str(caught.value) and not (tmp_path / "mlflow.json").exists()


# -- Weights & Biases


@pytest.fixture
def offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def records(path):
    """The records of a ``.wandb`` file: a log in LevelDB's format (blocks of 32 KiB) behind a header of 7 bytes.

    Read here, because the library's own reader is internal and moves from release to release.
    """
    content, place, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # too short for a header: the block's padding
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield parts
            parts = b""


def synced(run_dir):
    """What the offline files of a run hold, in the order in which they would be synced: (run, history lines)."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes the end of a file after the run is finished, as late as when a process ends
    found, lines = [], []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(path):
            item = wandb_internal_pb2.Record()
            item.ParseFromString(data)
            if item.WhichOneof("record_type") == "run":
                found.append(item.run)
            if item.WhichOneof("record_type") == "history":
                values = {
                    part.key or ".".join(part.nested_key): json.loads(part.value_json) for part in item.history.item
                }
                lines.append(values)
    return found, lines


def test_wandb_holds_the_recipe_and_the_numbers(offline, tmp_path):
    told(WandB(), tmp_path, 0, 4)
    (run, *_), lines = synced(tmp_path)
    config = {part.key: json.loads(part.value_json) for part in run.config.update}
    assert config["data"] == "digits" and config["trainer_options"] == {"temperature": 0.1}
    assert (run.project, run.display_name) == ("scl-defense", tmp_path.name)
    assert [(line["_step"], line["loss"]) for line in lines] == [(epoch, 1.0 / (epoch + 1)) for epoch in range(4)]
    assert not any({"note", "broken", "epoch"} & set(line) for line in lines)


def test_wandb_goes_on_in_the_same_run_and_has_every_epoch_once(offline, tmp_path):
    told(WandB(), tmp_path, 0, 3)
    while any(time.strftime("%Y%m%d_%H%M%S") in path.name for path in (tmp_path / "wandb").iterdir()):
        time.sleep(0.05)  # it names a folder by the second and the run: a later process has one of its own
    told(WandB(project="other"), tmp_path, 2, 5)
    runs, lines = synced(tmp_path)
    assert (
        len({run.run_id for run in runs}) == 1
        and runs[0].run_id == json.loads((tmp_path / "wandb.json").read_text())["id"]
    )
    assert [line["_step"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_new_wandb_run_has_a_name_of_its_own(offline, tmp_path):
    told(WandB(), tmp_path, 0, 1)
    first = json.loads((tmp_path / "wandb.json").read_text())["id"]
    told(WandB(), tmp_path, 0, 1)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] != first


# -- both


def test_they_are_registered():
    found = {}
    hooks.register_loggers(lambda name, target, *, summary: found.update({name: target}))
    assert set(found) == {"mlflow", "wandb"}
    for name, target in found.items():
        module, _, cls = target.partition(":")
        assert getattr(__import__(module, fromlist=[cls]), cls)() is not None, name


def test_a_missing_tracker_is_one_line():
    with pytest.raises(UserError, match=r"pip install 'scl-defense-tracking\[no_such_tracker\]'") as caught:
        common.imported("no_such_tracker")
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_later_is_said_once_and_training_goes_on():
    seen = []

    def send(step, values):
        seen.append(step)
        if step == 1:
            raise ConnectionError("the server\nis gone")

    writer = common.Guarded("some", send, lambda: seen.append("closed"))
    writer.log(record(0))
    with pytest.warns(UserWarning, match="logger 'some' failed .*: ConnectionError: the server is gone"):
        writer.log(record(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.log(record(2))
        writer.close()
    assert seen == [0, 1]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"run_id": '])
def test_a_file_that_a_kill_left_half_written_is_nothing(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert common.recalled(tmp_path / "x.json") == {}
    common.keep(tmp_path / "x.json", {"id": "a"})
    assert common.recalled(tmp_path / "x.json") == {"id": "a"} and len(list(tmp_path.iterdir())) == 1
