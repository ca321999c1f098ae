"""Audit reports: what a corpus shows, in words and numbers, as JSON and HTML, signed and verifiable."""

from assay.report.records import Excerpt, InputFile, RejectReason
from assay.report.report import Report
from assay.report.signature import Verification, verify

__all__ = ["Excerpt", "InputFile", "RejectReason", "Report", "Verification", "verify"]
