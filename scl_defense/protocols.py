"""The protocols that judge a trained encoder: SLF, ALF, AFF, one fixed recipe for all methods.

Definitions of the RobustSSL benchmark (after Jiang et al. 2020, ACL). Its recipes are tuned per method; here every
method gets the same one, and the standard linear head has nothing to tune because it is solved to convergence.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from scl_defense import checkpoint
from scl_defense.config import TrainConfig, train_config
from scl_defense.errors import UserError, nearest
from scl_defense.train import Event, train
from scl_defense.trained import TrainResult

# Every protocol begins with a linear probe on the encoder's clean features.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # Standard linear: the probe itself (the one epoch runs the encoder once over the data and changes nothing).
    "slf": {"trainer": "linear", "trainer_options": {"head": "probe"}, "generator": "none", "epochs": 1},
    # Adversarial linear: PGD adversarial training of the head, frozen encoder.
    "alf": {"trainer": "linear", "generator": "pgd", "generator_options": {"steps": 10}, "epochs": 10, "lr": 1e-3},
    # Adversarial full: TRADES on everything.
    "aff": {"trainer": "trades", "generator": "pgd", "generator_options": {"loss": "kl", "steps": 10}, "epochs": 25},
}
# What the new run takes over from the one that made the encoder: the data and how it is cut, the network, the ball.
_KEPT = (
    "data", "data_options", "data_root", "model", "model_options", "norm", "eps", "batch_size", "limit",
    "val_fraction", "val_limit", "val_steps", "precision", "seed",
)  # fmt: skip


def finetune_config(path: str | Path, protocol: str, **overrides: Any) -> TrainConfig:
    """The recipe of ``slf``, ``alf`` or ``aff`` for the encoder of a checkpoint; ``overrides`` are its fields.

    Raises :class:`UserError` for another protocol and for a file that is no checkpoint of this project.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol '{protocol}' is unknown{nearest(protocol, list(PROTOCOLS))}; write slf, alf or aff")
    content, _ = checkpoint.read(path)
    made_by = json.loads(content["config"])
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    kept = {name: made_by[name] for name in _KEPT if name in made_by}
    wrong = overrides.keys() - fields
    if wrong:
        raise UserError(f"a protocol has no option '{min(wrong)}'{nearest(min(wrong), sorted(fields))}")
    recipe = {**kept, "augment": "weak", **PROTOCOLS[protocol], "init": str(path), **overrides}
    recipe.setdefault("name", None)
    return train_config(recipe)


def finetune(
    path: str | Path, protocol: str = "slf", *, on_event: Event | None = None, **overrides: Any
) -> TrainResult:
    """Judge the encoder of a checkpoint; the command ``scl-defense finetune`` is this call.

    path: a checkpoint of this project. protocol: ``slf`` (standard linear: logistic regression on frozen clean
    features), ``alf`` (adversarial linear: PGD training of the head, frozen encoder) or ``aff`` (adversarial full:
    TRADES on the whole network). An ordinary run: ``best.pt`` is benchmarked like any other. overrides: fields of
    :class:`TrainConfig`. Raises :class:`UserError`.

    >>> import scl_defense
    >>> run = scl_defense.train(generator="none", trainer="cross-entropy", epochs=1, limit=64,
    ...                         batch_size=32, val_limit=32, val_steps=1)
    >>> scl_defense.finetune(run.best, "slf").epochs
    1
    """
    return train(finetune_config(path, protocol, **overrides), on_event=on_event)
