"""transformers' ProcessorTesterMixin over our processor. Run by test_suites.py."""

from __future__ import annotations

import unittest
from typing import Any

from tests.test_processing_common import ProcessorTesterMixin
from transformers import AutoProcessor

import mmmamba
from mmmamba.config_files import to_dict
from mmmamba.hf import MMMambaProcessor


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MMMambaProcessor
    # A picture takes more tokens than the mixin has in mind.
    images_text_kwargs_max_length, images_text_kwargs_override_max_length, images_unstructured_max_length = (
        150,
        140,
        130,
    )

    @classmethod
    def _setup_from_components(cls) -> Any:
        mmmamba.load_processor("pico-teacher").save(cls.tmpdirname)
        return AutoProcessor.from_pretrained(cls.tmpdirname)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"model": to_dict(mmmamba.load_processor("pico-teacher").config)}
