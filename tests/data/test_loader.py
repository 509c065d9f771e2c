"""A loader gives the same batches for any number of workers, and from any step on."""

from __future__ import annotations

import pytest
import torch
from encoded_samples import equal, make_encoded

from mmmamba.data.loader import Concatenated, Loader
from mmmamba.data.packed_batch import pack, split
from mmmamba.data.processor import Encoded
from mmmamba.data.sample import BadSample
from mmmamba.data.sample_order import Order
from mmmamba.errors import UserError


class Numbers:
    """A source of random samples, some of them bad."""

    def __init__(self, size: int, bad: tuple[int, ...] = (), broken: tuple[int, ...] = (), offset: int = 0) -> None:
        self.size, self.bad, self.broken, self.offset = size, bad, broken, offset

    def __len__(self) -> int:
        return self.size

    def encode(self, index: int) -> Encoded:
        if index in self.bad:
            raise BadSample(f"file.jsonl:{index}: 'image': no such file")
        if index in self.broken:
            raise UserError("the disk is gone")
        encoded = make_encoded(index + self.offset)
        encoded.cut = index % 2
        return encoded


def make_loader(source=None, **options) -> Loader:
    source = source or Numbers(40)
    return Loader(source, Order(len(source), seed=5, batch_size=8), **{"end_step": 6, **options})


def test_concatenated_sources():
    both = Concatenated([Numbers(3), Numbers(0), Numbers(4, offset=100)])
    assert len(both) == 7
    assert [both.encode(i).id for i in range(7)] == ["id0", "id1", "id2", "id100", "id101", "id102", "id103"]
    assert len(Concatenated([])) == 0


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_workers_change_nothing(max_tokens):
    alone = list(make_loader(max_tokens=max_tokens))
    shared = list(make_loader(max_tokens=max_tokens, workers=2))
    assert len(alone) == len(shared) == 6
    for a, b in zip(alone, shared, strict=True):
        assert len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def test_micro_batches_hold_the_step():
    order, source = Order(40, seed=5, batch_size=8), Numbers(40)
    for step, micro in enumerate(make_loader(max_tokens=40)):
        groups = split([source.encode(index) for index in order.indices(step)], 40)
        assert len(micro) == len(groups) > 1
        assert all(equal(batch, pack(group)) for batch, group in zip(micro, groups, strict=True))
        assert all(batch.cu_seqlens[0] == 0 and batch.input_ids.is_contiguous() for batch in micro)


def test_resumes_at_any_step():
    steps = list(make_loader())
    resumed = list(make_loader(start_step=4))
    assert len(resumed) == 2 and all(equal(a[0], b[0]) for a, b in zip(steps[4:], resumed, strict=True))


def test_goes_on_for_ever():
    steps = iter(make_loader(end_step=None))
    assert sum(len(next(steps)) for _ in range(20)) == 20


def test_loading_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(make_loader())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_raises_the_sample_s_own_error(workers):
    order = Order(40, seed=5, batch_size=8)
    bad = order.indices(2)[3]
    steps = iter(make_loader(Numbers(40, bad=(bad,)), workers=workers))
    assert next(steps) and next(steps)
    with pytest.raises(BadSample) as caught:
        next(steps)
    assert str(caught.value) == f"file.jsonl:{bad}: 'image': no such file"


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_and_lists(workers):
    bad = tuple(Order(40, seed=5, batch_size=8).indices(1))
    loader = make_loader(Numbers(40, bad=bad), workers=workers, on_bad_sample="skip", end_step=10)
    steps = list(loader)
    assert steps[1] == [] and steps[0][0].sequences == 8  # the first epoch ends after step 4
    assert sum(batch.sequences for step in steps for batch in step) == 64
    assert loader.skipped == 16 and len(loader.bad_samples) == 8
    assert sorted(skipped.index for skipped in loader.bad_samples) == sorted(bad)
    first = loader.bad_samples[0]
    assert (first.where, first.reason) == (f"file.jsonl:{first.index}", "'image': no such file")
    assert loader.truncated == 2 * sum(index % 2 for index in range(40) if index not in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_never_skipped(workers):
    loader = make_loader(Numbers(40, broken=tuple(range(40))), on_bad_sample="skip", workers=workers)
    with pytest.raises(UserError, match=r"^the disk is gone$"):
        list(loader)


def test_wrong_options():
    with pytest.raises(UserError, match="'stop' or 'skip'"):
        make_loader(on_bad_sample="ignore")
    with pytest.raises(ValueError, match="order is over 5 samples, the dataset has 40"):
        Loader(Numbers(40), Order(5, batch_size=2))
