"""Write one page from the rows of runs."""

from hf_equiv.report.page import Report, make_report

__all__ = ["Report", "make_report"]
