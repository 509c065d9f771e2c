"""Where patches become tokens: before the layers, behind the embedding stack, or nowhere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmamba.errors import UserError
from mmmamba.model import Model, RopeScaling, VisionConfig, initialise
from mmmamba.model.model import Output
from mmmamba.model.rope import rotation
from mmmamba.model.vision import PatchRow
from tiny import make_config

HYBRID = ("attention", "mamba2", "mamba2", "mamba2", "attention")
IMAGE = make_config().img_context_token_id
TILE = 4  # tokens of a 56-px tile of 14-px patches, 16 patches


def model_with(loc: str = "post", layer_map: tuple[str, ...] = (), **changes) -> Model:
    vision = VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc=loc)  # type: ignore[arg-type]
    model = initialise(Model(make_config(layer_map, vision=vision, **changes)), 3).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


def prompt(*pieces: int, seed: int = 0) -> Tensor:
    """Random ids (1, l): text of each length in ``pieces``, with a tile between any two of them."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for i, length in enumerate(pieces):
        parts += [torch.full((TILE,), IMAGE)] if i else []
        parts.append(torch.randint(10, 300, (length,), generator=generator))
    return torch.cat(parts)[None]


def tiles(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def run(model: Model, layers: range, x: Tensor) -> Tensor:
    """Some layers over x (1, l, d), with positions from 0; dynamic scaling goes by how many there are."""
    turn = rotation(model.config.stack_of(layers[0]), torch.arange(x.shape[1])[None], x.shape[1], x.dtype)
    for i in layers:
        x, _ = model.layers[i](x, rotation=turn)
    return x


def directly(model: Model, ids: Tensor, pixels: Tensor) -> Tensor:
    """Logits (1, l, v) with ``post``, from its definition: two rows of ids, token by token and patch by patch."""
    config, vision = model.config, model.vision
    assert vision is not None
    patches = list(vision.patches(pixels).flatten(0, 2))
    columns: list[Tensor] = []  # what the embedding stack reads
    pictured: list[bool] = []
    for token in ids[0].tolist():
        if token == IMAGE:
            columns += [patches.pop(0) for _ in range(4)]
            pictured += [True] * 4
        else:
            columns.append(model.text_embeddings.weight[token])
            pictured.append(False)
    assert not patches
    x = run(model, range(config.embedding.num_layers), torch.stack(columns)[None])[0]
    seen = x[torch.tensor(pictured)].view(len(pixels), 4, 4, -1)  # tile, row, column
    merged = []
    for tile in seen:
        for r, c in itertools.product((0, 2), (0, 2)):
            merged.append(vision.proj(torch.cat([tile[r, c], tile[r, c + 1], tile[r + 1, c], tile[r + 1, c + 1]])))
    text = list(x[~torch.tensor(pictured)])
    row = torch.stack([(merged if token == IMAGE else text).pop(0) for token in ids[0].tolist()])[None]
    return model.head(model.norm(run(model, range(config.embedding.num_layers, config.num_layers), row)))


@pytest.mark.parametrize("layer_map", [(), HYBRID, ("mamba2",) * 5], ids=["teacher", "hybrid", "linear"])
def test_shuffled_behind_the_embedding_stack(layer_map):
    model = model_with(layer_map=layer_map)
    ids, pixels = prompt(3, 2, 5), tiles(2)
    same(model(ids, pixels).logits, directly(model, ids, pixels))
    text = prompt(7)
    same(model(text).logits, run_text(model, text))


def run_text(model: Model, ids: Tensor) -> Tensor:
    x = run(model, range(2), model.text_embeddings(ids))
    return model.head(model.norm(run(model, range(2, 5), x)))


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4))
def test_packed_padded_and_alone_agree_with_late_tokens(lengths):
    model = model_with(layer_map=HYBRID)
    rows = [prompt(*pieces, seed=i) for i, pieces in enumerate(lengths)]
    pictures = [tiles(len(pieces) - 1, seed=i) for i, pieces in enumerate(lengths)]
    alone = [model(row, p if len(p) else None).logits[0] for row, p in zip(rows, pictures, strict=True)]
    pixels = torch.cat(pictures) if any(len(p) for p in pictures) else None
    sizes = torch.tensor([row.shape[1] for row in rows])
    cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    packed = model(torch.cat(rows, 1), pixels, cu_seqlens=cu)
    same(packed.logits[0], torch.cat(alone))
    longest = int(sizes.max())
    for side in ("left", "right"):
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest)
        for i, row in enumerate(rows):
            where = slice(longest - row.shape[1], longest) if side == "left" else slice(0, row.shape[1])
            ids[i, where], mask[i, where] = row[0], 1
        padded = model(ids, pixels, mask)
        for i, truth in enumerate(alone):
            same(padded.logits[i][mask[i].bool()], truth)
            assert float(padded.logits[i][~mask[i].bool()].abs().sum()) == 0


