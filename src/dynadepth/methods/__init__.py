"""One file per method: its configuration, its router and its auxiliary loss. The configuration's type is the method."""

from dynadepth.methods.config import DepthConfig, config_from_dict
from dynadepth.methods.drllm import DrLLMConfig
from dynadepth.methods.mindskip import MindSkipConfig
from dynadepth.methods.mod import MoDConfig
from dynadepth.methods.mode import IntegratedMoDEConfig, StagedMoDEConfig
from dynadepth.methods.static import StaticConfig

__all__ = [
    "DepthConfig",
    "DrLLMConfig",
    "IntegratedMoDEConfig",
    "MindSkipConfig",
    "MoDConfig",
    "StagedMoDEConfig",
    "StaticConfig",
    "config_from_dict",
]
