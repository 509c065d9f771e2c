"""Opens a model's folder: finds its layout, checks that it is complete, and builds the network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.checkpoints import release, student
from mmmamba.checkpoints.gguf import GgufWeights, find_gguf, gguf_json
from mmmamba.checkpoints.io import (
    CONFIG,
    Weights,
    cast,
    check_tensors,
    clear_leftovers,
    read_weights,
    weight_files,
)
from mmmamba.checkpoints.layouts import (
    RELEASE,
    SEPARATE,
    STUDENT,
    Part,
    Tensors,
    by_part,
    parts,
    recognise,
    stored_shapes,
)
from mmmamba.checkpoints.rounded_tensors import code_dtypes
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model.config import ModelConfig
from mmmamba.model.joined import join
from mmmamba.model.model import Model

ASSETS = Path(__file__).parent.parent / "assets"
ALIASES = {"nano": "nano-teacher", "pico": "pico-teacher"}
#: The built-in teachers keep the fingerprints that students and runs know: their files lost a copy of the embeddings
#: that nothing reads, and no other byte of a tensor.
KEPT_FINGERPRINTS = {
    # nano-teacher
    "4145e2fea778fdc2c5f7042524028211e0070fb995429cb1188c4ed055dfbc69": (
        "2b7d1590df303313a7d4e42a5214f452d5e8b51e8ba021e30c228e1521264c9e"
    ),
    # pico-teacher
    "b13b4aa5975f32ec5db0c625d27316992e13cee7552442ec3351d4c56df8c83b": (
        "ea5155ff161d6796614a53166537a73c30f05e1133af01ca7aa414af3aeef10c"
    ),
}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    int8: bool = False,
) -> Model:
    """The model in a folder, in eval mode.

    Args:
        path: a folder in any layout that we read, a GGUF file, or a built-in name. A folder needs only ``config.json``
            and weights.
        dtype: of the parameters; A_log and dt_bias stay in float32.
        device: where to put the model.
        int8: decoding steps read the matrices rounded to int8, which is half the bytes. Passes read them unrounded.

    Raises:
        UserError: naming the folder, the file and the tensor or field that is wrong.
    """
    source = open_source(path)
    config = source.config
    with torch.device("meta"):  # needs no memory and no random numbers; every parameter is assigned below
        model = Model(config)
    own: dict[str, Tensor] = {}
    for part in parts(config):
        # Parts may share memory with what was read (rows of wqkv), so each parameter gets a copy.
        own |= {name: _own_copy(cast(name, tensor, dtype).to(device)) for name, tensor in source.read(part).items()}
    if config.tie_word_embeddings:
        own["head.weight"] = own["text_embeddings.weight"]
    model.load_state_dict(own, assign=True)
    if config.tie_word_embeddings:  # assign=True made two parameters of one tensor
        model.head.weight = model.text_embeddings.weight
    del own
    join(model.layers)
    model.int8_steps = int8
    return model.eval()


def _own_copy(tensor: Tensor) -> Tensor:
    """``tensor``, alone in its memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def resolve(path: str | Path) -> Path:
    """The folder (or GGUF file) of a model: a path, or the asset folder of a built-in name.

    A built-in name wins over a folder of that name: say ``./nano`` for the folder.
    """
    name = str(path)
    builtin = ASSETS / ALIASES.get(name, name)
    if name in ALIASES or name in builtin_names():
        if not builtin.is_dir():
            raise UserError(f"the built-in model '{builtin.name}' is not part of this installation {_known()}")
        return builtin
    folder = Path(path).expanduser()
    if not folder.exists() and folder.name:
        clear_leftovers(folder.parent, folder.name)  # a writer may have been killed after it moved the old folder away
    if not folder.exists():
        raise UserError(f"'{path}' is neither a folder nor a built-in model {_known()}")
    if not folder.is_dir() and find_gguf(folder) is None:
        raise UserError(f"{path}: is a file; give the folder that holds {CONFIG} and the weights, or a GGUF file")
    return folder


def builtin_names() -> list[str]:
    """The names of the models in this package."""
    return sorted(entry.name for entry in ASSETS.iterdir() if (entry / CONFIG).is_file()) if ASSETS.is_dir() else []


def _known() -> str:
    names = builtin_names()
    return f"(built-in: {', '.join(names)})" if names else "(no built-in models are installed)"


def fingerprint(path: str | Path) -> str:
    """sha256 over the names and bytes of ``config.json`` and all weight files of a model's folder (or a GGUF file)."""
    folder = resolve(path)
    gguf = find_gguf(folder)
    files = [folder / CONFIG, *weight_files(folder)] if gguf is None else [gguf]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    found = digest.hexdigest()
    return KEPT_FINGERPRINTS.get(found, found)


