"""Fixtures of the tests and of the examples in docstrings: see tests/toys.py."""

pytest_plugins = ("toys",)
