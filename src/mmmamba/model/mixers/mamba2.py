"""The Mamba-2 mixer that takes an attention's place: the student's mixer, as published and with our named options."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.mixers.contract import Init, Mixer, Options, Part, draw_uniform, register
from mmmamba.model.mixers.cost import WIDE, Passes
from mmmamba.model.mixers.layer_state import LayerState, Pool, PoolSpec
from mmmamba.model.plain import plain, weight_of
from mmmamba.model.rope import Rotation, inverse_frequencies
from mmmamba.model.stack import StackConfig
from mmmamba.ops import causal_conv, gated_delta, gated_norm, joined_linear, linear_wide, mixer_step, ssd, unit_norm
from mmmamba.ops.gated_delta.tuning import TUNED as DELTA_TUNED
from mmmamba.ops.packing import chunk_size
from mmmamba.ops.ssd.tuning import TUNED as SSD_TUNED

MAMBA2 = "mamba2"
GATE_GAIN = 2**-2.5  # the published gain of the gate's Xavier-uniform start
OPEN_GATE = 1.2784645  # SiLU(1.2784645) = 1
A_RANGE = (1.0, 16.0)  # of Mamba-2's usual start
CHUNK = 64  # tokens a chunk of the kernels, where they are not tuned for the head size
PARTS = 8  # that a head is worked on in, where a step has a single row


@dataclass(frozen=True, kw_only=True)
class Mamba2Options(Options):
    """The options of a Mamba-2 layer. The published mixer is this class with every default.

    Attributes:
        rule: how the state takes a token in. ``ssd`` as published: v k^T is added, as much of it as dt says.
            ``gated_delta``: what the state holds under the key gives way first, as much as a learned beta says (the
            gated delta rule, arXiv 2412.06464); it needs keys of unit length: ``qk_norm``.
        conv_kernel: width of the depthwise causal convolution over v | k | q.
        conv_activation: what follows the convolution: ``silu`` as published, or ``none``, which keeps the inherited
            attention features exactly.
        rope: rotate B (k) and C (q) after conv and activation, as the teacher's layer rotates k and q.
        qk_norm: normalise B and C of each head to unit length before the rotation.
        qkv_bias: keep the teacher's q/k/v biases (the published mixer drops them).
        gate_bias: give the gate a bias that opens it at the start (the published gate starts near zero).
        decay: how A and dt start. ``published``: A = -e and dt log-uniform in [dt_min, dt_max], drawn per head.
            ``spread``: A = -1 and dt log-spaced over the heads, so that their memories last from 1/dt_max to 1/dt_min
            tokens.
        dt_min, dt_max: range of the initial step size dt.
        norm_eps: epsilon of the per-head RMSNorm.
    """

    rule: Literal["ssd", "gated_delta"] = "ssd"
    conv_kernel: int = 2
    conv_activation: Literal["silu", "none"] = "silu"
    rope: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    gate_bias: bool = False
    decay: Literal["published", "spread"] = "published"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.rule not in ("ssd", "gated_delta"):
            raise ValueError(f"rule must be 'ssd' or 'gated_delta', got {self.rule!r}")
        if self.rule == "gated_delta" and not self.qk_norm:
            raise ValueError("rule 'gated_delta' needs keys of unit length: set qk_norm to true")
        if not 2 <= self.conv_kernel <= 4:
            raise ValueError(f"conv_kernel must be 2, 3 or 4, got {self.conv_kernel}")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise ValueError(f"dt_min ({self.dt_min}) and dt_max ({self.dt_max}) must satisfy 0 < dt_min <= dt_max")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")

    def check_init(self, init: Init) -> None:
        if init != "mimic" and self.decay != "published":
            raise ValueError(f"init {init!r} draws the decay as Mamba-2 does, not as mixer.decay has it: leave "
                             f"{self.decay!r} out")  # fmt: skip


@dataclass(frozen=True)
class MambaState(LayerState):
    """The last inputs of the convolution (s, k-1, c) and the state of the recurrence (s, h, p, n)."""

    conv: Tensor
    ssm: Tensor


class Conv(nn.Module):
    """The depthwise convolution: weight (c, k) and bias (c,)."""

    def __init__(self, channels: int, kernel: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        self.activation = activation

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """x (b, l, c) and the options of :func:`mmmamba.ops.causal_conv` → what that gives."""
        return causal_conv(x, self.weight, self.bias, activation=self.activation, **options)


class GatedNorm(nn.Module):
    """The per-head RMSNorm, weight (p,), times the SiLU of a gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate (b, l, h, p) → (b, l, h, p)."""
        return gated_norm(x, gate, self.weight, self.eps)


@register
class Mamba2(Mixer[MambaState]):
    """q, k, v as in attention; depthwise conv + activation on v | k | q; a recurrence over v, k and q with an
    input-dependent step size, SSD (x = v, B = k, C = q) or the gated delta rule; per-head RMSNorm times a SiLU gate;
    W_o.

    Follows the published modelling code (q/k/v projections, conv kernel 2, no D skip, norm before gate); see
    :class:`Mamba2Options` for what our recipes may switch on.
    """

    name, options_class = MAMBA2, Mamba2Options
    capturable = True
    parts: ClassVar = {
        # They set decays close to 1, which bfloat16 can't tell apart.
        **{name: Part(float32=True, decays=False) for name in ("A_log", "dt_bias")},
        "dt_proj": Part(),  # few rows, worked out in float32
        "beta_proj": Part(),
        "conv": Part(),
        "gate_proj": Part(matrix=True),
        "norm": Part(),
        **{name: Part(inherited=True, matrix=True) for name in ("q_proj", "k_proj", "v_proj")},
    }
    step_modules = (Conv, GatedNorm)

    options: Mamba2Options

    def __init__(self, hidden_size: int, stack: StackConfig, options: Mamba2Options) -> None:
        super().__init__(hidden_size, stack, options)
        h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
        bias = options.qkv_bias and stack.qkv_bias
        self.q_proj = nn.Linear(hidden_size, h * p, bias=bias)
        self.k_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.v_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.conv = Conv((h + 2 * g) * p, options.conv_kernel, options.conv_activation)
        self.dt_proj = nn.Linear(hidden_size, h, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        if options.rule == "gated_delta":
            self.beta_proj = nn.Linear(hidden_size, h, bias=False)
        self.norm = GatedNorm(p, options.norm_eps)
        self.gate_proj = nn.Linear(hidden_size, h * p, bias=options.gate_bias)
        self.o_proj = nn.Linear(h * p, hidden_size, bias=stack.o_bias)
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start everything that attention does not have (facts of the published seeding; options of the config)."""
        options, h = self.options, self.heads_count
        self.conv.weight.zero_()
        self.conv.weight[:, -1] = 1.0  # the current token passes through
        self.conv.bias.zero_()
        self.dt_proj.weight.zero_()
        if options.rule == "gated_delta":
            self.beta_proj.weight.zero_()  # beta is 1/2
        low, high = math.log(options.dt_min), math.log(options.dt_max)
        if options.decay == "published":
            self.A_log.fill_(1.0)
            spread = torch.rand(h, generator=generator)
        else:
            self.A_log.zero_()
            spread = torch.arange(h) / max(h - 1, 1)
        dt = torch.exp(low + spread * (high - low))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
        self.norm.weight.fill_(1.0)
        bound = GATE_GAIN * math.sqrt(6.0 / (self.gate_proj.in_features + self.gate_proj.out_features))
        noise = torch.rand(self.gate_proj.weight.shape, generator=generator)
        self.gate_proj.weight.copy_((2 * noise - 1) * bound)
        if self.gate_proj.bias is not None:
            self.gate_proj.bias.fill_(OPEN_GATE)

    def heads(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, MambaState | None]:
        """The gated heads before W_o: x (b, l, d) → (b, l, h, p), and the state if ``keep_state``."""
        h, g, p = self.heads_count, self.groups, self.head_dim
        projections = (self.v_proj, self.k_proj, self.q_proj)
        if plain(nn.Linear, *projections):
            vkq = joined_linear(x, [one.weight for one in projections], [one.bias for one in projections])
        else:
            vkq = torch.cat([one(x) for one in projections], dim=-1)
        vkq, conv_state = self.conv(
            vkq,
            initial_state=None if state is None else state.conv,
            cu_seqlens=cu_seqlens,
            return_final_state=keep_state,
            rotation=(rotation.cos, rotation.sin) if self.options.rope else None,  # it has k and q in hand
            rotate_from=g * p,
        )
        if self.options.qk_norm:  # after the rotation, which leaves lengths alone
            v, kq = vkq.split([g * p, (g + h) * p], dim=-1)
            k, q = unit_norm(kq.unflatten(-1, (g + h, p))).split([g, h], dim=-2)
        else:
            v, k, q = vkq.split([g * p, g * p, h * p], dim=-1)
            k, q = k.unflatten(-1, (g, p)), q.unflatten(-1, (h, p))
        v = v.unflatten(-1, (g, p))
        dt = self.step_size(x)
        A = -torch.exp(self.A_log.to(dt.dtype))
        carried: dict[str, Any] = {
            "initial_state": None if state is None else state.ssm,
            "cu_seqlens": cu_seqlens,
            "return_final_state": keep_state,
        }
        if self.options.rule == "gated_delta":
            y, ssm = gated_delta(v, dt, A, k, q, self.strength(x), **carried)
        else:
            y, ssm = ssd(v, dt, A, k, q, **carried)
        gate = self.gate_proj(x).unflatten(-1, (h, p))
        y = self.norm(y, gate)
        if not keep_state:
            return y, None
        assert conv_state is not None and ssm is not None
        return y, MambaState(conv_state, ssm)

    def step_size(self, x: Tensor) -> Tensor:
        """dt = softplus(W_dt x + dt_bias), (b, l, h), never below float32."""
        with torch.autocast(x.device.type, enabled=False):
            raw = _wide(self.dt_proj, x)
            return F.softplus(raw + self.dt_bias.to(raw.dtype))

    def strength(self, x: Tensor) -> Tensor:
        """beta = sigmoid(W_beta x) of the gated delta rule, (b, l, h), never below float32."""
        with torch.autocast(x.device.type, enabled=False):
            return _wide(self.beta_proj, x).sigmoid()

    def empty_state(
        self, rows: int, *, dtype: torch.dtype, wide: torch.dtype, device: torch.device | str
    ) -> MambaState:
        h, g, p, width = self.heads_count, self.groups, self.head_dim, self.options.conv_kernel - 1
        return MambaState(
            torch.zeros(rows, width, (h + 2 * g) * p, dtype=dtype, device=device),
            torch.zeros(rows, h, p, p, dtype=wide, device=device),
        )

    def step_maps(self) -> list[nn.Linear]:
        maps = [self.v_proj, self.k_proj, self.q_proj, self.gate_proj, self.dt_proj]
        return [*maps, self.beta_proj] if self.options.rule == "gated_delta" else maps

    def pool(self, spec: PoolSpec) -> MambaPool:
        return MambaPool(self, spec)

    # ------------------------------------------------------------------------------------------ training

    @classmethod
    def parts_with(cls, options: Options) -> Mapping[str, Part]:
        assert isinstance(options, Mamba2Options)
        delta = options.rule == "gated_delta"
        return {name: part for name, part in cls.parts.items() if delta or name != "beta_proj"}

    def start_from_scratch(self, generator: torch.Generator) -> None:
        """As Mamba-2's authors do (mamba_ssm/modules/mamba2.py of state-spaces/mamba).

        Projections and convolution start as PyTorch's layers do; A is uniform in [1, 16]. The norm's ones, and dt
        log-uniform in the options' range, are those of :meth:`reset_new_parameters`.
        """
        super().start_from_scratch(generator)
        for parameter in self.conv.parameters():
            draw_uniform(parameter, self.options.conv_kernel**-0.5, generator)
        draw_uniform(self.A_log, A_RANGE[1], generator, low=A_RANGE[0])
        self.A_log.data.log_()

    # ------------------------------------------------------------------------------------------ cost

    def pass_flops(self, context: float) -> float:
        chunk, p = self._kernel_chunk(), self.head_dim
        return 2 * self.heads_count * (2 * chunk * p + 2 * p * p)  # inside a chunk; into and out of the state

    def saved_bytes(self, passes: Passes, tokens: int, trained: Collection[str]) -> int:
        w, h, g, p = passes.width, self.heads_count, self.groups, self.head_dim
        heads, channels, options = h * p, (h + 2 * g) * p, self.options
        values = {"u": w * self.hidden_size, "step size": 2 * WIDE * h}  # softplus's input, and its result
        if w != WIDE and not passes.kernels:
            values["u, float32"] = WIDE * self.hidden_size * len({"dt_proj", "beta_proj"} & {*trained})
        if options.qk_norm:
            values["unit keys and queries"] = (w * p + (0 if passes.kernels else 2 * WIDE)) * (h + g)
        if options.rule == "gated_delta":
            values["strength"] = WIDE * h
            if passes.kernels:
                values["decays and inverses"] = h * (WIDE + w * self._kernel_chunk())
        if passes.kernels:
            values["convolution and recurrence"] = 2 * w * channels  # the inputs of each
            values["norm and gate"] = 2 * w * heads
        else:
            values["convolution"] = w * channels * (options.conv_kernel + (options.conv_activation == "silu"))
            values["norm and gate"] = 5 * w * heads
        return tokens * sum(values.values()) + (0 if passes.kernels else self._saved_by_chunks(tokens))

    def _saved_by_chunks(self, tokens: int) -> int:
        """What the recurrence keeps of a sequence in PyTorch's operators, by whole chunks."""
        h, g, p = self.heads_count, self.groups, self.head_dim
        q = chunk_size(tokens, p)
        if self.options.rule == "gated_delta":
            inside = 6 * h * q + 10 * h * p + 3 * g * p + 5 * h  # products and system; its sides, keys, queries
            between = h * p + 2 * h * p * p // q  # queries as decayed; the states that enter the chunks
        else:
            inside = 4 * h * q + 2 * h * p + 4 * g * p + 6 * h  # scores, decays, weights; C; weighted x; B, x
            between = 2 * h * p + 2 * h * p * p // q  # C as read and as decayed; the states that enter the chunks
        return WIDE * -(-tokens // q) * q * (inside + (between if tokens > q else 0))

    def backward_bytes(self, passes: Passes, tokens: int) -> int:
        """Gradients of the recurrence's inputs, and of the states at the borders of its chunks."""
        h, p = self.heads_count, self.head_dim
        inputs = super().backward_bytes(passes, tokens)
        if not passes.kernels:
            return inputs + tokens * WIDE * 2 * h * chunk_size(tokens, p)
        if self.options.rule == "gated_delta":  # what is written, its gradient; dv and dk head by head
            inputs += tokens * passes.width * 4 * h * p
        return inputs + 2 * passes.width * -(-tokens // self._kernel_chunk()) * h * p * p

    def _kernel_chunk(self) -> int:
        """Tokens a chunk of the recurrence's kernels in bfloat16."""
        tuned = (DELTA_TUNED if self.options.rule == "gated_delta" else SSD_TUNED).get((self.head_dim, 2))
        return CHUNK if tuned is None else tuned.chunk


def _wide(projection: nn.Linear, x: Tensor) -> Tensor:
    """W·x in float32 at least. A module that has to be called works in its weight's dtype; its result is widened."""
    if plain(nn.Linear, projection):
        return linear_wide(x, projection.weight)
    weight = weight_of(projection)
    if weight is not None and weight.is_floating_point():
        x = x.to(weight.dtype)
    y: Tensor = projection(x)
    return y.to(torch.promote_types(y.dtype, torch.float32))


class MambaPool(Pool[MambaState]):
    """The states of a pool: conv (slots, k-1, c) and ssm (slots, h, p, n). One kernel steps them in place."""

    mixer: Mamba2

    def __init__(self, mixer: Mamba2, spec: PoolSpec) -> None:
        options, stack = mixer.options, mixer.stack
        h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
        state = mixer.empty_state(spec.slots, dtype=spec.dtype, wide=spec.wide, device=spec.device)
        self.mixer, self.conv, self.ssm, self.seed = mixer, state.conv, state.ssm, spec.seed
        self.sizes = [(h + 2 * g) * p, h * p, h, *([h] if options.rule == "gated_delta" else [])]
        wide = torch.promote_types(spec.dtype, torch.float32)
        self.squares = torch.empty(1, h, PARTS, dtype=wide, device=spec.device)
        self.frequencies = inverse_frequencies(stack, spec.max_length, spec.device, wide) if options.rope else None

    def tensors(self) -> list[Tensor]:
        return [self.conv, self.ssm]

    def export(self, slots: Tensor, counts: Tensor) -> MambaState:
        wide = torch.promote_types(self.ssm.dtype, torch.float32)
        return MambaState(self.conv[slots], self.ssm[slots].to(wide))

    def heads(self, x: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        mixer, eps = self.mixer, self.mixer.options.norm_eps
        vkq, gate, dt, *beta = x.split(self.sizes, dim=-1)
        # A single row's heads are worked on in parts, side by side: the norm waits for the map that reads them all.
        squares = self.squares if len(vkq) == 1 else None
        heads = mixer_step(
            vkq,
            gate,
            dt,
            conv_weight=mixer.conv.weight,
            conv_bias=mixer.conv.bias,
            dt_bias=mixer.dt_bias,
            A_log=mixer.A_log,
            norm_weight=mixer.norm.weight,
            conv_state=self.conv,
            ssm_state=self.ssm,
            slots=slots,
            eps=eps,
            activation=mixer.options.conv_activation,
            qk_norm=mixer.options.qk_norm,
            positions=None if self.frequencies is None else at,
            frequencies=self.frequencies,
            seed=self.seed,
            squares=squares,
            beta_raw=beta[0] if beta else None,
            chained=True,
        )
        return {"x": heads} if squares is None else {"x": heads, "squares": squares, "eps": eps}
