"""Training records for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scl_defense.errors import UserError
from scl_defense.types import component


class _Writer:
    def __init__(self, writer: Any):
        self._writer = writer

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, global_step=record["epoch"])

    def close(self) -> None:
        self._writer.close()


@component
class TensorBoard:
    """Scalars of every epoch under ``tensorboard/`` in the run's folder."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> _Writer:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("logger 'tensorboard' needs TensorBoard; pip install 'scl-defense[tensorboard]'") from None
        return _Writer(SummaryWriter(str(run_dir / "tensorboard"), purge_step=epoch or None))
