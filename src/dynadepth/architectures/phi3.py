"""Phi-3: queries, keys and values come from one fused matrix."""

from dynadepth.architectures.spec import ArchitectureSpec

PHI3 = ArchitectureSpec(
    model_types=("phi3",), projector=None, note="queries, keys and values come from one fused matrix"
)
