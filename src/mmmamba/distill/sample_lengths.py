"""How long a recipe's samples are, by a look at some of each source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Processor
from mmmamba.data.sample import BadSample
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.training_data import source_paths
from mmmamba.errors import UserError

SAMPLED = 256  # samples of each source that are looked at


@dataclass(frozen=True, kw_only=True)
class SampleLengths:
    """How long samples are: the mean, the mean over tokens of their own sample's length, the longest that may come.

    ``source`` says where that is from, ``bad`` what is wrong with the first bad sample.
    """

    mean: float
    length: float
    longest: int
    source: str
    bad: str = ""


def sample_lengths(recipe: DistillRecipe) -> SampleLengths:
    """Lengths of some samples of each source, spread evenly over it, weighted as the recipe mixes them.

    Without the data, or without a teacher folder to encode them, every sample is taken to fill what it may.
    """
    config = recipe.data
    paths = source_paths(config)
    try:
        processor = Processor.from_folder(recipe.teacher)
        datasets = [JsonlDataset(path) for path in paths]
    except UserError as error:
        full = min(config.max_length, recipe.stage1.micro_tokens)
        source = f"not measured ({error}); each is taken to fill what it may"
        return SampleLengths(mean=full, length=full, longest=config.max_length, source=source)
    found: list[tuple[float, list[int]]] = []  # weight and lengths of each source
    bad: list[str] = []
    longest = 0
    for dataset, wanted in zip(datasets, config.sources, strict=True):
        encoded = EncodedSource(dataset, processor, max_length=config.max_length, max_tiles=config.max_tiles)
        lengths, wrong = _look_at(encoded)
        found.append((wanted.weight, lengths))
        bad += wrong
        longest = max([longest, *lengths]) if len(encoded) <= SAMPLED else config.max_length
    weights = sum(weight for weight, lengths in found if lengths)
    if not weights:
        raise UserError(f"{paths[0]}: none of the samples that were looked at is good; see mmmamba data check")
    mean = sum(weight * float(np.mean(lengths)) for weight, lengths in found if lengths)
    squares = sum(weight * float(np.mean(np.square(lengths))) for weight, lengths in found if lengths)
    looked = sum(len(lengths) for _, lengths in found)
    said = f"{looked:,} samples of {len(paths)} sources"
    said += f"; {len(bad)} more are bad: mmmamba data check" if bad else ""
    return SampleLengths(
        mean=mean / weights, length=squares / mean, longest=longest, source=said, bad=bad[0] if bad else ""
    )


def _look_at(source: EncodedSource) -> tuple[list[int], list[str]]:
    """Tokens of some of a source's samples, spread evenly over it, and what is wrong with those that are bad."""
    lengths, wrong = [], []
    for row in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)) if len(source) else ():
        try:
            lengths.append(len(source.encode(int(row)).input_ids))
        except BadSample as error:
            wrong.append(str(error))
    return lengths, wrong
