"""Prefill, decode and score: everything that turns prompts into tokens, for one prompt or many.

The engine knows token ids and tiles only; what a prompt looks like is the processor's business. All of it relies on one
property of the model: a state is a value with one row a sequence, and a prefill may be cut anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from mmmamba.data.processor import Encoded, Processor
from mmmamba.device import within_memory
from mmmamba.inference.answer import Answer, Ending, Generated
from mmmamba.inference.batch import RunningBatch
from mmmamba.inference.likelihood import Score, score
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.steps import BATCH_TOKENS, PREFILL_CHUNK, Progress, Share, check_positive, prefill, shares
from mmmamba.inference.stream import Stream, stream
from mmmamba.model.model import Model

__all__ = ["Generated", "Score", "Stream", "generate", "score", "stream"]

BLOCK = 16  # steps between two reads of a GPU
REFILL = 4  # prompts are read when one slot in so many is free: a pass for each would cost more than waiting slots


@torch.no_grad()
def generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    prefill_chunk: int = PREFILL_CHUNK,
    block: int | None = None,
    progress: Progress | None = None,
) -> list[Generated]:
    """Answer every prompt; how the prompts are batched changes nothing but the rounding of their logits.

    As many as fit are answered at once; where answers end, the next prompts join those that go on.

    Args:
        model: the network; its device and dtype are used.
        processor: decodes answers and knows which tokens end them.
        prompts: encoded prompts, each ending where the answer begins.
        max_new_tokens: longest answer.
        sampling: how tokens are picked; greedy by default. Prompt i draws the random numbers of sequence i.
        stop: texts that end an answer where they begin.
        batch_tokens: most tokens (prompts and their longest answers) held at once.
        prefill_chunk: a longer prompt is read alone, in pieces of this size, to bound memory.
        block: tokens of each answer that are picked before the host reads them; answers do not depend on it. Default:
            16 on a GPU, which would wait for the host after each, and 1 elsewhere.
        progress: called with (answered, total) whenever that changes.

    Returns:
        One answer a prompt, in the order of the prompts.

    Raises:
        UserError: when a prompt cannot be read, the model gives NaN, or memory does not suffice.
    """
    if block is None:
        block = BLOCK if model.device.type == "cuda" else 1
    check_positive(batch_tokens=batch_tokens, prefill_chunk=prefill_chunk, block=block)
    ending = Ending.of(processor, stop, max_new_tokens)
    # Only where a stop string has to be found is text followed token by token.
    answers = [Answer(prompt, ending, processor.decode if ending.strings else None) for prompt in prompts]

    def answer_all() -> None:
        done = 0
        for share in shares(model, prompts, extra=max_new_tokens, budget=batch_tokens):
            for ended in _answer(model, answers, share, sampling or Sampling(), ending, prefill_chunk, block):
                done += ended
                if progress is not None:
                    progress(done, len(prompts))

    doing = f"{len(prompts):,} prompts were answered: lower batch_tokens ({batch_tokens:,}), or take another device"
    within_memory(answer_all, model.device, doing)
    return [_generated(answer, processor) for answer in answers]


def _answer(
    model: Model, answers: Sequence[Answer], share: Share, sampling: Sampling, ending: Ending, chunk: int, block: int
) -> Iterator[int]:
    """Complete the answers of a share; yields how many ended, whenever some did."""
    batch, waiting = RunningBatch(model, share, sampling, ending, block), deque(share.members)
    while waiting or batch.running:
        if not batch.running or REFILL * batch.free >= share.slots:
            while waiting and batch.free:
                joining = _next(waiting, answers, batch.free, chunk)
                prompts = [answers[i].prompt for i in joining]
                logits, state = prefill(model, prompts, chunk=chunk, max_new_tokens=ending.max_new_tokens)
                batch.join([answers[i] for i in joining], joining, logits, state)
                del state  # the pool has its own copy
        ended = batch.advance()
        if ended:
            yield ended


def _next(waiting: deque[int], answers: Sequence[Answer], most: int, chunk: int) -> list[int]:
    """Take the prompts that are read in the next pass: up to ``most``, or a single one that is longer than a chunk."""

    def long(i: int) -> bool:
        return len(answers[i].prompt.input_ids) > chunk

    joining = [waiting.popleft()]
    while waiting and len(joining) < most and not long(joining[0]) and not long(waiting[0]):
        joining.append(waiting.popleft())
    return joining


def _generated(answer: Answer, processor: Processor) -> Generated:
    assert answer.finish is not None
    return Generated(
        text=answer.text if answer.ending.strings else processor.decode(answer.token_ids),
        token_ids=tuple(answer.token_ids),
        logprobs=tuple(answer.logprobs),
        finish=answer.finish,
    )
