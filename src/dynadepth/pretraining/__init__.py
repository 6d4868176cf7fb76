"""Training from scratch, or on, within a FLOP budget: corpus, exact FLOPs, trainer, held-out loss."""

from dynadepth.pretraining.recipe import PretrainRecipe, load_recipe
from dynadepth.pretraining.run import PretrainResult, pretrain

__all__ = ["PretrainRecipe", "PretrainResult", "load_recipe", "pretrain"]
