"""Pure functions of the state space layers: each a PyTorch twin, Triton kernels, and one dispatch by device."""

from mmmamba.ops.attend import attend_step, attend_step_torch
from mmmamba.ops.begin import begin_step, begin_step_torch
from mmmamba.ops.conv import causal_conv, causal_conv_step, causal_conv_torch
from mmmamba.ops.delta import gated_delta, gated_delta_chunked, gated_delta_reference, gated_delta_step
from mmmamba.ops.error import squared_error, squared_error_torch
from mmmamba.ops.kl import chunked_kl, chunked_kl_torch
from mmmamba.ops.layout import Layout, layout_of
from mmmamba.ops.linear import (
    joined_linear,
    linear_add,
    linear_step,
    linear_step_torch,
    linear_steps,
    linear_wide,
    quantize_rows,
)
from mmmamba.ops.norm import (
    compute_dtype,
    gated_norm,
    gated_norm_torch,
    rms_norm,
    rms_norm_torch,
    unit_norm,
    unit_norm_torch,
)
from mmmamba.ops.pick import pick_greedy, pick_greedy_torch
from mmmamba.ops.rope import rotate, rotate_torch
from mmmamba.ops.ssd import ssd, ssd_chunked, ssd_reference, ssd_step
from mmmamba.ops.step import mixer_step, mixer_step_torch
from mmmamba.ops.swiglu import swiglu, swiglu_torch

__all__ = [
    "Layout",
    "attend_step",
    "attend_step_torch",
    "begin_step",
    "begin_step_torch",
    "causal_conv",
    "causal_conv_step",
    "causal_conv_torch",
    "chunked_kl",
    "chunked_kl_torch",
    "compute_dtype",
    "gated_delta",
    "gated_delta_chunked",
    "gated_delta_reference",
    "gated_delta_step",
    "gated_norm",
    "gated_norm_torch",
    "joined_linear",
    "layout_of",
    "linear_add",
    "linear_step",
    "linear_step_torch",
    "linear_steps",
    "linear_wide",
    "mixer_step",
    "mixer_step_torch",
    "pick_greedy",
    "pick_greedy_torch",
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
