"""Fixtures of the tests and of the examples in docstrings (tests/toys.py), under checks of every annotation (tests/checked.py)."""

pytest_plugins = ("checked", "toys")
