"""Slow and obvious versions of what emolens computes quickly. Only tests import them."""