def test_rows_of_one_length_may_differ_in_pictures():
    model = model_with()
    rows, pixels = torch.cat([prompt(3, 4), prompt(3 + TILE + 4, seed=1)]), tiles(1)
    together = model(rows, pixels)
    same(together.logits[:1], model(rows[:1], pixels).logits)
    same(together.logits[1:], model(rows[1:]).logits)
    same(model(rows, pixels, logits="last").logits, together.logits[:, -1])


@pytest.mark.parametrize("layer_map", [(), HYBRID], ids=["teacher", "hybrid"])
def test_each_stack_goes_on_from_its_own_position(layer_map):
    model = model_with(layer_map=layer_map)
    ids, pixels = prompt(3, 2, 5), tiles(2)
    whole = model(ids, pixels, return_state=True)
    first: Output = model(ids[:, :8], pixels[:1], return_state=True)
    assert first.state is not None and first.state.embedded is not None
    assert first.state.positions.tolist() == [8] and first.state.embedded.tolist() == [8 - TILE + 16]
    second = model(ids[:, 8:15], pixels[1:], state=first.state, return_state=True)
    logits, state = [first.logits, second.logits], second.state
    for t in range(15, ids.shape[1]):
        out = model(ids[:, t : t + 1], state=state, return_state=True)
        logits, state = [*logits, out.logits], out.state
    same(torch.cat(logits, 1), whole.logits)
    assert state.embedded.tolist() == whole.state.embedded.tolist() == [ids.shape[1] + 2 * 12]
    assert state.select(torch.tensor([0, 0])).to("cpu").embedded.tolist() == [ids.shape[1] + 24] * 2
    assert state.nbytes == model_state_bytes(state)


def model_state_bytes(state) -> int:
    tensors = [t for layer in state.layers for t in vars(layer).values()] + [state.positions, state.embedded]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_gradients_reach_patches_and_projection():
    model = model_with().requires_grad_(True)
    model(prompt(3, 4), tiles(1)).logits[:, -1].sum().backward()
    for name in ("patch_embedding.weight", "position_embedding", "proj.0.weight", "proj.2.bias"):
        assert float(model.vision.get_parameter(name).grad.abs().sum()) > 0
    with torch.no_grad():  # the decoder's first token is the embedding stack's: causal in both
        one, other = (model(prompt(3, 4), tiles(1, seed=s)).logits for s in (0, 1))
    same(one[:, :3], other[:, :3])
    assert float((one - other)[:, 3:].abs().min(dim=-1).values.max()) > 0


@pytest.mark.parametrize("loc", ["pre", "post", "none"])
def test_positions_of_a_tile_are_what_the_network_takes(loc):
    model = model_with(loc)
    count = model.config.vision.tokens_per_tile
    assert count == (16 if loc == "none" else TILE)
    ids = torch.cat([torch.full((1, 2 * count), IMAGE), prompt(2)], 1)
    assert model(ids, tiles(2)).logits.shape == (1, 2 * count + 2, 320)
    tokens = 16 if loc == "none" else TILE
    with pytest.raises(
        ValueError, match=f"{2 * count} <IMG_CONTEXT> positions for {tokens} image tokens \\(1 tiles\\)"
    ):
        model(ids, tiles(1))


@pytest.mark.parametrize("loc", ["pre", "post", "none"])
def test_pictures_go_where_the_embedding_of_their_mark_is(loc):
    model = model_with(loc)
    count = model.config.vision.tokens_per_tile
    ids = torch.cat([prompt(2), torch.full((1, count), IMAGE), prompt(2)], 1)
    embedded = model.text_embeddings(ids)
    same(model(inputs_embeds=embedded, pixel_values=tiles(1)).logits, model(ids, tiles(1)).logits)
    with pytest.raises(ValueError, match="0 <IMG_CONTEXT> positions"):
        model(inputs_embeds=embedded + 1, pixel_values=tiles(1))


