"""The frontier: every method at every budget, measured alike, one file a cell, resumed where it was interrupted.

`run_frontier` tunes, scores and times; what it leaves in its folder is all that `report` needs for figures and a page.
"""

from dynadepth.frontier.rows import ROWS, Row, row_named
from dynadepth.frontier.run import Teller, run_frontier
from dynadepth.frontier.settings import BUDGETS, Settings

__all__ = ["BUDGETS", "ROWS", "Row", "Settings", "Teller", "row_named", "run_frontier"]
