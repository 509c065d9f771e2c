"""Which of transformers' own tests fail on our classes, and why that is right. No other may fail, and these must.

The reasons are unreasonable demands on our kind of model, never something that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """A suite's file, how many of its tests pass at least, and those that fail by name, each with its reason."""

    file: str
    passing: int
    known: dict[str, str] = field(default_factory=dict)


NO_RANDOM_WEIGHTS = (
    "it loads a folder without any weights and expects a model of random ones: a missing tensor is refused by name"
)

SUITES = (
    Suite(
        "suite_modeling.py",
        260,
        {
            **{
                f"{kind}Test::test_model_weights_reload_no_missing_tied_weights": NO_RANDOM_WEIGHTS
                for kind in ("Teacher", "Hybrid", "Linear")
            },
            "TeacherTest::test_retain_grad_hidden_states_attentions": (
                "it wants a gradient of the attention weights: the kernels that the pass runs never make them, and the "
                "ones that are shown are worked out next to it"
            ),
        },
    ),
    Suite(
        "suite_image_processing.py",
        17,
        {
            "ImageProcessorTest::test_new_models_require_torchvision_backend": (
                "it wants a second processor over torchvision, which would give other pixels: a model answers by "
                "those that it was trained on"
            ),
            "ImageProcessorTest::test_call_numpy_4_channels": (
                "it wants pictures of four colours as they are: the model reads three, and do_convert_rgb=False is "
                "refused for a picture that is not RGB"
            ),
        },
    ),
    Suite(
        "suite_processing.py",
        32,
        {
            **{
                f"ProcessorTest::test_apply_chat_template_image_{i}": (
                    "it gives num_frames along with pictures: an option that nothing reads is refused by name"
                )
                for i in range(2)
            },
            "ProcessorTest::test_unstructured_kwargs_batched_0_images": (
                "it gives a max_length that nothing reads (padding to the longest, no truncation): refused by name"
            ),
            "ProcessorTest::test_tokenizer_decode_defaults": (
                "it makes a processor without the model's config, which says what a prompt and a picture are made of"
            ),
        },
    ),
)
