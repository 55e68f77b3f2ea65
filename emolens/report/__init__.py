"""Lay out what a study found: the page, its figures, coloured tokens; and the two pictures of directions."""

from emolens.experiments.drawing import circumplex, cosine_matrix
from emolens.report.page import section, write_report
from emolens.report.tokens import explore_tokens

__all__ = ["circumplex", "cosine_matrix", "explore_tokens", "section", "write_report"]
