"""``mmmamba convert``: a model of any layout that we read, written down in another."""

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
    """Write a model down in another layout, with its tokenizer.

    Examples::

        mmmamba convert HoVLE/ hovle-ours                                  # what transformers loads, too
        mmmamba convert runs/my-run/model student --to mmmamba-release     # as the published students lie
        mmmamba convert stage3.pt student --teacher HoVLE/ --stage2 stage2.pt

    The layout of SRC is found out. The model passes tensor by tensor: a few GB of memory do for any size. DST appears
    when it is whole. What the layout can't express (a mixer option, a softmax layer that is none) is refused by name.

    Args:
        src: a folder (HoVLE, a published student, a Llama-family model, ours), a built-in name, a GGUF file, or a
            stage's file of the published trainer.
        dst: the folder to write. What an earlier convert wrote there is replaced, if nobody has changed it since.
        to: mmmamba (our layout, which transformers loads after `import mmmamba`; a student that stored only what
            differs from its teacher becomes whole), hovle (softmax layers only), or mmmamba-release (the published
            mixer only).
        dtype: of the written tensors; A_log and dt_bias stay in float32.
        separate: with mmmamba-release: write the projections one by one, as they are while training.
        teacher: with a stage's file: the HoVLE folder that it was trained from.
        stage2: with stage 3's file: stage 2's, which has the decays that stage 3's lacks.
        overwrite: replace any model that is in dst. A folder with other files in it is refused all the same.

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
    """What lies beside config and weights: the source's own files and, where it has a tokenizer, our processor's."""

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
        raise UserError(f"{src}: a stage's file has only what was trained: give its teacher with --teacher")
    return open_partial(src, teacher=teacher, stage2=stage2)


def _widest(source: Source) -> torch.dtype:
    """What the checkpoint is said to be in: what it says itself, or the dtype of its largest tensor."""
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
