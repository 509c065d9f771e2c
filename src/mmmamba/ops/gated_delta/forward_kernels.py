"""Kernels of the forward pass: the triangular systems of all chunks, and the walks through a sequence's chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from mmmamba.ops.chunk_kernels import LOG2_E, load_rows, locate


@triton.jit
def _substitute(gram, strength, decay, SIZE: tl.constexpr):
    """(I + L)^-1 of a diagonal block from its k_i.k_j, by forward substitution."""
    at = tl.arange(0, SIZE)
    # L transposed (the k_i.k_j are symmetric), so that a row of it comes as a column, which scales rows.
    lower = gram * tl.exp2(tl.where(at[:, None] < at[None, :], decay[None, :] - decay[:, None], float("-inf")))
    lower *= strength[None, :]
    inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    for i in range(1, SIZE):
        row = tl.sum(tl.where(at[None, :] == i, lower, 0.0), 1)
        known = tl.sum(row[:, None] * inverse, 0)
        inverse -= tl.where(at[:, None] == i, known[None, :], 0.0)
    return inverse


@triton.jit
def _times(a, b, ACCURATE: tl.constexpr):
    return tl.dot(a, b, input_precision=ACCURATE)


@triton.jit
def _block(k, k_token, dt, dt_token, beta, beta_token, token, left, rate, before, at_n, FROM: tl.constexpr,
           SIZE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Rows FROM … of a chunk: their keys, strengths and inclusive log2 decays, ``before`` being the decay so far."""
    at = FROM + tl.arange(0, SIZE)
    inside = at < left
    change = tl.load(dt + at * dt_token, mask=inside, other=0.0) * rate
    strength = tl.load(beta + at * beta_token, mask=inside, other=0.0)
    ks = load_rows(k, token, k_token, at, at_n, inside).to(DOT)
    return ks, strength, tl.cumsum(change, 0) + before, before + tl.sum(change, 0)


@triton.jit
def _below(ks, strength, decay, earlier, earlier_decay, PRECISION: tl.constexpr):
    """The block of L between rows and columns of two blocks."""
    gram = tl.dot(ks, tl.trans(earlier), input_precision=PRECISION)
    return gram * tl.exp2(decay[:, None] - earlier_decay[None, :]) * strength[:, None]


