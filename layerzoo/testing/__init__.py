"""What third parties test their layers with: ``check_layer`` for a report, ``conformance`` for one line of pytest."""

from layerzoo.testing.conformance import CheckResult, ConformanceError, check_layer, conformance

__all__ = ["CheckResult", "ConformanceError", "check_layer", "conformance"]
