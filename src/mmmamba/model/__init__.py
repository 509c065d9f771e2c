"""What the network is: plain modules, no file formats, no process groups."""

from mmmamba.model.config import ATTENTION, MAMBA2, MixerConfig, ModelConfig, RopeScaling, StackConfig, VisionConfig
from mmmamba.model.model import Model, Output, initialise
from mmmamba.model.state import State

__all__ = [
    "ATTENTION",
    "MAMBA2",
    "MixerConfig",
    "Model",
    "ModelConfig",
    "Output",
    "RopeScaling",
    "StackConfig",
    "State",
    "VisionConfig",
    "initialise",
]
