"""Benchmarks: ops and layers against their peers, checked before they are timed, interleaved, with medians."""

from layerzoo.bench.case import Candidate, Case, Cost, Target, Work
from layerzoo.bench.report import Report
from layerzoo.bench.runner import run

__all__ = ["Candidate", "Case", "Cost", "Report", "Target", "Work", "run"]
