"""Causal softmax attention with grouped key/value heads: the teacher's mixer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.model.mixers.contract import Mixer, Options, Part, other_shapes, register
from mmmamba.model.mixers.cost import WIDE, Passes, StateBytes
from mmmamba.model.mixers.kv_cache import GrowingKV, KVPool, KVState
from mmmamba.model.mixers.layer_state import PoolSpec
from mmmamba.model.mixers.softmax import LONG, attend, merge
from mmmamba.model.plain import plain
from mmmamba.model.rope import Rotation
from mmmamba.model.stack import StackConfig
from mmmamba.ops import Layout, compute_dtype, layout_of, rotate
from mmmamba.ops.dispatch import why_not

# A packed row is attended as a right-padded rectangle while that wastes at most this factor, else one by one.
MAX_PADDING = 2.0

ATTENTION: Final = "attention"


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """The options of a softmax layer: it has none."""

    kind: Literal["attention"] = ATTENTION


@register
class Attention(Mixer[KVState | GrowingKV]):
    """Multi-head causal attention, RoPE on queries and keys, g key/value heads shared by h query heads."""

    name, options_class = ATTENTION, AttentionOptions
    seeded, grows, attends, capturable = False, True, True, True
    parts: ClassVar = {name: Part(matrix=True) for name in ("q_proj", "k_proj", "v_proj")}

    def __init__(self, hidden_size: int, stack: StackConfig, options: AttentionOptions) -> None:
        super().__init__(hidden_size, stack, options)
        self.q_proj = nn.Linear(hidden_size, self.heads_count * self.head_dim, bias=stack.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.groups * self.head_dim, bias=stack.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.groups * self.head_dim, bias=stack.qkv_bias)
        self.o_proj = nn.Linear(self.heads_count * self.head_dim, hidden_size, bias=stack.o_bias)
        self.project = project

    def heads(
        self,
        x: Tensor,
        state: KVState | GrowingKV | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, KVState | GrowingKV | None]:
        """The heads' outputs before W_o: x (b, l, d) → (b, l, h, p), and the cache if ``keep_state``."""
        q, k, v = self.qkv(x, rotation)
        if state is None:
            y = _causal(q, k, v) if cu_seqlens is None else _packed(q, k, v, cu_seqlens)
            return y, _cache(k, v, cu_seqlens) if keep_state else None
        if isinstance(state, GrowingKV):
            if cu_seqlens is not None and len(state.k) > 1:  # a packed row of one sequence is that sequence
                raise ValueError("caches that grow in place take no packed rows of several sequences")
            return _grown(q, k, v, state), state
        y, new = _continued(q, k, v, state, cu_seqlens)
        return y, new if keep_state else None

    def qkv(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (b, l, h, p) and keys (b, l, g, p), and values (b, l, g, p), of x (b, l, d)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if plain(nn.Linear, *projections):
            weights, biases = [one.weight for one in projections], [one.bias for one in projections]
            return self.project(x, rotation.cos, rotation.sin, self.head_dim, *weights, *biases)
        q, k, v = (one(x).unflatten(-1, (-1, self.head_dim)) for one in projections)
        return rotation(q), rotation(k), v

    def queries_and_keys(
        self, x: Tensor, rotation: Rotation, state: KVState | GrowingKV | None
    ) -> tuple[Tensor, Tensor]:
        q, k = (rotation(project(x).unflatten(-1, (-1, self.head_dim))) for project in (self.q_proj, self.k_proj))
        return q, k if state is None else torch.cat([state.k.to(k.dtype), k], 1)

    def compile_parts(self) -> None:
        self.project = _compiled_project()

    def empty_state(self, rows: int, *, dtype: torch.dtype, wide: torch.dtype, device: torch.device | str) -> KVState:
        k, v = (torch.zeros(rows, 0, self.groups, self.head_dim, dtype=dtype, device=device) for _ in range(2))
        return KVState(k, v, torch.ones(rows, 0, dtype=torch.bool, device=device))

    def misfits(self, state: KVState | GrowingKV, seen: int) -> Iterator[tuple[str, str]]:
        assert isinstance(state, KVState)
        length = state.filled.shape[-1] if state.filled.ndim else 0
        heads = (1, length, self.groups, self.head_dim)
        yield from other_shapes(state, {"k": heads, "v": heads, "filled": (1, length)})
        if (filled := int(state.filled.sum())) != seen:
            yield "filled", f"counts {filled:,} tokens, but the sequence has seen {seen:,}"

    def step_maps(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def pool(self, spec: PoolSpec) -> KVPool:
        return KVPool(self.stack, spec)

    def step_graphable(self) -> bool:
        return why_not(self.o_proj.weight, head_dim=self.head_dim) is None

    def state_bytes(self, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> StateBytes:
        return StateBytes(recurrent=0, per_token=dtype.itemsize * 2 * self.groups * self.head_dim)

    def step_flops(self, context: float) -> float:
        return 4 * self.heads_count * self.head_dim * context  # a product with each key and each value

    def pass_traffic(self) -> float:
        return 0

    def saved_bytes(self, passes: Passes, tokens: int, trained: Collection[str]) -> int:
        """The kernels keep q, k, v and y; PyTorch's operators q, k, v padded too. A trained mixer keeps its input."""
        h, g, p = self.heads_count, self.groups, self.head_dim
        rows = 2 * h * p + 2 * g * p if passes.kernels else 3 * h * p + 4 * g * p
        rows += self.hidden_size if trained else 0
        return tokens * (passes.width * rows + WIDE * h)

    def keeps_heads(self, passes: Passes) -> bool:
        return passes.kernels


def project(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int,
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotated queries (b, l, h, p) and keys (b, l, g, p), and values (b, l, g, p), of x (b, l, d).

    A pure function of tensors, so that one compilation serves every layer of a shape.
    """
    queries, keys, values = (
        F.linear(x, weight, bias).unflatten(-1, (-1, head_dim))
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    )
    return rotate(queries, cos, sin), rotate(keys, cos, sin), values


@functools.cache
def _compiled_project() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(project, dynamic=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA over (b, l, heads, p) tensors, groups shared by the query heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[1] * k.shape[1] >= LONG and (part := attend(q, k, v, causal=True)) is not None:
        return part.y
    return _sdpa(q, k, v, causal=True)


@functools.cache
def _varlen() -> Callable[..., Any]:
    """PyTorch's attention over a packed row, for query heads that share keys.

    It is imported when it is first used: it brings the compiler, which takes as long to import as all the rest.
    """
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes shared keys as they are, later versions want to be told.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if told else varlen_attn


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention inside each sequence of a packed row (1, total, heads, p); no block mask is ever made."""
    layout = layout_of(cu_seqlens)
    dtype = compute_dtype(q)
    if q.is_cuda and dtype in (torch.bfloat16, torch.float16):
        q1, k1, v1 = q[0].to(dtype), k[0].to(dtype), v[0].to(dtype)
        n = layout.longest
        return cast(Tensor, _varlen()(q1, k1, v1, cu_seqlens, cu_seqlens, n, n, window_size=(-1, 0)))[None]
    if layout.longest * layout.sequences <= MAX_PADDING * layout.total:
        return layout.unpad(_causal(*(layout.pad(t[0]) for t in (q, k, v))))[None]
    parts = zip(*(t.split(layout.lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_causal(*part) for part in parts], dim=1)


def _cache(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> KVState:
    if cu_seqlens is None:
        return KVState(k, v, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device))
    layout = layout_of(cu_seqlens)
    return KVState(layout.pad(k[0]), layout.pad(v[0]), _filled(layout))


def _filled(layout: Layout) -> Tensor:
    return torch.arange(layout.longest, device=layout.device) < layout.sizes[:, None]


def _continued(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, KVState]:
    """New tokens of s sequences after their caches; the mask is (s, 1, new, cached + new)."""
    layout = None if cu_seqlens is None else layout_of(cu_seqlens)
    if layout is not None:
        q, k, v = (layout.pad(t[0]) for t in (q, k, v))
    length, cached = q.shape[1], state.k.shape[1]
    new = _cache(k, v, None) if layout is None else KVState(k, v, _filled(layout))
    joined = KVState(
        torch.cat([state.k, new.k.to(state.k.dtype)], 1),
        torch.cat([state.v, new.v.to(state.v.dtype)], 1),
        torch.cat([state.filled, new.filled], 1),
    )
    order = torch.arange(cached + length, device=q.device) - cached
    causal = order <= torch.arange(length, device=q.device)[:, None]  # (new, cached + new)
    mask = (causal & joined.filled[:, None]) | (order == torch.arange(length, device=q.device)[:, None])
    y = _sdpa(q, joined.k.to(q.dtype), joined.v.to(q.dtype), mask=mask[:, None])
    if layout is not None:
        y = layout.unpad(y)[None]
    return y, joined


def _grown(q: Tensor, k: Tensor, v: Tensor, cache: GrowingKV) -> Tensor:
    """New tokens of s sequences without gaps, after their cache, to which they are added."""
    past, length = cache.length, q.shape[1]
    cache.append(k, v)
    # A part's log-sum-exp has no gradient.
    before = None if torch.is_grad_enabled() else attend(q, *cache.read(end=past), causal=False)
    if before is not None and (among := attend(q, k, v, causal=True)) is not None:
        return merge(before, among).y
    order = torch.arange(past + length, device=q.device) - past
    mask = order <= torch.arange(length, device=q.device)[:, None]  # (new, cached + new)
    keys, values = cache.read()
    return _sdpa(q, keys.to(q.dtype), values.to(q.dtype), mask=mask)
