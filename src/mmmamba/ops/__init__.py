"""Pure functions of the state space layers. Each has a reference, a fast twin and one dispatch."""

from mmmamba.ops.conv import causal_conv, causal_conv_step
from mmmamba.ops.kl import chunked_kl
from mmmamba.ops.layout import Layout, layout_of
from mmmamba.ops.norm import compute_dtype, gated_norm, rms_norm
from mmmamba.ops.rope import rotate
from mmmamba.ops.ssd import ssd, ssd_chunked, ssd_reference, ssd_step

__all__ = [
    "Layout",
    "causal_conv",
    "causal_conv_step",
    "chunked_kl",
    "compute_dtype",
    "gated_norm",
    "layout_of",
    "rms_norm",
    "rotate",
    "ssd",
    "ssd_chunked",
    "ssd_reference",
    "ssd_step",
]
