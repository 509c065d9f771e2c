"""transformers' Auto classes know our model after ``import mmmamba``, in whatever order, and nobody pays before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mmmamba

LOADS = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # needs no torchvision in any version
kinds = (AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor)
print(*(type(kind.from_pretrained(folder)).__name__ for kind in kinds))
print(AutoTokenizer.from_pretrained(folder)("hi").keys())
"""
ORDERS = {
    "mmmamba first": "import mmmamba\nimport transformers\n",
    "transformers first": "import transformers\nfrom transformers import AutoModelForCausalLM\nimport mmmamba\n",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_both_orders(order: str, folder_of) -> None:
    out = python(f"{ORDERS[order]}folder = {str(folder_of('pico-linear'))!r}\n{LOADS}").splitlines()
    model = "MMMambaForConditionalGeneration"
    assert out[0].split() == ["MMMambaConfig", "MMMambaImageProcessor", model, model, "MMMambaProcessor"]
    assert "token_type_ids" not in out[1]  # generate(**inputs) would refuse them


def test_importing_mmmamba_or_its_face_imports_no_transformers() -> None:
    code = (
        "import sys, mmmamba, mmmamba.hf, mmmamba.data.transformers_files, mmmamba.checkpoints, mmmamba.cli as cli\n"
        "cli.main(['--help'])\nprint('transformers' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "False"


def test_names_of_the_package() -> None:
    for name in mmmamba.hf.__all__:
        assert getattr(mmmamba.hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmmamba.hf.nothing  # noqa: B018


def test_registering_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    mmmamba.hf.register()
    assert sys.meta_path == finders


def test_a_folder_without_processor_files_still_has_its_model(folder_of, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    for file in folder_of("pico-linear").glob("*"):
        if file.name == "config.json" or file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [2]
    assert model.generation_config.suppress_tokens == [7]
