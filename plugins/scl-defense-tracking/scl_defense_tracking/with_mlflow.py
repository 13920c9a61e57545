"""Training records in MLflow."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from scl_defense.types import Field, component
from scl_defense_tracking.common import Guarded, flat, imported, keep, opened, recalled

NAME = "mlflow.json"
LONGEST = 500  # characters of a parameter that every version of MLflow takes
MOST = 100  # parameters in one request
BATCH = 1000  # metrics in one request


@component
class MLflow:
    """One MLflow run a run: the recipe as parameters, every number of an epoch as a metric at that step.

    ``MLFLOW_TRACKING_URI`` says where; ``MLFLOW_EXPERIMENT_NAME`` is honoured when ``experiment`` is left out. Opened
    again at an epoch that is logged already, it copies the epochs before to a new MLflow run and deletes the old one.
    """

    experiment: Annotated[str, Field(description="its experiment; empty: MLFLOW_EXPERIMENT_NAME, or scl-defense")] = ""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Guarded:
        mlflow = imported("mlflow")
        client, run_id = opened("mlflow", lambda: self._open(mlflow, run_dir, config, epoch))

        def send(step: int, values: dict[str, float]) -> None:
            _write(client, mlflow, run_id, [(name, value, step) for name, value in values.items()])

        return Guarded("mlflow", send, lambda: client.set_terminated(run_id))

    def _open(self, mlflow: Any, run_dir: Path, config: Mapping[str, Any], epoch: int) -> tuple[Any, str]:
        client = mlflow.MlflowClient()
        kept = recalled(run_dir / NAME)
        old = kept.get("run_id") if epoch and kept.get("uri") == client.tracking_uri else None
        history = _history(client, old) if old else []
        if old and all(step < epoch for _, _, step in history):
            client.update_run(old, status="RUNNING")
            return client, old
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "scl-defense"
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        run_id = client.create_run(experiment, run_name=run_dir.name).info.run_id
        parameters = [
            mlflow.entities.Param(key, str(value)[:LONGEST]) for key, value in flat(config).items() if value is not None
        ]
        for start in range(0, len(parameters), MOST):
            client.log_batch(run_id, params=parameters[start : start + MOST])
        _write(client, mlflow, run_id, [line for line in history if line[2] < epoch])
        keep(run_dir / NAME, {"run_id": run_id, "experiment": name, "uri": client.tracking_uri})
        if old:
            client.delete_run(old)
        return client, run_id


def _history(client: Any, run_id: str) -> list[tuple[str, float, int]]:
    """Every (name, value, step) of a run; nothing where it is no longer there."""
    try:
        names = client.get_run(run_id).data.metrics
    except Exception:
        return []
    return [(name, metric.value, metric.step) for name in names for metric in client.get_metric_history(run_id, name)]


def _write(client: Any, mlflow: Any, run_id: str, lines: list[tuple[str, float, int]]) -> None:
    now = int(time.time() * 1000)
    metrics = [mlflow.entities.Metric(name, value, now, step) for name, value, step in lines]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
