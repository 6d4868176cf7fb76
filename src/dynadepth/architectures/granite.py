"""Granite: what a sublayer adds to the residual stream is scaled."""

from dynadepth.architectures.spec import ArchitectureSpec

GRANITE = ArchitectureSpec(model_types=("granite",), residual_scale="residual_multiplier")
