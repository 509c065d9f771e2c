"""Session files: a conversation with the whole of the model's state, in one safetensors file.

The tensors are the state's; the header holds what else a :class:`Chat` needs to go on (the transcript, the tokens that
the state has not seen, how many answers were drawn), the fingerprint of the model, and a checksum over everything. For
a linear student only the transcript grows. A conversation that is saved, loaded in another process and gone on with is,
bit for bit, the conversation that went on. How tokens are picked is not part of the file: it is given again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmmamba.checkpoints import write_atomically
from mmmamba.checkpoints.io import not_finite, read_with_metadata, write_safetensors
from mmmamba.checkpoints.tensor_hashes import digest
from mmmamba.config_files import from_dict, to_dict
from mmmamba.data.lazy_pictures import PictureFile, Unread
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.data.video import Frame
from mmmamba.errors import UserError
from mmmamba.inference.conversation import Chat, Past
from mmmamba.inference.model_fingerprint import fingerprint
from mmmamba.inference.sampling import Sampling
from mmmamba.jsonfile import parse_json
from mmmamba.model.mixers import LayerState
from mmmamba.model.model import Model
from mmmamba.model.stack import MAX_POSITIONS
from mmmamba.model.state import State

VERSION = 1
HEADER = "mmmamba_session"  # the one key of a file's metadata
MAX_HEADER = 90_000_000  # bytes; a reader of safetensors takes headers of up to 100 MB


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A picture or a frame of a video that lies in a file, which must not change."""

    path: str
    sha256: str
    width: int
    height: int
    frame: int | None = None
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a session file holds beside the tensors of the state.

    Attributes:
        fingerprint, dtype: which model and processor it is (:mod:`mmmamba.inference.model_fingerprint`), and format.
        max_length, max_embedded: the state's.
        unfed, answers: the conversation's (see :class:`Past`).
        transcript: all that was said.
        pictures: where the chat template has the whole conversation read again, those of all turns; else none.
    """

    fingerprint: str
    dtype: str
    max_length: int
    unfed: tuple[int, ...]
    answers: int
    transcript: tuple[Turn, ...]
    pictures: tuple[Reference, ...] = ()
    max_embedded: int | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session file that was read and found whole; which model it belongs to is seen when it is resumed."""

    path: Path
    header: Header
    tensors: Mapping[str, Tensor]

    def resume(
        self,
        model: Model,
        processor: Processor,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
    ) -> Chat:
        """The conversation, to go on with (arguments as :class:`Chat` has them).

        Raises:
            UserError: when it was held with another model or number format, or one of its pictures has changed.
        """
        dtype = _name(model.dtype)
        if self.header.dtype != dtype:
            raise UserError(f"{self.path}: was made in {self.header.dtype}, but the model runs in {dtype}")
        found = fingerprint(model, processor)
        if self.header.fingerprint != found:
            raise UserError(
                f"{self.path}: was made with another model: its fingerprint is {self.header.fingerprint[:12]}…, "
                f"this model's is {found[:12]}…"
            )
        past = Past(
            turns=self.header.transcript,
            state=_state(self.path, self.tensors, model, self.header),
            unfed=self.header.unfed,
            answers=self.header.answers,
            shown=tuple(_picture(self.path, reference) for reference in self.header.pictures),
        )
        chat = Chat(model, processor, sampling, max_new_tokens=max_new_tokens, stop=stop, past=past)
        chat.fingerprint = found  # worked out just now
        return chat


def save_session(path: str | Path, chat: Chat) -> Path:
    """Write a conversation as it is at this moment; a crash leaves the file that was there, or the new one.

    Raises:
        UserError: naming ``path``: nothing has been said yet; the file can't be written; the transcript is too long
            for a header; the conversation has to be read again at each turn and has a picture that lies in no file.
    """
    path, past = Path(path), chat.past
    if past is None:
        raise UserError(f"{path}: not saved: nothing has been said yet")
    header = Header(
        fingerprint=chat.fingerprint,
        dtype=_name(chat.model.dtype),
        max_length=past.state.max_length,
        max_embedded=past.state.max_embedded,
        unfed=past.unfed,
        answers=past.answers,
        transcript=past.turns,
        pictures=tuple(_reference(path, number, picture) for number, picture in enumerate(past.shown, 1)),
    )
    content, tensors = {"version": VERSION, **to_dict(header)}, _tensors(past.state.to("cpu"))
    text = _json({**content, "sha256": digest([_json(content)], tensors)})
    # As a text in the header, which is JSON too. A character takes six bytes at most: no need to look at short ones.
    size = len(_json(text).encode()) if 6 * len(text) > MAX_HEADER else 0
    if size > MAX_HEADER:
        raise UserError(f"{path}: not saved: the transcript takes {size:,} bytes, at most {MAX_HEADER:,} fit")
    return write_atomically(path, lambda temporary: write_safetensors(temporary, tensors, {HEADER: text}))


