"""scl-defense: attack-and-defense plugin toolkit for adversarial robustness through contrastive learning.

``import scl_defense`` costs milliseconds: everything heavy is imported when first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from scl_defense.errors import ComponentError, SclDefenseError, UserError
from scl_defense.hookspecs import hookimpl

if TYPE_CHECKING:
    from scl_defense_benchmarks.agreement import agreement
    from scl_defense_benchmarks.benchmark import benchmark
    from scl_defense_benchmarks.export import export
    from scl_defense_benchmarks.report import report
    from scl_defense_benchmarks.results import Report
    from scl_defense_benchmarks.share import pull, push
    from scl_defense_benchmarks.study import study

    from scl_defense.checkpoint import load, load_classifier
    from scl_defense.config import TrainConfig
    from scl_defense.protocols import finetune
    from scl_defense.stored import generate_examples
    from scl_defense.threat import ThreatModel
    from scl_defense.train import train

try:
    __version__ = version("scl-defense")
except PackageNotFoundError:  # a bare source tree
    __version__ = "0.0.0"

# The public Python API: name -> the module that holds it. The benchmark layer is named, never imported, here.
_LAZY = {
    "Report": "scl_defense_benchmarks.results",
    "ThreatModel": "scl_defense.threat",
    "TrainConfig": "scl_defense.config",
    "agreement": "scl_defense_benchmarks.agreement",
    "benchmark": "scl_defense_benchmarks.benchmark",
    "export": "scl_defense_benchmarks.export",
    "finetune": "scl_defense.protocols",
    "generate_examples": "scl_defense.stored",
    "load": "scl_defense.checkpoint",
    "load_classifier": "scl_defense.checkpoint",
    "pull": "scl_defense_benchmarks.share",
    "push": "scl_defense_benchmarks.share",
    "report": "scl_defense_benchmarks.report",
    "study": "scl_defense_benchmarks.study",
    "train": "scl_defense.train",
}

__all__ = [
    "ComponentError",
    "Report",
    "SclDefenseError",
    "ThreatModel",
    "TrainConfig",
    "UserError",
    "__version__",
    "agreement",
    "benchmark",
    "export",
    "finetune",
    "generate_examples",
    "hookimpl",
    "load",
    "load_classifier",
    "pull",
    "push",
    "report",
    "study",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'scl_defense' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # also shadows the submodule of the same name (scl_defense.train)
    return value
