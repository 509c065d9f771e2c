"""transformers' ImageProcessingTestMixin over our image processor. Run by test_suites.py."""

from __future__ import annotations

import unittest
from typing import Any

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from mmmamba.hf import MMMambaImageProcessor

SIDE = 56


class Asked(ImageProcessingTester):
    """What the mixin asks: an image processor of small tiles, and the shape of what it makes of pictures."""

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, max_resolution=120, image_size=SIDE, dynamic_image_size=False, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, Any]:
        return {"pil": MMMambaImageProcessor}

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {"image_size": SIDE, "dynamic_image_size": False}

    def expected_output_image_shape(self, images: Any) -> tuple[int, ...]:
        return 3, SIDE, SIDE


class ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Asked