@triton.jit(do_not_specialize=["length"])
def prepare_kernel(
    k, k_token, k_head, dt, dt_token, dt_head, beta, beta_token, beta_head, A, decays, inverses, table, length, heads,
    ratio,
    N: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """Programs (chunk × head): inclusive log2 decays (c, h, q), flat after the end, and T (c, h, q, q)."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    _row, first, _last, start, stop = locate(table, chunk, length, CHUNK)
    if stop == start:
        return
    SIZE: tl.constexpr = 16
    at, at_n = tl.arange(0, SIZE), tl.arange(0, N)
    token = start + (chunk - first) * CHUNK
    left = tl.minimum(stop - token, CHUNK).to(tl.int32)
    rate = tl.load(A + head) * LOG2_E
    dt += token * dt_token + head * dt_head
    beta += token * beta_token + head * beta_head
    k += (head // ratio) * k_head
    here = chunk.to(tl.int64) * heads + head
    decays += here * CHUNK
    inverses += here * CHUNK * CHUNK
    corner = at[:, None] * CHUNK + at[None, :]
    nothing = tl.zeros([SIZE, SIZE], tl.float32)

    k0, b0, a0, so_far = _block(k, k_token, dt, dt_token, beta, beta_token, token, left, rate, 0.0, at_n, 0, SIZE, DOT)
    k1, b1, a1, so_far = _block(
        k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 16, SIZE, DOT
    )  # fmt: skip
    tl.store(decays + at, a0)
    tl.store(decays + 16 + at, a1)
    t00 = _substitute(tl.dot(k0, tl.trans(k0), input_precision=PRECISION), b0, a0, SIZE)
    t11 = _substitute(tl.dot(k1, tl.trans(k1), input_precision=PRECISION), b1, a1, SIZE)
    t10 = -_times(t11, _times(_below(k1, b1, a1, k0, a0, PRECISION), t00, ACCURATE), ACCURATE)
    tl.store(inverses + corner, t00)
    tl.store(inverses + corner + 16, nothing)
    tl.store(inverses + corner + 16 * CHUNK, t10)
    tl.store(inverses + corner + 16 * CHUNK + 16, t11)
    if CHUNK == 64:
        k2, b2, a2, so_far = _block(
            k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 32, SIZE, DOT
        )  # fmt: skip
        k3, b3, a3, so_far = _block(
            k, k_token, dt, dt_token, beta, beta_token, token, left, rate, so_far, at_n, 48, SIZE, DOT
        )  # fmt: skip
        tl.store(decays + 32 + at, a2)
        tl.store(decays + 48 + at, a3)
        t22 = _substitute(tl.dot(k2, tl.trans(k2), input_precision=PRECISION), b2, a2, SIZE)
        t33 = _substitute(tl.dot(k3, tl.trans(k3), input_precision=PRECISION), b3, a3, SIZE)
        t32 = -_times(t33, _times(_below(k3, b3, a3, k2, a2, PRECISION), t22, ACCURATE), ACCURATE)
        # Both halves are done: what lies below is -T_lower L T_upper, in blocks.
        l20, l21 = _below(k2, b2, a2, k0, a0, PRECISION), _below(k2, b2, a2, k1, a1, PRECISION)
        l30, l31 = _below(k3, b3, a3, k0, a0, PRECISION), _below(k3, b3, a3, k1, a1, PRECISION)
        y20 = _times(l20, t00, ACCURATE) + _times(l21, t10, ACCURATE)
        y30 = _times(l30, t00, ACCURATE) + _times(l31, t10, ACCURATE)
        y21, y31 = _times(l21, t11, ACCURATE), _times(l31, t11, ACCURATE)
        inverses += corner
        tl.store(inverses + 32, nothing)
        tl.store(inverses + 48, nothing)
        tl.store(inverses + 16 * CHUNK + 32, nothing)
        tl.store(inverses + 16 * CHUNK + 48, nothing)
        tl.store(inverses + 32 * CHUNK + 48, nothing)
        tl.store(inverses + 32 * CHUNK, -_times(t22, y20, ACCURATE))
        tl.store(inverses + 32 * CHUNK + 16, -_times(t22, y21, ACCURATE))
        tl.store(inverses + 32 * CHUNK + 32, t22)
        tl.store(inverses + 48 * CHUNK, -_times(t32, y20, ACCURATE) - _times(t33, y30, ACCURATE))
        tl.store(inverses + 48 * CHUNK + 16, -_times(t32, y21, ACCURATE) - _times(t33, y31, ACCURATE))
        tl.store(inverses + 48 * CHUNK + 32, t32)
        tl.store(inverses + 48 * CHUNK + 48, t33)


@triton.jit
def locate_segment(table, begins, program, length, per, CHUNK: tl.constexpr):
    """Of the program's segment: its first chunk, or -1 if it has none, and which chunk of the sequence that is.

    And of the sequence: its row, its first token, the token after it, and how many chunks it has.
    """
    if table is None:
        several = tl.maximum(tl.cdiv(tl.maximum(tl.cdiv(length, CHUNK), 1), per), 1)  # segments of a row
        chunk = program // several * tl.maximum(tl.cdiv(length, CHUNK), 1) + program % several * per
    else:
        chunk = tl.load(begins + program)
    row, first, _last, start, stop = locate(table, tl.maximum(chunk, 0), length, CHUNK)
    return chunk, chunk - first, row, start, stop, tl.cdiv(stop - start, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["length", "per"])
def states_kernel(
    v, v_token, v_head, k, k_token, k_head, q, q_token, q_head, beta, beta_token, beta_head, decays, inverses,
    y, initial, final, kept, writes, added, moves, table, begins, length, heads, ratio, per,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Programs (segment × head × rows of the state): walk through a segment's chunks.

    What the state was before each chunk goes to ``kept``, transposed, and what is written (u) to ``writes``; what is
    read to ``y``, what the state is at the end to ``final``; each unless None. Sequences begin with ``initial`` (zeros
    if None).

    LOCAL: for the segments that others of their sequence follow, what the state becomes of nothing goes to ``added``,
    and what it becomes of each unit row to ``moves``, which more programs work out. Without LOCAL ``added`` holds the
    states that leave the segments (:func:`join_kernel`).
    """
    tiles: tl.constexpr = (P + N if LOCAL else P) // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, row, start, stop, whole_count = locate_segment(
        table, begins, tl.program_id(0) // tiles // heads, length, per, CHUNK
    )  # fmt: skip
    if chunk < 0:
        return
    unit = tile >= P // BLOCK
    if LOCAL:
        if (index + per >= whole_count) | (unit & (index == 0)):
            return
    inside, at_n = tl.arange(0, CHUNK), tl.arange(0, N)
    at_p = tl.where(unit, tile - P // BLOCK, tile) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    at = at_p[None, :] * N + at_n[:, None]  # the state lies transposed, (n, p): no product needs it otherwise
    edge = (row.to(tl.int64) * heads + head) * P * N + at
    v += (head // ratio) * v_head
    k += (head // ratio) * k_head
    q += head * q_head
    beta += head * beta_head
    state = tl.zeros([N, BLOCK], tl.float32)
    if index == 0:
        if initial is not None:
            state = tl.load(initial + edge)
    elif LOCAL:
        state = tl.where(unit & (at_p[None, :] == at_n[:, None]), 1.0, 0.0)
    else:
        here = ((chunk - per) // per).to(tl.int64) * heads + head
        state = tl.load(added + here * P * N + at)
    for step in range(0, tl.minimum(per, whole_count - index)):
        token = start + (index + step) * CHUNK
        valid = inside < tl.minimum(stop - token, CHUNK).to(tl.int32)
        here = (chunk + step).to(tl.int64) * heads + head
        ks = load_rows(k, token, k_token, inside, at_n, valid).to(DOT)
        vs = load_rows(v, token, v_token, inside, at_p, valid & (not unit)).to(tl.float32)
        strength = tl.load(beta + token * beta_token + inside * beta_token, mask=valid, other=0.0)
        decay = tl.load(decays + here * CHUNK + inside)
        whole = tl.load(decays + here * CHUNK + CHUNK - 1)
        inverse = tl.load(inverses + here * CHUNK * CHUNK + rows * CHUNK + columns).to(DOT)
        if kept is not None:
            tl.store(kept + here * P * N + (at_n[:, None] * P + at_p[None, :]), state)
        entered = state.to(DOT)
        held = tl.dot(ks, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
        wanted = (vs - held) * strength[:, None]
        written = tl.dot(inverse, wanted.to(DOT), input_precision=PRECISION)
        place = token * heads * P + head * P + (rows * (heads * P) + at_p[None, :])
        if writes is not None:
            tl.store(writes + place, written, mask=valid[:, None])
        if y is not None:
            qs = load_rows(q, token, q_token, inside, at_n, valid).to(DOT)
            scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
            scores *= tl.exp2(tl.where(rows >= columns, decay[:, None] - decay[None, :], float("-inf")))
            out = tl.dot(qs, entered, input_precision=PRECISION) * tl.exp2(decay)[:, None]
            out = tl.dot(scores.to(DOT), written.to(DOT), out, input_precision=PRECISION)
            tl.store(y + place, out, mask=valid[:, None])
        leaving = (written * tl.exp2(whole - decay)[:, None]).to(DOT)
        state = tl.dot(tl.trans(ks), leaving, state * tl.exp2(whole), input_precision=PRECISION)
    if LOCAL:
        here = (chunk // per).to(tl.int64) * heads + head
        if unit:
            tl.store(moves + here * N * N + at, state)
        else:
            tl.store(added + here * P * N + at, state)
    elif final is not None:
        if index + per >= whole_count:
            tl.store(final + edge, state)


@triton.jit(do_not_specialize=["length", "per"])
def join_kernel(
    added, moves, table, begins, length, heads, per,
    ROWS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Programs as those of the walks: turn what segments make of nothing into what leaves them, one after another.

    In place in ``added``: R_i + X_{i-1} M_i for the states of a sequence's segments but its last; BACK, from the end,
    R_i + X_{i+1} M_i^T for the gradients of all but its first.
    """
    tiles: tl.constexpr = ROWS // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    chunk, index, _row, _start, _stop, whole_count = locate_segment(
        table, begins, tl.program_id(0) // tiles // heads, length, per, CHUNK
    )  # fmt: skip
    segments = tl.cdiv(whole_count, per)
    if (chunk < 0) | (index != 0) | (segments < 3):
        return
    at_n = tl.arange(0, N)
    at = (tile * BLOCK + tl.arange(0, BLOCK))[:, None] * N + at_n[None, :]
    here = ((chunk + (segments - 1) * per if BACK else chunk) // per).to(tl.int64) * heads + head
    value = tl.load(added + here * ROWS * N + at)
    for i in range(1, segments - 1):
        here = ((chunk + (segments - 1 - i if BACK else i) * per) // per).to(tl.int64) * heads + head
        move = moves + here * N * N
        if BACK:
            move = tl.load(move + at_n[None, :] * N + at_n[:, None])
        else:
            move = tl.load(move + at_n[:, None] * N + at_n[None, :])
        value = tl.dot(value, move, tl.load(added + here * ROWS * N + at), input_precision="tf32x3")
        tl.store(added + here * ROWS * N + at, value)
