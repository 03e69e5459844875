"""A run on one page of HTML, to keep and to send."""

from pyvizllm.report.page import render, write_report

__all__ = ["render", "write_report"]
