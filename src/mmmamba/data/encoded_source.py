"""A dataset whose samples are encoded when they are asked for, and the fingerprint of all that decides the encoding."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

from mmmamba.config_files import to_dict
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.tokenizer_template import JinjaTemplate
from mmmamba.input_files import open_file

#: Raise it when samples are encoded in another way, or stored in another way: an older cache is then made again.
ENCODING_VERSION = 2


class EncodedSource:
    """A dataset that is encoded sample by sample, whenever one is asked for."""

    def __init__(
        self,
        dataset: JsonlDataset,
        processor: Processor,
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.processor = processor
        self.max_length = max_length
        self.max_tiles = max_tiles

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def picture_hashes(self) -> PictureHashes:
        """By which the set's pictures are known."""
        return PictureHashes.of(self.dataset)

    def encode(self, index: int) -> Encoded:
        return self.processor.encode(self.dataset[index], max_length=self.max_length, max_tiles=self.max_tiles)


def fingerprint(source: EncodedSource) -> str:
    """sha256 of all that decides how ``source`` is encoded, the pictures' bytes excepted."""
    config = to_dict(source.processor.config)
    names = (
        "vision", "bos_token_id", "template", "system_message",
        "dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch",
    )  # fmt: skip
    settings = {
        "version": ENCODING_VERSION,
        "image_root": str(source.dataset.image_root),
        "max_length": source.max_length,
        "max_tiles": source.max_tiles,
        "config": {name: config[name] for name in names},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(source.processor.tokenizer.identity.encode())
    if isinstance(source.processor.template, JinjaTemplate):  # the others are code, which ENCODING_VERSION covers
        digest.update(source.processor.template.definition.encode())
    with open_file(source.dataset.path, "data file") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
