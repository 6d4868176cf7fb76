"""Families of sizes and variants trained at equal FLOPs: which shape is the best use of a budget?"""

from dynadepth.isoflop.recipe import IsoflopRecipe, load_recipe
from dynadepth.isoflop.run import run_isoflop

__all__ = ["IsoflopRecipe", "load_recipe", "run_isoflop"]