def test_hidden_states_of_layers():
    model = model_with("pre")
    ids, mask = prompt(9), torch.tensor([[0, 0, *[1] * 7]])
    out = model(ids, return_layers=True)
    same(out.layers[0], model.text_embeddings(ids))
    assert len(out.layers) == 6 and out.layers[-1] is out.hidden
    same(model(ids[:, 2:], return_layers=True).layers[3], model(ids, None, mask, return_layers=True).layers[3][:, 2:])
    assert model(ids).layers is None
    with pytest.raises(UserError, match="no hidden state for each token"):
        model_with("post")(prompt(3, 4), tiles(1), return_layers=True)


def test_without_a_shuffle_the_patches_are_the_tokens():
    model = model_with("none")
    pixels = tiles(2)
    same(model.vision(pixels), model.vision.patches(pixels).flatten(1, 2))
    bare = VisionConfig(image_size=56, patch_size=14, use_pixel_shuffle_proj=False)
    assert bare.tokens_per_tile == 16
    assert Model(make_config(vision=bare)).vision(pixels.float()).shape == (2, 16, 64)
    with pytest.raises(ValueError, match="needs use_pixel_shuffle_proj"):
        replace(bare, pixel_shuffle_loc="post")


def test_what_late_tokens_do_not_allow_is_refused():
    model = model_with()
    ids, pixels = prompt(3, 4), tiles(1)
    with pytest.raises(ValueError, match="give ids and pixels"):
        model.embed(ids, pixels)
    with pytest.raises(UserError, match="cannot be aligned token by token"):
        model(ids, pixels, observe=lambda *_: None)
    with pytest.raises(ValueError, match="not both"):
        model(ids, pixels, torch.tensor([[1] * 10 + [0]]), cu_seqlens=torch.tensor([0, 11]))


@pytest.mark.parametrize("limit", [8, 20, 30])
@pytest.mark.parametrize("layer_map", [(), HYBRID], ids=["teacher", "hybrid"])
def test_each_stack_is_scaled_by_the_positions_that_it_reads(layer_map, limit, caplog):
    scaling = {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "max_position_embeddings": limit}
    config = make_config()
    stacks = {name: replace(getattr(config, name), **scaling) for name in ("embedding", "decoder")}
    model = model_with(layer_map=layer_map, **stacks)
    ids, pixels = prompt(3, 2, 5), tiles(2)  # 18 tokens, 42 positions
    truth = directly(model, ids, pixels)
    whole = model(ids, pixels, return_state=True)
    same(whole.logits, truth)
    assert (whole.state.max_length, whole.state.max_embedded) == (18, 42)
    first = model(ids[:, :8], pixels[:1], return_state=True, max_length=18, max_embedded=42)
    second = model(ids[:, 8:15], pixels[1:], state=first.state, return_state=True)
    third = model(ids[:, 15:], state=second.state, return_state=True)
    same(torch.cat([first.logits, second.logits, third.logits], 1), truth)
    assert third.state.max_embedded == 42 and not caplog.records
    room = model(ids[:, :15], pixels, return_state=True, max_length=18).state  # what text alone will add is known
    assert (room.max_length, room.max_embedded) == (18, 42)
    model(ids[:, 15:], pixels[:0], state=replace(room, max_embedded=40))
    assert "the row of patches grew to 42 positions, past the 40" in caplog.text


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_widening_and_narrowing_are_inverse(image, border, merged):
    mask = torch.tensor(image, dtype=torch.bool)
    count, total = int(mask.sum()), len(image)
    patches = torch.randn(1, count, merged, 2)
    row = PatchRow(mask, torch.tensor([0, min(border, total), total]), patches, merged)
    x = torch.randn(1, total, 2)
    wide = row.widen(x)
    assert wide.shape[1] == int(row.cu_seqlens[-1]) == total + count * (merged - 1)
    assert int(row.cu_seqlens[1]) == sum(merged if one else 1 for one in image[:border])
    back = row.narrow(wide, lambda p: p.sum(2))
    torch.testing.assert_close(back[0, ~mask], x[0, ~mask])
    torch.testing.assert_close(back[0, mask], patches[0].sum(1))
