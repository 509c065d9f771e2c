"""``mmmamba convert``: read a model in any known layout, and write it in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from mmmamba.checkpoints import student
from mmmamba.checkpoints.hovle import config_to_hovle
from mmmamba.checkpoints.io import cast
from mmmamba.checkpoints.layouts import HOVLE, RELEASE, SEPARATE, STUDENT, Layout, Part, Tensors, parts, skeleton
from mmmamba.checkpoints.model_source import Source, open_source
from mmmamba.checkpoints.partial import open_partial
from mmmamba.checkpoints.release import config_to_release
from mmmamba.checkpoints.write import CopiedFiles, write_model
from mmmamba.data.processor import Processor
from mmmamba.data.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE, Tokenizer
from mmmamba.errors import UserError
from mmmamba.outputs import check_folder
from mmmamba.progress import Progress

PARTIAL = (".pt", ".pth", ".bin")


def convert(
    src: str,
    dst: Path,
    *,
    to: Literal["mmmamba", "hovle", "mmmamba-release"] = "mmmamba",
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    separate: bool = False,
    teacher: str | None = None,
    stage2: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model in another layout, with its tokenizer.

    Examples::

        mmmamba convert HoVLE/ hovle-ours                                  # a folder that transformers loads
        mmmamba convert runs/my-run/model student --to mmmamba-release     # like the published students
        mmmamba convert stage3.pt student --teacher HoVLE/ --stage2 stage2.pt

    The layout of SRC is detected. The model is converted tensor by tensor, so a few GB of memory are enough for any
    size. DST appears when it is complete. If the layout can't express something (such as an option of a mixer), the
    command refuses and names it.

    Args:
        src: a folder (HoVLE, a published student, a Llama-family model, ours), a built-in name, a GGUF file, or a
            stage's file of the published trainer.
        dst: the folder to write. A model that an earlier convert wrote there is replaced, unless it was changed since.
        to: the layout. mmmamba is ours, which transformers loads after `import mmmamba` (a student that stores only its
            differences from the teacher becomes complete). hovle is for models with softmax layers only, and
            mmmamba-release for students with the published mixer only.
        dtype: number format of the written tensors. A_log and dt_bias stay in float32.
        separate: with mmmamba-release: write one tensor for each projection, as during training.
        teacher: with a stage's file: the HoVLE folder that it was trained from.
        stage2: with the file of stage 3: the file of stage 2. It has the decays that the file of stage 3 lacks.
        overwrite: replace any model in dst. A folder with other files in it is still refused.

    Returns:
        the folder.
    """
    dst = Path(dst)
    if separate and to != RELEASE.name:
        raise UserError(f"--separate is for --to {RELEASE.name}, not {to}")
    source = _open(src, teacher, stage2)
    wide = None if dtype == "keep" else getattr(torch, dtype)
    layout = SEPARATE if separate else {layout.name: layout for layout in (STUDENT, RELEASE, HOVLE)}[to]
    data = _config_json(source, layout, wide or _widest(source))
    check_folder(dst, "DST", read=source.places)
    with Progress("convert", total=len(parts(source.config))) as bar:

        def read(part: Part) -> Tensors:
            found = source.read(part)
            bar.update(bar.done + 1)
            return found if wide is None else {name: cast(name, tensor, wide) for name, tensor in found.items()}

        write_model(dst, layout, data, source.config, read, _Beside(source), overwrite=overwrite)
    print(dst)
    return dst


class _Beside:
    """The files beside config and weights: the source's own files and, if it has a tokenizer, our processor's."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def save(self, folder: Path, /) -> None:
        CopiedFiles(self.source.folder).save(folder)
        if any((folder / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
            Processor(Tokenizer.from_folder(folder), self.source.config).save(folder)


def _open(src: str, teacher: str | None, stage2: Path | None) -> Source:
    stage = Path(src).suffix in PARTIAL and Path(src).is_file()
    if not stage and (teacher or stage2):
        raise UserError(f"{src}: --teacher and --stage2 are for a stage's file ({', '.join(PARTIAL)})")
    if not stage:
        return open_source(src)
    if teacher is None:
        raise UserError(f"{src}: a stage's file holds only what was trained: give its teacher with --teacher")
    return open_partial(src, teacher=teacher, stage2=stage2)


def _widest(source: Source) -> torch.dtype:
    """The dtype of the checkpoint: the one that it names, or the dtype of its largest tensor."""
    if source.dtype is not None:
        return source.dtype
    weights = source.weights
    return weights.dtype(max(weights, key=lambda name: weights.shape(name).numel()))


def _config_json(source: Source, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    if layout is STUDENT:
        count = sum(map(len, skeleton(source.config, source.folder).values()))
        folder = student.StudentFolder(model=source.config, teacher=source.teacher, tensors=count, dtype=name)
        return student.folder_to_json(folder)
    return (config_to_hovle if layout is HOVLE else config_to_release)(source.config) | {"torch_dtype": name}
