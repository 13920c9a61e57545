"""Studies: a grid of methods and seeds, trained and attacked in parallel processes; tables, figures and a summary."""

from scl_defense_benchmarks.study.run import StudyResult, study

__all__ = ["StudyResult", "study"]
