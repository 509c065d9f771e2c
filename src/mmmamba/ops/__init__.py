"""Pure functions of the state space layers: a folder for each, with its PyTorch twin and its Triton kernels.

The functions below have the names of their folders in some cases: ``from mmmamba.ops import ssd`` gives the function,
and ``from mmmamba.ops.ssd import …`` what else the folder holds.
"""

from mmmamba.ops.attention import attention_step, attention_step_torch
from mmmamba.ops.autocast import compute_dtype
from mmmamba.ops.causal_conv import causal_conv, causal_conv_step, causal_conv_torch
from mmmamba.ops.embedding import embed_step, embed_step_torch
from mmmamba.ops.gated_delta import gated_delta, gated_delta_chunked, gated_delta_reference, gated_delta_step
from mmmamba.ops.gated_norm import gated_norm, gated_norm_torch
from mmmamba.ops.greedy import greedy_tokens, greedy_tokens_torch
from mmmamba.ops.kl import chunked_kl, chunked_kl_torch
from mmmamba.ops.linear import (
    joined_linear,
    linear_add,
    linear_step,
    linear_step_torch,
    linear_steps,
    linear_wide,
    quantize_rows,
)
from mmmamba.ops.mixer_step import mixer_step, mixer_step_torch
from mmmamba.ops.norm import rms_norm, rms_norm_torch, unit_norm, unit_norm_torch
from mmmamba.ops.packing import Layout, layout_of
from mmmamba.ops.rotary import rotate, rotate_torch
from mmmamba.ops.squared_error import squared_error, squared_error_torch
from mmmamba.ops.ssd import ssd, ssd_chunked, ssd_reference, ssd_step
from mmmamba.ops.swiglu import swiglu, swiglu_torch

__all__ = [
    "Layout",
    "attention_step",
    "attention_step_torch",
    "causal_conv",
    "causal_conv_step",
    "causal_conv_torch",
    "chunked_kl",
    "chunked_kl_torch",
    "compute_dtype",
    "embed_step",
    "embed_step_torch",
    "gated_delta",
    "gated_delta_chunked",
    "gated_delta_reference",
    "gated_delta_step",
    "gated_norm",
    "gated_norm_torch",
    "greedy_tokens",
    "greedy_tokens_torch",
    "joined_linear",
    "layout_of",
    "linear_add",
    "linear_step",
    "linear_step_torch",
    "linear_steps",
    "linear_wide",
    "mixer_step",
    "mixer_step_torch",
    "quantize_rows",
    "rms_norm",
    "rms_norm_torch",
    "rotate",
    "rotate_torch",
    "squared_error",
    "squared_error_torch",
    "ssd",
    "ssd_chunked",
    "ssd_reference",
    "ssd_step",
    "swiglu",
    "swiglu_torch",
    "unit_norm",
    "unit_norm_torch",
]