def load_session(
    path: str | Path,
    model: Model,
    processor: Processor,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Chat:
    """The conversation in a session file, to go on with: :func:`read_session`, then :meth:`Session.resume`."""
    return read_session(path).resume(model, processor, sampling, max_new_tokens=max_new_tokens, stop=stop)


def read_session(path: str | Path) -> Session:
    """A session file, whole in memory on the CPU.

    Raises:
        UserError: naming ``path``: it is missing, truncated, altered, no session, or of a newer format.
    """
    path = Path(path)
    tensors, metadata = read_with_metadata(path)
    if HEADER not in metadata:
        raise UserError(f"{path}: is not a session file (no '{HEADER}' in its header)")
    content = parse_json(metadata[HEADER], f"{path}: was altered or damaged: its header")
    if not isinstance(content, dict) or not isinstance(content.get("version"), int):
        raise UserError(f"{path}: was altered or damaged: its header has no 'version'")
    if content["version"] > VERSION:
        raise UserError(f"{path}: is of format version {content['version']}, newer than this mmmamba reads ({VERSION})")
    checksum = content.pop("sha256", None)
    if checksum != digest([_json(content)], tensors):
        raise UserError(f"{path}: was altered or damaged: its checksum does not match its content")
    del content["version"]
    return Session(path=path, header=from_dict(Header, content, path), tensors=tensors)


# ---------------------------------------------------------------------------------------------- state and pictures


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(state: State) -> dict[str, Tensor]:
    found = {
        f"layers.{i}.{name}": tensor for i, layer in enumerate(state.layers) for name, tensor in layer.tensors().items()
    }
    found["positions"] = state.positions
    return found if state.embedded is None else {**found, "embedded": state.embedded}


def _state(path: Path, tensors: Mapping[str, Tensor], model: Model, header: Header) -> State:
    wide = torch.promote_types(model.dtype, torch.float32)
    empty = [
        model.mixer(i).empty_state(1, dtype=model.dtype, wide=wide, device="meta")
        for i in range(model.config.num_layers)
    ]
    counts = {"positions", *(["embedded"] if model.merges_late else [])}
    expected = counts | {f"layers.{i}.{name}" for i, layer in enumerate(empty) for name in layer.tensors()}
    if wrong := sorted(expected ^ set(tensors)):
        raise UserError(f"{path}: is not a session of this model: tensor '{wrong[0]}' is missing or not of its state")
    for name in sorted(counts):
        found = tensors[name]
        if found.dtype != torch.long or found.shape != (1,) or not 0 <= int(found) < MAX_POSITIONS:
            raise _foreign(path, name, "is no number of positions")
    _check_header(path, header, tensors, model)
    return State(
        layers=tuple(_layer_state(path, tensors, model, i, layer) for i, layer in enumerate(empty)),
        positions=tensors["positions"],
        max_length=header.max_length,
        embedded=tensors.get("embedded"),
        max_embedded=header.max_embedded,
    ).to(model.device)


def _layer_state(path: Path, tensors: Mapping[str, Tensor], model: Model, index: int, empty: LayerState) -> LayerState:
    """A layer's state, refused where the layer cannot go on from it: other shapes, other numbers, NaN.

    The checksum tells damage; whoever wrote a file may have written down a checksum of anything.
    """
    prefix = f"layers.{index}."
    state = empty.with_tensors({name: tensors[prefix + name] for name in empty.tensors()})
    for (name, found), like in zip(state.tensors().items(), empty.tensors().values(), strict=True):
        wide = torch.promote_types(like.dtype, torch.float32)
        if found.dtype not in ((model.dtype, wide) if like.is_floating_point() else (like.dtype,)):
            raise _foreign(path, prefix + name, f"is {_name(found.dtype)}")
        if not_finite(found):
            raise _foreign(path, prefix + name, "has values that are not finite (NaN or infinity)")
    late = model.merges_late and index < model.config.embedding.num_layers
    seen = int(tensors["embedded" if late else "positions"])
    for name, what in model.mixer(index).misfits(state, seen):
        raise _foreign(path, prefix + name, what)
    return state


def _foreign(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{path}: is not a session of this model: tensor '{name}' {what}")


def _check_header(path: Path, header: Header, tensors: Mapping[str, Tensor], model: Model) -> None:
    vocabulary = model.config.vocab_size
    if wrong := [token for token in header.unfed if not 0 <= token < vocabulary]:
        raise UserError(f"{path}: 'unfed' holds the id {wrong[0]}, but the model has {vocabulary} tokens")
    if not 0 <= header.answers <= MAX_POSITIONS or not 0 <= header.max_length <= MAX_POSITIONS:
        raise UserError(f"{path}: 'answers' ({header.answers}) or 'max_length' ({header.max_length}) is out of range")
    if header.max_embedded is not None and not 0 <= header.max_embedded <= MAX_POSITIONS:
        raise UserError(f"{path}: 'max_embedded' ({header.max_embedded}) is out of range")


def _reference(path: Path, number: int, picture: Image.Image | Unread) -> Reference:
    if isinstance(picture, Image.Image):
        raise UserError(
            f"{path}: not saved: this model's chat template has the whole conversation read again at each turn, and "
            f"picture {number} lies in no file"
        )
    width, height = picture.size
    file = picture.path.resolve()
    reference = Reference(path=str(file), sha256=_hash_picture(path, file), width=width, height=height)
    if isinstance(picture, Frame):
        return dataclasses.replace(reference, frame=picture.index, time=picture.time)
    return reference


def _picture(path: Path, reference: Reference) -> Unread:
    file, size = Path(reference.path), (reference.width, reference.height)
    if _hash_picture(path, file) != reference.sha256:
        raise UserError(f"{path}: the conversation's picture {file} has changed")
    if reference.frame is None:
        return PictureFile(file, size)
    return Frame(file, reference.frame, reference.time or 0.0, size)


def _hash_picture(session: Path, file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{session}: the conversation's picture {file} is no longer there")
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
