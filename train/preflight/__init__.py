"""What can be known of a run before a minute of GPU quota is spent; see check.py."""

from moeconv_train.preflight.check import preflight
from moeconv_train.preflight.report import Finding, MemoryReport, MemoryRow, PreflightReport
from moeconv_train.preflight.settings import RunSettings
from moeconv_train.preflight.target import LOCAL, T4X2, Target

__all__ = [
    "LOCAL",
    "T4X2",
    "Finding",
    "MemoryReport",
    "MemoryRow",
    "PreflightReport",
    "RunSettings",
    "Target",
    "preflight",
]
