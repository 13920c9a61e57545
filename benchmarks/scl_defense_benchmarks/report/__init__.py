"""The page that is sent to others: one HTML file out of one result, several, or a study, with its exports beside it."""

from scl_defense_benchmarks.report.build import ReportFiles, page_beside, report

__all__ = ["ReportFiles", "page_beside", "report"]
