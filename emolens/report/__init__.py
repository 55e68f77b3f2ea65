"""Lay out what a study found: the page, its figures, coloured tokens."""

from emolens.report.page import write_report
from emolens.report.tokens import explore_tokens

__all__ = ["explore_tokens", "write_report"]
