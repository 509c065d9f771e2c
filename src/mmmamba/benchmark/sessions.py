"""Measure how long it takes to save and to resume a conversation whose model is in memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmmamba.benchmark.measure import prompt
from mmmamba.checkpoints import resolve
from mmmamba.data.processor import Processor
from mmmamba.data.sample import GPT, HUMAN, Turn
from mmmamba.inference.conversation import Chat, Past
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.model_fingerprint import fingerprint
from mmmamba.inference.session import load_session, save_session
from mmmamba.inference.steps import prefill
from mmmamba.model.model import Model
from mmmamba.model.state import State

TOKENS = 16  # decoded from both states, to check that they are the same


@torch.no_grad()
def time_session(
    model: Model, *, length: int, chunk: int = 8192, repeats: int = 9, folder: Path | None = None
) -> dict[str, float]:
    """Save and resume a conversation of ``length`` random tokens, with a transcript of four characters a token.

    Args:
        model: the network. Any tokenizer and chat template will do.
        chunk: the prompt is read in pieces of this many tokens.
        repeats: number of files that are written and read after one for warm-up; the median counts.
        folder: where the file is written (a temporary folder without).

    Returns:
        ``save_ms`` (with the flush to the disk) and ``resume_ms`` (from the page cache to the device);
        ``fingerprint_ms``, the extra time of the first save or resume of a model; ``file_bytes``; ``same``: 1 when the
        resumed state gives the same logits as the saved one, bit for bit.
    """
    processor = Processor.from_folder(resolve("pico-teacher"))
    _, state = prefill(model, [prompt(model.config, length)], chunk=chunk, max_new_tokens=TOKENS)
    turns = (Turn(HUMAN, "word" * length), Turn(GPT, "yes"))
    chat = Chat(model, processor, past=Past(turns=turns, state=state, unfed=(), answers=1))
    once = _ms(lambda: fingerprint(model, processor), model.device)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "talk.state"
        saves, loads = [], []
        for _ in range(repeats + 1):
            saves.append(_ms(lambda: save_session(path, chat), model.device))
            loads.append(_ms(lambda: load_session(path, model, processor), model.device))
        resumed, size = load_session(path, model, processor).past, path.stat().st_size
    assert resumed is not None
    same = torch.equal(_decoded(model, state), _decoded(model, resumed.state))
    return {
        "save_ms": statistics.median(saves[1:]),
        "resume_ms": statistics.median(loads[1:]),
        "fingerprint_ms": once,
        "file_bytes": float(size),
        "same": float(same),
    }


def _ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e3


def _decoded(model: Model, state: State) -> torch.Tensor:
    """Logits (TOKENS, v) of greedy steps from a state of one sequence."""
    decoder = Decoder(
        model, 1, state.longest + TOKENS, max_length=state.max_length, max_embedded=state.max_embedded, graph=False
    )
    slots = torch.zeros(1, dtype=torch.long, device=model.device)
    decoder.admit(slots, state)
    token, found = torch.ones_like(slots), []
    for _ in range(TOKENS):
        found.append(decoder.step(token, slots)[0].clone())
        token = found[-1].argmax()[None]
    return torch.stack(found)
