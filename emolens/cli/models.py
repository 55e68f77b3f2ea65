"""`emolens models`: what loads by a short name."""

from __future__ import annotations


def models() -> None:
    """List the models known by a short name, with what they need.

    Example: emolens models
    """
    from emolens.cli.printing import print_catalogue
    from emolens.models.catalogue import CATALOGUE

    print_catalogue(CATALOGUE.values())
