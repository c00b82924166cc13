"""State-space layers."""

from layerzoo.nn.ssm.outliers import OutlierReport, outlier_channels

__all__ = ["OutlierReport", "outlier_channels"]
