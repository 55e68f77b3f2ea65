"""The command line: commands in files by subject, the options they share, what they print.

Exit codes: 0 done; 1 a check found violations; 2 the request was wrong (unknown name, bad file, wrong option); 3 the machine or
the network said no (memory, disk, hub); 130 interrupted. Heavy imports happen inside the commands, so that help answers at once.
"""

from emolens.cli.entry import app, main

__all__ = ["app", "main"]
