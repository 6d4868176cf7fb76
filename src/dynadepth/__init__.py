"""Dynamic depth for pretrained transformers: routers that decide, per input, which sublayers run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynadepth.benchmark.speedup import set_speedup
    from dynadepth.compiled import compile_model as compile
    from dynadepth.compiled import is_compiled, uncompile
    from dynadepth.dial import set_budget, set_control
    from dynadepth.methods import (
        DepthConfig,
        DrLLMConfig,
        IntegratedMoDEConfig,
        MindSkipConfig,
        MoDConfig,
        StagedMoDEConfig,
        StaticConfig,
    )
    from dynadepth.model import (
        attach,
        detach,
        disabled,
        expert_choice,
        fixed_routes,
        load,
        save,
    )
    from dynadepth.routed import is_attached, routing_of
    from dynadepth.routing.decision import KeepRatio, Site
    from dynadepth.routing.recorder import recording

_WHERE = {
    "DepthConfig": "methods",
    "DrLLMConfig": "methods",
    "MindSkipConfig": "methods",
    "IntegratedMoDEConfig": "methods",
    "MoDConfig": "methods",
    "StagedMoDEConfig": "methods",
    "StaticConfig": "methods",
    "KeepRatio": "routing.decision",
    "Site": "routing.decision",
    "recording": "routing.recorder",
    "attach": "model",
    "compile": "compiled",
    "detach": "model",
    "disabled": "model",
    "expert_choice": "model",
    "fixed_routes": "model",
    "is_attached": "routed",
    "is_compiled": "compiled",
    "load": "model",
    "routing_of": "routed",
    "save": "model",
    "set_budget": "dial",
    "set_control": "dial",
    "set_speedup": "benchmark.speedup",
    "uncompile": "compiled",
}
_CALLED = {"compile": "compile_model"}
"""Names that are others where they are defined."""

__all__ = [
    "DepthConfig",
    "DrLLMConfig",
    "IntegratedMoDEConfig",
    "KeepRatio",
    "MindSkipConfig",
    "MoDConfig",
    "Site",
    "StagedMoDEConfig",
    "StaticConfig",
    "attach",
    "compile",
    "detach",
    "disabled",
    "expert_choice",
    "fixed_routes",
    "is_attached",
    "is_compiled",
    "load",
    "recording",
    "routing_of",
    "save",
    "set_budget",
    "set_control",
    "set_speedup",
    "uncompile",
]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers at the first use of a name, not at `import dynadepth`."""
    if name not in _WHERE:
        raise AttributeError(f"module 'dynadepth' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dynadepth.{_WHERE[name]}"), _CALLED.get(name, name))


def __dir__() -> list[str]:
    return __all__
