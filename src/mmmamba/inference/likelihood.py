"""How likely a model finds given answers. Perplexity is computed from this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mmmamba.data.packed_batch import pack
from mmmamba.data.processor import UNSCORED, Encoded
from mmmamba.device import within_memory
from mmmamba.inference.steps import (
    BATCH_TOKENS,
    PREFILL_CHUNK,
    Progress,
    check_positive,
    fixed_for,
    groups,
    passes,
    pixels,
)
from mmmamba.model.model import Model

HEAD_ROWS = 1024  # scored positions whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class Score:
    """The summed negative log-likelihood (nats) of one sample's scored tokens, and how many there are."""

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Mean nats for each token; NaN if the sample has no scored token."""
        return self.nll / self.tokens if self.tokens else math.nan


@torch.no_grad()
def score(
    model: Model,
    encodeds: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
) -> list[Score]:
    """Negative log-likelihood of the scored tokens (labels other than -100) of every sample, for perplexity.

    Logits are computed for scored positions only, and for at most ``HEAD_ROWS`` of them at once.

    Args:
        model: the network.
        encodeds: samples with answers.
        batch_tokens: most tokens in a packed batch.
        prefill_chunk: a longer sample is read alone, in pieces of this size.
        progress: called with (scored, total) after each batch.

    Returns:
        One score for each sample, in their order.
    """
    check_positive(batch_tokens=batch_tokens, prefill_chunk=prefill_chunk)
    scores: list[Score] = [Score(nll=0.0, tokens=0)] * len(encodeds)

    def score_all() -> None:
        done = 0
        lengths = [len(encoded.input_ids) for encoded in encodeds]
        for group in groups(model, lengths, budget=batch_tokens, chunk=prefill_chunk):
            samples = [encodeds[i] for i in group]
            hidden, targets, owner = _scored_positions(model, samples, prefill_chunk)
            nll = _nll(model, hidden, targets)
            for row, i in enumerate(group):
                own = nll[owner == row]
                scores[i] = Score(nll=float(own.sum()), tokens=len(own))
            done += len(group)
            if progress is not None:
                progress(done, len(encodeds))

    doing = f"{len(encodeds):,} samples were scored: lower batch_tokens ({batch_tokens:,}), or take another device"
    within_memory(score_all, model.device, doing)
    return scores


def _scored_positions(
    model: Model, samples: Sequence[Encoded], chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (m, d) that predict a scored token, those tokens (m,), and which sample each is of (m,)."""
    # Position t - 1 predicts token t. Nothing precedes a sample's first token, so it is never scored.
    steps = [np.flatnonzero(np.asarray(sample.labels)[1:] != UNSCORED) for sample in samples]
    targets = [np.asarray(sample.labels)[1:][kept] for sample, kept in zip(samples, steps, strict=True)]
    owner = np.repeat(np.arange(len(samples)), [len(kept) for kept in steps])
    if len(samples) == 1 and len(samples[0].input_ids) > chunk:
        hidden = _chunked_hidden(model, samples[0], torch.from_numpy(steps[0]).to(model.device), chunk)
    else:
        batch = pack(list(samples))
        starts = batch.cu_seqlens[:-1].tolist()
        positions = np.concatenate([kept + start for kept, start in zip(steps, starts, strict=True)])
        out = model(
            batch.input_ids.to(model.device),
            pixels(model, batch.tiles),
            cu_seqlens=batch.cu_seqlens.to(model.device),
            logits="none",
            **fixed_for(model, samples, 0),
        )
        hidden = out.hidden[0, torch.from_numpy(positions).to(model.device)]
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(model.device)
    return hidden, wanted, torch.from_numpy(owner)


def _chunked_hidden(model: Model, sample: Encoded, positions: torch.Tensor, chunk: int) -> torch.Tensor:
    """Hidden states (m, d) at ``positions`` (m,) of one long sample."""
    start = 0
    found = []
    for out in passes(model, sample, chunk, logits="none", extra=0, state=None):
        end = start + out.hidden.shape[1]
        found.append(out.hidden[0, positions[(positions >= start) & (positions < end)] - start])
        start = end
    return torch.cat(found)


def _nll(model: Model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (m,) in float64 on the CPU of ``targets`` (m,) after ``hidden`` (m, d)."""
    found = [torch.empty(0, dtype=torch.float64)]
    for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.head(rows).float()
        found.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu())
    return torch.cat(found)
