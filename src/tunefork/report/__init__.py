"""What came of a run, on one page: a verdict in words, figures, examples, findings, recipe and cost."""

from tunefork.report.migration import migration_verdict, render_migration
from tunefork.report.page import render_report, write_report
from tunefork.report.verdict import verdict

__all__ = ["migration_verdict", "render_migration", "render_report", "verdict", "write_report"]
