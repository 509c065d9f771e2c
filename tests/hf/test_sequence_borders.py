"""Packed rows: each sequence of a row gives what it gives alone, however the caller says where it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening
from wrapped import TILES_OF_ROW, generated, row, wrap

from mmmamba.errors import UserError
from mmmamba.hf.state_cache import CACHE
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model

SEQUENCES = ([1, 20, 30], [1, 40, 50, 60, 70], [9, 8])
BORDERS = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
FLAT = torch.tensor([[token for one in SEQUENCES for token in one]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]])
WAYS = {
    "position_ids": {"position_ids": POSITIONS},
    "borders": {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS, "max_length_q": 5, "max_length_k": 5},
    "lists": {"cu_seq_lens_q": BORDERS.tolist(), "cu_seq_lens_k": BORDERS.tolist()},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)},
    "all": {
        "position_ids": POSITIONS,
        "cu_seq_lens_q": BORDERS,
        "cu_seq_lens_k": BORDERS,
        "attention_mask": torch.ones(1, 10),
    },
}


@pytest.fixture(params=["teacher", "hybrid"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Model]) -> Any:
    kinds = (ATTENTION,) * 5 if request.param == "teacher" else (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
    return wrap(tiny_model(kinds, Mamba2Options(rope=True)).double())


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_sequences_of_a_row_do_not_see_one_another(model: Any, way: str) -> None:
    alone = torch.cat([model(torch.tensor([one])).logits for one in SEQUENCES], 1)
    out = model(FLAT, **WAYS[way], output_hidden_states=True)
    assert torch.allclose(out.logits, alone) and CACHE not in out
    assert torch.equal(model.head(out.hidden_states[-1]), out.logits)
    assert torch.allclose(model(FLAT, **WAYS[way], logits_to_keep=1).logits, alone[:, -1:])
    assert torch.allclose(model.base_model(FLAT, **WAYS[way]).last_hidden_state, out.hidden_states[-1])
    embedded = model.text_embeddings(FLAT)
    assert torch.allclose(model(inputs_embeds=embedded, **WAYS[way]).logits, alone)


@torch.no_grad()
def test_what_collators_make(model: Any) -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": one, "labels": one} for one in SEQUENCES])
    loss = model(**batch).loss
    alone = [model(torch.tensor([one]), labels=torch.tensor([one])).loss * (len(one) - 1) for one in SEQUENCES]
    assert torch.allclose(loss, sum(alone) / 7)


@torch.no_grad()
def test_rows_with_pictures_and_padding(model: Any, prompt: dict[str, torch.Tensor]) -> None:
    ids, mask = torch.full((2, 16), 2), torch.zeros(2, 16, dtype=torch.long)
    parts = [[row(prompt, 0)["input_ids"][0], row(prompt, 1)["input_ids"][0]], [row(prompt, 2)["input_ids"][0]]]
    positions = torch.ones(2, 16, dtype=torch.long)  # at padding: anything
    for i, sequences in enumerate(parts):
        joined = torch.cat(sequences)
        ids[i, 16 - len(joined) :], mask[i, 16 - len(joined) :] = joined, 1
        positions[i, 16 - len(joined) :] = torch.cat([torch.arange(len(one)) for one in sequences])
    inputs = {"pixel_values": prompt["pixel_values"], "attention_mask": mask, "position_ids": positions}
    logits = model(ids, **inputs).logits
    assert not logits[mask == 0].any()
    alone = torch.cat([model(**row(prompt, i)).logits[0] for i in range(3)])
    assert torch.allclose(logits[mask != 0], alone)
    assert [TILES_OF_ROW[0].stop, len(prompt["pixel_values"])] == [1, 3]
    lasts = model(ids, **inputs, logits_to_keep=1).logits[:, 0]
    assert torch.allclose(lasts, torch.stack([logits[0, -1], logits[1, -1]]))


@torch.no_grad()
def test_positions_that_say_nothing_new(model: Any, prompt: dict[str, torch.Tensor]) -> None:
    expected, mask = model(**prompt).logits, prompt["attention_mask"]
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    for positions in (counted, counted.masked_fill(mask == 0, 1), torch.arange(14)[None]):
        assert torch.equal(model(**prompt, position_ids=positions).logits, expected)
    past, new = model(**prompt)[CACHE], torch.tensor([[21], [22], [23]])
    rest = model(new, **{CACHE: past}).logits
    for positions in (mask.sum(1, keepdim=True), torch.tensor([[14]])):
        assert torch.equal(model(new, **{CACHE: past}, position_ids=positions).logits, rest)
    with pytest.raises(UserError, match="position_ids begin at"):
        model(new, **{CACHE: past}, position_ids=torch.tensor([[5]]))
    with pytest.raises(UserError, match="can't continue from a cache"):
        model(new.expand(3, 2), **{CACHE: past}, position_ids=torch.tensor([[0, 0]]))
    assert torch.equal(generated(model, **prompt, position_ids=counted), generated(model, **prompt))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10, 11]])}, r"position_ids\[0\] go from 2 to 5"),
        ({"position_ids": torch.arange(9)[None]}, r"position_ids is \(1, 9\), expected \(1, 10\)"),
        ({"position_ids": torch.zeros(3, 1, 10)}, r"position_ids is \(3, 1, 10\)"),
        ({"cu_seq_lens_q": BORDERS}, "must be the same borders"),
        ({"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS + 1}, "must be the same borders"),
        (dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), BORDERS[:-1]), "must rise from 0 to 10"),
        (dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 5, 3, 10])), "must rise from 0 to 10"),
        ({**WAYS["borders"], "seq_idx": torch.zeros(1, 10)}, "other tokens than cu_seq_lens"),
        ({**WAYS["seq_idx"], "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2, 3, 4, 0, 1]])}, "a sequence goes on"),
        ({**WAYS["borders"], "attention_mask": torch.tensor([[0] + [1] * 9])}, "attention_mask or cu_seq_lens"),
        ({**WAYS["position_ids"], "use_cache": True}, "have no cache"),
        ({**WAYS["position_ids"], "output_attentions": True}, "no square of weights"),
    ],
)
def test_what_contradicts_itself_is_refused(model: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(FLAT, **inputs)
