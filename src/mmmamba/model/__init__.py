"""What the network is: plain modules, no file formats, no process groups."""

from mmmamba.model.config import ModelConfig, VisionConfig
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options
from mmmamba.model.model import Model, Output, initialise
from mmmamba.model.stack import RopeScaling, StackConfig
from mmmamba.model.state import State

__all__ = [
    "ATTENTION",
    "MAMBA2",
    "Mamba2Options",
    "Model",
    "ModelConfig",
    "Output",
    "RopeScaling",
    "StackConfig",
    "State",
    "VisionConfig",
    "initialise",
]
