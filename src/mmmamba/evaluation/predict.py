"""Ask a model every question of a suite: greedy answers, and how likely it finds the reference answers."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmmamba.checkpoints import load, resolve
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.sample import BadSample
from mmmamba.device import pick_device, pick_dtype
from mmmamba.evaluation.suite import Item, OnBadSample, Suite, bad_sample_note
from mmmamba.inference.engine import generate
from mmmamba.inference.likelihood import Score, score
from mmmamba.model.model import Model

GREY = 128  # what a blind model sees
CHUNK_TOKENS = 65536  # prompts encoded at once: bounds memory for a set of any size
CHUNK_BYTES = 512 * 2**20  # the same for their pictures


@dataclass(frozen=True)
class Loaded:
    """A model with the processor that speaks its language."""

    model: Model
    processor: Processor


@dataclass
class Cost:
    """What answering took. ``tokens``: prompt and generated tokens that went through the model."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """NaN where nothing was timed."""
        return self.tokens / self.seconds if self.seconds else math.nan


@dataclass
class Answers:
    """What one model said, by index of the suite's items; a skipped item has no entry."""

    texts: dict[int, str] = field(default_factory=dict)
    likelihood: dict[int, Score] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    bad_samples: list[dict[str, str]] = field(default_factory=list)


def load_model(name: str | Path, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Read a model and its processor. ``auto``: a GPU where there is one; bfloat16 on it and float32 elsewhere."""
    where = pick_device(device)
    model = load(name, dtype=pick_dtype(dtype, where), device=where)
    return Loaded(model.eval(), Processor.from_folder(resolve(name)))


def answer(
    loaded: Loaded,
    suite: Suite,
    *,
    blind: bool = False,
    batch_tokens: int = 8192,
    on_bad_sample: OnBadSample = "stop",
    progress: Callable[[int], None] = lambda n: None,
) -> Answers:
    """Greedy answers to every item, and the likelihood of its reference.

    ``blind``: the pictures are replaced by grey ones of the same size, which shows what guessing from the text gives.
    ``progress`` is called with the number of items answered since the last call.
    """
    answers = Answers()
    for ability in suite.abilities:
        cost = answers.costs[ability]
        for chunk in _chunks(loaded.processor, suite, suite.of(ability), blind, on_bad_sample, answers.bad_samples):
            prompts = [encoded for _, encoded, _ in chunk]
            done = 0

            def advance(answered: int, total: int) -> None:
                nonlocal done
                progress(answered - done)
                done = answered

            start = time.perf_counter()
            generated = generate(
                loaded.model, loaded.processor, prompts,
                max_new_tokens=suite.max_new_tokens, batch_tokens=batch_tokens, progress=advance,
            )  # fmt: skip
            cost.seconds += time.perf_counter() - start
            cost.tokens += sum(len(p.input_ids) + len(g.token_ids) for p, g in zip(prompts, generated, strict=True))
            scores = score(loaded.model, [encoded for _, _, encoded in chunk], batch_tokens=batch_tokens)
            for (index, _, _), said, likelihood in zip(chunk, generated, scores, strict=True):
                answers.texts[index] = said.text
                answers.likelihood[index] = likelihood
    return answers


def _chunks(
    processor: Processor,
    suite: Suite,
    indices: Sequence[int],
    blind: bool,
    on_bad_sample: str,
    bad: list[dict[str, str]],
) -> Iterator[list[tuple[int, Encoded, Encoded]]]:
    """(index, prompt, prompt with its answer) of the items that can be encoded, in bounded lists."""
    chunk: list[tuple[int, Encoded, Encoded]] = []
    tokens = size = 0
    for index in indices:
        item = suite.items[index]
        try:
            prompt, whole = _encode(processor, item, blind)
        except BadSample as error:
            if on_bad_sample == "stop":
                raise
            bad.append(bad_sample_note(error, item.sample.id, item.sample.where))
            continue
        chunk.append((index, prompt, whole))
        tokens += len(prompt.input_ids)
        size += prompt.tiles.nbytes
        if tokens > CHUNK_TOKENS or size > CHUNK_BYTES:
            yield chunk
            chunk, tokens, size = [], 0, 0
    if chunk:
        yield chunk


def _encode(processor: Processor, item: Item, blind: bool) -> tuple[Encoded, Encoded]:
    """(prompt, prompt and reference answer). Labels of answers in earlier turns are taken out."""
    whole = processor.encode(item.sample)
    if blind:
        whole = replace(whole, tiles=np.full_like(whole.tiles, GREY))
    scored = whole.labels != UNSCORED
    last = int(np.flatnonzero(scored)[-1])
    start = int(np.flatnonzero(~scored[:last])[-1]) + 1  # where the last answer begins; pictures are read only once
    labels = whole.labels.copy()
    labels[:start] = UNSCORED
    prompt = replace(whole, input_ids=whole.input_ids[:start], labels=labels[:start])
    return prompt, replace(whole, labels=labels)
