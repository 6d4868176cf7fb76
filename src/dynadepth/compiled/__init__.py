"""A faster decode of the same model: `compile_model`, `uncompile`, `is_compiled`; see `model`."""

from dynadepth.compiled.model import compile_model, is_compiled, uncompile

__all__ = ["compile_model", "is_compiled", "uncompile"]