def read_config(path: str | Path) -> ModelConfig:
    """The config of the model in a folder of any layout."""
    where, data = _described(resolve(path))
    return recognise(data, where).config(data, where)


def _described(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes a model, and the content of its ``config.json``."""
    gguf = find_gguf(folder)
    return (folder / CONFIG, read_json(folder / CONFIG)) if gguf is None else (gguf, gguf_json(gguf))


# ---------------------------------------------------------------------------------------------- part by part


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on disk. It was checked against its config, and is not read yet.

    Attributes:
        folder: where it is.
        layout: the name of its layout.
        config: the config of the network.
        weights: its own tensors, without those of a delta's teacher.
        read: returns our tensors of a part, on the CPU, in the dtype in which they are stored.
        teacher: a student's teacher, if that is recorded.
        places: its folder (or GGUF file), its teacher's folder and, for a delta, the folders that complete it.
        dtype: of its matrices, if that is recorded.
    """

    folder: Path
    layout: str
    config: ModelConfig
    weights: Weights
    read: Callable[[Part], Tensors]
    teacher: student.TeacherReference | None = None
    places: tuple[Path, ...] = ()
    dtype: torch.dtype | None = None


def open_source(path: str | Path) -> Source:
    """Open the model in a folder, ready to be read part by part.

    Raises:
        UserError: names or shapes of its tensors do not match its config.
    """
    folder = resolve(path)
    where, data = _described(folder)
    layout = recognise(data, where)
    config = layout.config(data, where)
    weights = read_weights(folder) if where.name == CONFIG else GgufWeights(where)
    if layout is STUDENT:
        return _student_source(folder, student.folder_from_json(data, where), weights)
    written = SEPARATE if layout is RELEASE and not release.is_fused(weights) else layout
    unused = [name for name in weights if layout.unused(name, config)]
    check_tensors(weights, stored_shapes(written, config, where), ignore=unused, reason=layout.reason)
    return Source(
        folder=folder, layout=layout.name, config=config, weights=weights, read=partial(layout.read, weights, config),
        places=(folder,),
    )  # fmt: skip


def _student_source(folder: Path, stored: student.StudentFolder, weights: Weights) -> Source:
    """Open a folder of ours. A delta is completed from its teacher."""
    config, where = stored.model, folder / CONFIG
    expected = stored_shapes(STUDENT, config, where)
    read: Callable[[Part], Tensors] = partial(student.read_student, weights, config)
    places: tuple[Path, ...] = (folder,)
    if stored.teacher is not None and stored.teacher.name not in builtin_names():
        places += (folder / stored.teacher.name,)
    dtype = None if stored.dtype is None else getattr(torch, stored.dtype)
    if stored.delta:
        assert stored.teacher is not None  # folder_from_json has checked this
        teacher = open_teacher(folder, stored.teacher)
        places += teacher.places
        theirs = stored_shapes(STUDENT, teacher.config, where)
        read = partial(_complete, weights, teacher, by_part(expected, config), dtype or torch.float32)
        own = student.delta_shapes(expected, weights)
        expected = {name: shape for name, shape in own.items() if name in weights or theirs.get(name) != shape}
    check_tensors(weights, expected, dtypes=code_dtypes(expected) if stored.delta else None, reason=lambda name: "")
    if stored.tensors not in (None, len(weights)):  # in a delta, a missing tensor would become the teacher's
        raise UserError(f"{weights.path}: holds {len(weights)} tensors, {CONFIG} says {stored.tensors}")
    return Source(
        folder=folder, layout=STUDENT.name, config=config, weights=weights, read=read, teacher=stored.teacher,
        places=places, dtype=dtype,
    )  # fmt: skip


def _complete(
    weights: Weights, teacher: Source, shapes: Mapping[Part, Mapping[str, torch.Size]], dtype: torch.dtype, part: Part
) -> Tensors:
    """A part of a delta, completed with the teacher's tensors."""
    return student.complete_delta(weights, teacher.read(part), shapes[part], dtype)


def open_teacher(folder: Path, reference: student.TeacherReference) -> Source:
    """Open the teacher of the student in ``folder``.

    Raises:
        UserError: it is missing, or it has changed.
    """
    where = folder / CONFIG
    path = Path(reference.name)
    if reference.name not in builtin_names():
        path = path if path.is_absolute() else folder / path
        if not path.is_dir() and find_gguf(path) is None:
            raise UserError(
                f"{where}: this student stores only what differs from its teacher '{reference.name}', which is not "
                f"there {_known()}"
            )
    found = fingerprint(path)
    if found != reference.fingerprint:
        raise UserError(
            f"{where}: the teacher '{reference.name}' has changed or is another one: its fingerprint is {found[:12]}…, "
            f"the student was made from {reference.fingerprint[:12]}…"
        )
    return open_source(path)
