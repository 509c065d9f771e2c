"""Read at once, in pieces or token by token; alone or in a batch; as steps or as a graph: the same model speaks.

Within what design allows: float64 to 1e-9; float32 to 1e-4 of the largest logit, with the same greedy tokens; bfloat16
with an error against float32 of at most 1.5 times that of the whole pass, and the same greedy tokens wherever the two
most likely ones are further apart than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmmamba.inference.decoder import Decoder
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model, initialise
from tiny import make_config

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
KINDS = {
    "teacher": ((ATTENTION,) * 5, Mamba2Options()),
    "linear": ((MAMBA2,) * 5, Mamba2Options()),
    "linear, rotated": ((MAMBA2,) * 5, Mamba2Options(rope=True, qk_norm=True, conv_kernel=4)),
    "hybrid": (HYBRID, Mamba2Options()),
    "hybrid, rotated": (HYBRID, Mamba2Options(rope=True)),
}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BACKENDS = [
    pytest.param("cpu", torch.float64, id="cpu-float64"),
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cuda", torch.float32, id="gpu-float32", marks=GPU),
    pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=GPU),
]
CASES = [
    pytest.param(
        kind, *backend.values, id=f"{backend.id}-{kind}",
        # On the CPU float64 tells more than float32, whose cases without rotation run in make test-all.
        marks=[*backend.marks, *([pytest.mark.slow] * (backend.id == "cpu-float32" and "rotated" not in kind))],
    )
    for backend in BACKENDS for kind in KINDS
]  # fmt: skip
PROMPTS, NEW = (70, 33, 90, 5), 24  # tokens of each prompt, and those that come one by one

Logits = list[Tensor]  # of each sequence: (NEW + 1, v), after its prompt and after every later token


def build(kind: str) -> Model:
    layer_map, mixer = KINDS[kind]
    config = make_config(layer_map, mixer)
    wide = {name: replace(getattr(config, name), head_dim=32) for name in ("embedding", "decoder")}  # as kernels need
    model = initialise(Model(replace(config, **wide)), 4).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def texts(device: torch.device) -> list[Tensor]:
    """(1, l) each."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(10, 300, (1, n + NEW), generator=generator).to(device) for n in PROMPTS]


def whole(model: Model) -> Logits:
    return [model(ids).logits[0, -NEW - 1 :] for ids in texts(model.device)]


def in_pieces(model: Model, size: int, grow: bool) -> Logits:
    found = []
    for ids in texts(model.device):
        state, parts = None, []
        for piece in ids.split(size, dim=1):
            state = state.growing(ids.shape[1]) if grow and state is not None else state
            out = model(piece, state=state, return_state=True)
            parts.append(out.logits[0])
            state = out.state
        assert state.settled().longest == ids.shape[1]
        found.append(torch.cat(parts)[-NEW - 1 :])
    return found


def by_token(model: Model, graph: bool) -> Logits:
    """All but the first token one at a time."""
    found = []
    for ids in texts(model.device):
        out = model(ids[:, :1], logits="last", return_state=True)
        decoder, slot = Decoder(model, 1, ids.shape[1], max_length=1, graph=graph), torch.zeros_like(ids[0, :1])
        decoder.admit(slot, out.state)
        steps = [out.logits[0], *(decoder.step(ids[0, i : i + 1], slot)[0].clone() for i in range(1, ids.shape[1]))]
        found.append(torch.stack(steps)[-NEW - 1 :])
    return found


def in_a_batch(model: Model, graph: bool) -> Logits:
    """Prompts in one packed row, then a pool that the sequences join and leave: one by one they are fed their rest."""
    every = texts(model.device)
    row = torch.cat([ids[:, :n] for ids, n in zip(every, PROMPTS, strict=True)], 1)
    borders = torch.tensor([0, *itertools.accumulate(PROMPTS)], dtype=torch.int32, device=model.device)
    out = model(row, cu_seqlens=borders, logits="last", return_state=True)
    decoder = Decoder(model, len(PROMPTS), max(PROMPTS) + NEW, max_length=1, graph=graph)
    slots = torch.tensor([2, 0, 3, 1], device=model.device)
    found = [[logits] for logits in out.logits]
    for late in (0, 1):  # the second half joins when the first has gone half its way
        rows = torch.arange(2 * late, 2 * late + 2, device=model.device)
        decoder.admit(slots[rows], out.state.select(rows))
        for _ in range(NEW // 2):
            feed(decoder, every, slots, found)
    for _ in range(NEW):
        feed(decoder, every, slots, found)
    return [torch.stack(logits) for logits in found]


def feed(decoder: Decoder, every: list[Tensor], slots: Tensor, found: list[list[Tensor]]) -> None:
    """A step of all that were admitted and have tokens left; one more row idles."""
    going = [i for i, logits in enumerate(found) if len(logits) <= NEW and (i < 2 or len(found[0]) > NEW // 2)]
    if not going:
        return
    tokens = [int(every[i][0, PROMPTS[i] + len(found[i]) - 1]) for i in going]
    places = [*slots[going].tolist(), -1]
    step = decoder.step(torch.tensor([*tokens, 7], device=slots.device), torch.tensor(places, device=slots.device))
    for i, logits in zip(going, step, strict=False):
        found[i].append(logits.clone())


PATHS: dict[str, Callable[[Model], Logits]] = {
    "pieces": lambda model: in_pieces(model, 32, grow=False),
    "pieces that grow": lambda model: in_pieces(model, 32, grow=True),
    "small pieces that grow": lambda model: in_pieces(model, 3, grow=True),
    "tokens": lambda model: by_token(model, graph=False),
    "batch": lambda model: in_a_batch(model, graph=False),
}
GRAPHS: dict[str, Callable[[Model], Logits]] = {
    "tokens, graph": lambda model: by_token(model, graph=True),
    "batch, graph": lambda model: in_a_batch(model, graph=True),
}


@pytest.mark.parametrize(("kind", "device", "dtype"), CASES)
@torch.no_grad()
def test_every_path_says_the_same(kind, device, dtype):
    model = build(kind).to(device, dtype)
    expected = torch.cat(whole(model)).float() if dtype == torch.bfloat16 else torch.cat(whole(model))
    found = {name: torch.cat(path(model)) for name, path in {**PATHS, **(GRAPHS if device == "cuda" else {})}.items()}
    assert all(logits.shape == expected.shape and logits.isfinite().all() for logits in found.values())
    if dtype != torch.bfloat16:
        bound = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype] * float(expected.abs().max())
        for name, logits in found.items():
            assert float((logits - expected).abs().max()) <= bound, name
            assert torch.equal(logits.argmax(-1), expected.argmax(-1)), name
        return
    truth = torch.cat(whole(model.float()))
    error, largest = (expected - truth).norm(), (expected - truth).abs().max()
    best = truth.topk(2).values
    sure = best[:, 0] - best[:, 1] > largest
    assert 0 < error < 0.1 * truth.norm() and sure.float().mean() > 0.3
    for name, logits in found.items():
        assert (logits.float() - truth).norm() <= 1.5 * error, name
        assert torch.equal(logits.argmax(-1)[sure], truth.argmax(-1)[sure]), name
