"""Architectures as data: where a decoder layer keeps its attention, MLP and norms, and how its residual is formed.

A family that differs is one file in this package that defines a module-level `ArchitectureSpec`; it is found by its
`model_types`. Every other family gets `STANDARD`, and the probe at `attach` proves whether that is right.
"""

from dynadepth.architectures.spec import (
    STANDARD,
    ArchitectureSpec,
    decoder_layers,
    decoder_of,
    positions_of,
    project_kv,
    spec_for,
    text_config,
)

__all__ = [
    "STANDARD",
    "ArchitectureSpec",
    "decoder_layers",
    "decoder_of",
    "positions_of",
    "project_kv",
    "spec_for",
    "text_config",
]
