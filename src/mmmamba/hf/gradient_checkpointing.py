"""Layers for transformers' gradient checkpointing: activations are dropped, then computed again."""

from __future__ import annotations

from transformers.modeling_layers import GradientCheckpointingLayer

from mmmamba.model.layer import Layer
from mmmamba.model.model import Model


class CheckpointedLayer(GradientCheckpointingLayer, Layer):
    """A layer that transformers may run a second time, in the backward pass."""


class CheckpointedModel(Model):
    """A network of such layers."""

    layer_class = CheckpointedLayer
