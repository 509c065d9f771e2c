"""From a recipe's ``data`` section to the rows of each training step."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmmamba.data.encoded_cache import EncodedCache
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.loader import Concatenated, Loader, Skipped
from mmmamba.data.packed_batch import Batch
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.data.processor import Processor
from mmmamba.data.sample_order import Order
from mmmamba.device import cores
from mmmamba.distill import processes
from mmmamba.distill.recipe import DataConfig
from mmmamba.distill.train_config import TrainConfig
from mmmamba.errors import UserError
from mmmamba.input_files import open_file

CACHE = ".cache"  # a folder beside the data


class TrainingData:
    """The encoded samples of a run, mixed by weight in an order that depends on the seed and the step alone.

    Of several processes each takes its share of a step's samples; a step has the same ones whatever their number.

    Args:
        config: the recipe's ``data`` section.
        processor: how samples become tokens and tiles.
        seed: of the order.
    """

    def __init__(self, config: DataConfig, processor: Processor, seed: int) -> None:
        self.config, self.seed = config, seed
        prepare_root(config)
        limits: dict[str, Any] = {"max_length": config.max_length, "max_tiles": config.max_tiles}
        self.paths = source_paths(config)
        self.sources: list[EncodedCache | EncodedSource] = []
        for path in self.paths:
            dataset = JsonlDataset(path)
            if len(dataset) == 0:
                raise UserError(f"{path}: holds no sample")
            if config.cache:
                self.sources.append(
                    EncodedCache(
                        dataset,
                        processor,
                        path.parent / CACHE,
                        workers=cores(),
                        on_bad_sample=config.on_bad_sample,
                        **limits,
                    )
                )
            else:
                self.sources.append(EncodedSource(dataset, processor, **limits))
        workers = config.workers
        own = cores() // processes.local_count()
        self.workers = workers if workers is not None else 0 if own <= 2 else min(8, own - 1)

    @property
    def cache(self) -> Path:
        """Where what is worked out of the samples is kept: beside the first source."""
        return self.paths[0].parent / CACHE

    @functools.cached_property
    def identity(self) -> list[str]:
        """What the sources are, for the run's fingerprint: name, weight and a hash of each file."""
        return identity_of(self.config)

    @functools.cached_property
    def picture_hashes(self) -> dict[str, PictureHashes]:
        """The number of a source → by which its pictures are known."""
        return {str(i): source.picture_hashes for i, source in enumerate(self.sources)}

    def rows(self, config: TrainConfig, salt: int) -> StepRows:
        """The rows of each step of a stage; ``salt`` gives every stage its own order."""
        order = ProcessOrder(
            [(len(source), c.weight) for source, c in zip(self.sources, self.config.sources, strict=True)],
            seed=self.seed * 1009 + salt,
            batch_size=config.batch_size,
        )
        return StepRows(self, order, config)


class ProcessOrder(Order):
    """What this process takes of each step's samples: every n-th of them, for n processes."""

    def __init__(self, sources: Sequence[tuple[int, float | None]], *, seed: int, batch_size: int) -> None:
        super().__init__(sources, seed=seed, batch_size=batch_size)
        self._mine = slice(processes.rank(), None, processes.count())

    def indices(self, step: int) -> list[int]:
        return super().indices(step)[self._mine]


class StepRows:
    """``rows(start)`` yields the packed rows of each step from ``start`` on; ``bad_samples`` lists what was skipped."""

    def __init__(self, data: TrainingData, order: Order, config: TrainConfig) -> None:
        self.data, self.order, self.config = data, order, config
        self.bad_samples: list[Skipped] = []

    def __call__(self, start: int) -> Iterator[Sequence[Batch]]:
        loader = Loader(
            Concatenated(self.data.sources),
            self.order,
            start_step=start,
            end_step=self.config.steps,
            max_tokens=self.config.micro_tokens,
            workers=self.data.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch=4,
            on_bad_sample=self.data.config.on_bad_sample,
        )
        for rows in loader:
            self.bad_samples = loader.bad_samples
            yield rows


def source_paths(config: DataConfig) -> list[Path]:
    """The file of each source, there or not."""
    return [Path(config.root) / source.path for source in config.sources]  # an absolute path stays as it is


def identity_of(config: DataConfig) -> list[str]:
    """Name, weight and a hash of each source's file."""
    pairs = zip(config.sources, source_paths(config), strict=True)
    return [f"{path.name} ×{source.weight} {_hash(path)}" for source, path in pairs]


def prepare_root(config: DataConfig) -> Path:
    """The folder of the sources, built when it is missing and its sources are the built-in ones."""
    if missing := _missing_builtin(config):
        from mmmamba.data.build import build

        build(out=Path(config.root), source=missing, scale=config.scale)
    return Path(config.root)


def check_sources(config: DataConfig) -> None:
    """Refuse sources that a run would: a file that is not there and cannot be built, or holds no sample (UserError)."""
    if not _missing_builtin(config):
        for path in source_paths(config):
            if len(JsonlDataset(path)) == 0:
                raise UserError(f"{path}: holds no sample")


def _missing_builtin(config: DataConfig) -> tuple[str, ...]:
    """The built-in sources that are still to be built."""
    root = Path(config.root)
    missing = [s.path for s in config.sources if not Path(s.path).is_absolute() and not (root / s.path).exists()]
    builtin = sorted({path.split("/")[0] for path in missing})
    if not set(builtin) <= {"easy-vqa", "primer"}:
        raise UserError(f"{root / missing[0]}: no such file")
    return tuple(builtin)


def _hash(path: Path) -> str:
    """The start of a file's SHA-256."""
    with open_file(path, "data file") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
