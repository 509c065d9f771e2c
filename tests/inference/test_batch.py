"""The running batch: prompts join and leave, tokens are read in blocks, and every answer is as if it were alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import Turn
from mmmamba.errors import UserError
from mmmamba.inference import engine, steps
from mmmamba.inference.answer import Answer, Ending
from mmmamba.inference.batch import RunningBatch
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.sampling import Sampler, Sampling
from mmmamba.inference.steps import Share
from mmmamba.model import Model, RopeScaling, VisionConfig, initialise
from tiny import make_config

NEW = 9
DRAWN = Sampling(temperature=1.2, top_k=60, seed=4, repetition_penalty=1.1)
LINEAR = ("mamba2",) * 5


@pytest.fixture
def many(tiny_processor: Processor) -> list[Encoded]:
    """Fourteen prompts of many lengths, four of them with pictures."""
    prompts = []
    for i in range(14):
        shown = [Image.new("RGB", (56, 56), "red")] if i % 4 == 1 else []
        prompts.append(
            tiny_processor.prompt([Turn("human", "<image>" * len(shown) + "how? " * (1 + 5 * i % 8))], shown)
        )
    return prompts


class Stopping:
    """A processor whose answers end at these tokens."""

    def __init__(self, processor: Processor, *tokens: int) -> None:
        self.stop_token_ids, self.decode = tokens, processor.decode


def budget_for(prompts: list[Encoded], slots: int) -> int:
    """Tokens that let ``slots`` of the longest prompts be answered at once."""
    return slots * (max(len(prompt.input_ids) for prompt in prompts) + NEW)


def ending_early(model: Model, processor: Processor, prompts: list[Encoded], sampling: Sampling) -> Stopping:
    """A processor with which answers end at as many different steps as two stop tokens can bring about."""
    answers = engine.generate(model, Stopping(processor), prompts, max_new_tokens=NEW, sampling=sampling)
    said = [answer.token_ids for answer in answers]

    def ends(stops: tuple[int, ...]) -> int:
        lengths = {next((i for i, token in enumerate(ids) if token in stops), NEW) for ids in said}
        return len(lengths) * (NEW in lengths)

    return Stopping(processor, *max(combinations(sorted({token for ids in said for token in ids}), 2), key=ends))


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_prompts_join_a_running_batch_and_change_no_answer(model, tiny_processor, many, sampling, monkeypatch):
    processor = ending_early(model, tiny_processor, many, sampling)
    alone = engine.generate(model, processor, many, max_new_tokens=NEW, sampling=sampling, batch_tokens=1)
    assert len({len(answer.token_ids) for answer in alone}) > 2 and {a.finish for a in alone} == {"stop", "length"}
    running: list[int] = []
    join = RunningBatch.join
    monkeypatch.setattr(RunningBatch, "join", lambda self, *args: running.append(self.running) or join(self, *args))
    for block, slots in ((1, 4), (3, 5), (16, 2)):
        running.clear()
        answers = engine.generate(
            model, processor, many, max_new_tokens=NEW, sampling=sampling,
            batch_tokens=budget_for(many, slots), block=block,
        )  # fmt: skip
        if block == 1:
            assert any(running)  # some joined others that went on
        for one, other in zip(alone, answers, strict=True):
            assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


def test_a_draw_is_keyed_by_the_prompts_number_and_its_own_step(tiny_model, tiny_processor, many):
    model = tiny_model(LINEAR).double()
    texts = [
        engine.generate(model, tiny_processor, prompts, max_new_tokens=NEW, sampling=DRAWN, batch_tokens=tokens)
        for prompts, tokens in ((many[:3], 10**6), (many, budget_for(many, 3)), ([*many[:3], *many[9:]], 1))
    ]
    assert all([answer.token_ids for answer in said[:3]] == [a.token_ids for a in texts[0]] for said in texts)


def test_slots_are_bounded_and_given_on(tiny_model, tiny_processor, many, monkeypatch):
    made, rows = [], []
    build, step = Decoder.__init__, Decoder.step

    def spy(self, model, slots, capacity, **options):
        made.append((slots, capacity))
        build(self, model, slots, capacity, **options)

    monkeypatch.setattr(Decoder, "__init__", spy)
    monkeypatch.setattr(Decoder, "step", lambda self, *args: rows.append(len(args[0])) or step(self, *args))
    model, calls = tiny_model().double(), []
    free = Stopping(tiny_processor)
    engine.generate(
        model, free, many, max_new_tokens=NEW, batch_tokens=budget_for(many, 4),
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert all(slots * (capacity - 1) <= budget_for(many, 4) for slots, capacity in made)
    assert len(made) <= 2 and sum(slots for slots, _ in made) < len(many)
    assert sum(rows) == len(many) * (NEW - 1)  # nobody is stepped after its last token
    assert calls == sorted(set(calls)) and calls[-1] == (14, 14)


def test_a_row_that_ends_inside_a_block_idles(tiny_model, tiny_processor, many, monkeypatch):
    model = tiny_model().double()
    processor = ending_early(model, tiny_processor, many, Sampling())
    fed = 0
    step = Decoder.step

    def spy(self, tokens, slots):
        nonlocal fed
        fed += int((slots >= 0).sum())
        return step(self, tokens, slots)

    monkeypatch.setattr(Decoder, "step", spy)
    answers = engine.generate(model, processor, many, max_new_tokens=NEW, block=16)
    # Of an answer all tokens are fed but the last; one that a stop token ended has had all of its own fed.
    assert fed == sum(len(answer.token_ids) - (answer.finish == "length") for answer in answers)


def test_logits_that_the_next_step_overwrites_are_used_before(tiny_model, tiny_processor, many, monkeypatch):
    model = tiny_model().double()
    options = {"max_new_tokens": NEW, "sampling": DRAWN, "batch_tokens": budget_for(many, 4), "block": 3}
    expected = engine.generate(model, Stopping(tiny_processor), many, **options)
    kept, step = torch.empty(len(many), model.config.vocab_size, dtype=torch.float64), Decoder.step

    def replayed(*args):  # as a CUDA graph gives them
        logits = step(*args)
        kept.fill_(math.nan)
        kept[: len(logits)] = logits
        return kept[: len(logits)]

    monkeypatch.setattr(Decoder, "step", replayed)
    assert engine.generate(model, Stopping(tiny_processor), many, **options) == expected


def test_shares_keep_to_the_budget(tiny_model, many):
    model = tiny_model()
    lengths = [5, 100, 7, 30, 31, 6, 300, 40]
    prompts = [replace(many[0], input_ids=np.full(n, 20, np.int32)) for n in lengths]
    shares = list(steps.shares(model, prompts, extra=10, budget=100))
    assert [lengths[i] for share in shares for i in share.members] == sorted(lengths, reverse=True)
    for share in shares:
        assert share.capacity == max(lengths[i] for i in share.members) + 10
        assert share.slots == 1 or share.slots * share.capacity <= 100
    assert [share.slots for share in shares] == [1, 1, 2, 3]  # much shorter ones are answered more at once
    (whole,) = steps.shares(model, prompts, extra=10, budget=10**4)
    assert whole.slots == 8


def test_dynamic_rope_scaling_keeps_what_is_rotated_otherwise_apart(many):
    scaling = {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "max_position_embeddings": 50}
    config = make_config(("attention",) * 5)
    model = Model(replace(config, decoder=replace(config.decoder, **scaling)))
    prompts = [replace(many[0], input_ids=np.full(n, 20, np.int32)) for n in (5, 60, 20, 60, 55, 41)]
    shares = list(steps.shares(model, prompts, extra=10, budget=10**4))
    assert [(share.members, share.fixed["max_length"]) for share in shares] == [
        ((1, 3), 70),
        ((4,), 65),
        ((5,), 51),
        ((2, 0), 50),
    ]


@pytest.mark.parametrize("place", ["pre", "post"])
def test_the_extent_of_a_prompt_is_what_its_state_holds(place, tiny_processor, many):
    config = make_config(LINEAR, vision=VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc=place))
    model = initialise(Model(config)).eval()
    for prompt in many[:3]:
        with torch.no_grad():
            _, state = steps.prefill(model, [prompt], chunk=100, max_new_tokens=1)
        assert steps.extent(model, prompt) == state.longest


def test_patches_that_become_tokens_late_fit_into_the_pool(layer_map, tiny_processor, many):
    config = make_config(layer_map, vision=VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc="post"))
    model = initialise(Model(config)).double().eval()
    free = Stopping(tiny_processor)
    alone = engine.generate(model, free, many, max_new_tokens=NEW, batch_tokens=1)
    together = engine.generate(model, free, many, max_new_tokens=NEW, batch_tokens=budget_for(many, 5), block=4)
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in together]


@pytest.mark.parametrize("block", [1, 16])
def test_nan_is_reported_of_the_prompt_and_the_step(block, tiny_model, tiny_processor, many, monkeypatch):
    picks = 0
    pick = Sampler.pick

    def broken(self, logits):
        nonlocal picks
        picks += 1
        tokens, logprobs = pick(self, logits)
        if picks == 4:
            logprobs[1] = math.nan
        return tokens, logprobs

    monkeypatch.setattr(Sampler, "pick", broken)
    second = sorted(range(14), key=lambda i: (-len(many[i].input_ids), i))[1]
    prompts = [replace(prompt, id=f"q{i}") for i, prompt in enumerate(many)]
    with pytest.raises(UserError, match=rf"NaN at token 3 of its answer to 'q{second}'"):
        engine.generate(tiny_model().double(), Stopping(tiny_processor), prompts, max_new_tokens=NEW, block=block)


def test_nan_behind_the_end_of_an_answer_is_nobodys(tiny_model, tiny_processor, many, monkeypatch):
    model = tiny_model().double()
    (free,) = engine.generate(model, Stopping(tiny_processor), many[:1], max_new_tokens=NEW)
    pick, picks = Sampler.pick, 0

    def broken(self, logits):
        nonlocal picks
        picks += 1
        tokens, logprobs = pick(self, logits)
        return tokens, logprobs if picks < 5 else torch.full_like(logprobs, math.nan)

    monkeypatch.setattr(Sampler, "pick", broken)
    stop = next(token for i, token in enumerate(free.token_ids) if token not in free.token_ids[:i] and i < 4)
    (answer,) = engine.generate(model, Stopping(tiny_processor, stop), many[:1], max_new_tokens=NEW, block=16)
    assert answer.finish == "stop" and answer.token_ids == free.token_ids[: len(answer.token_ids)]


class Watching(TorchDispatchMode):
    """Notes operators for whose result a GPU's host has to wait, but for those of the pool's own step."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on, step = True, Decoder.step

        def unwatched(*args):
            self.on = False
            logits = step(*args)
            self.on = True
            return logits

        monkeypatch.setattr(Decoder, "step", unwatched)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if self.on and (name in self.WAITING or masked):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_the_host_reads_the_device_at_the_end_of_a_block_only(model, tiny_processor, many, sampling, monkeypatch):
    reads: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.numel()) or tolist(self))
    ending = Ending.of(tiny_processor, (), NEW)
    share = Share(members=tuple(range(4)), slots=4, capacity=200, fixed={"max_length": 200, "max_embedded": None})
    with torch.no_grad():
        batch = RunningBatch(model, share, sampling, replace(ending, tokens=frozenset()), 4)
        answers = [Answer(prompt, batch._ending) for prompt in many[:4]]
        logits, state = steps.prefill(model, many[:4], chunk=1000, max_new_tokens=NEW)
        batch.join(answers, range(4), logits, state)
        reads.clear()
        with Watching(monkeypatch) as watching:
            assert batch.advance() == 0 and batch.advance() == 0
    assert watching.found == [] and reads == [16] * 4
    assert [len(answer.token_ids) for answer in answers] == [8] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_on_a_gpu_nothing_waits_inside_a_block(tiny_processor, many, sampling, monkeypatch):
    config = make_config(("attention", "mamba2", "mamba2", "attention", "mamba2"))
    stacks = {name: replace(getattr(config, name), head_dim=32) for name in ("embedding", "decoder")}
    model = initialise(Model(replace(config, **stacks))).requires_grad_(False).eval().to("cuda")
    options = {"max_new_tokens": 100, "sampling": sampling}
    # No answer ends early, so that both decode the same rows together.
    (one, other) = (engine.generate(model, Stopping(tiny_processor), many, block=block, **options) for block in (1, 16))
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
    calls = 0

    def strict(function):
        def call(*args):
            nonlocal calls
            calls += 1
            torch.cuda.set_sync_debug_mode("error" if calls > 20 else "default")  # not while graphs are made
            result = function(*args)
            torch.cuda.set_sync_debug_mode("default")
            return result

        return call

    for owner, name in ((Decoder, "step"), (Sampler, "pick")):
        monkeypatch.setattr(owner, name, strict(getattr(owner, name)))
    stops = Stopping(tiny_processor, one[0].token_ids[40], one[1].token_ids[70])
    answers = engine.generate(model, stops, many, **options)
    assert len(answers) == len(many) and calls > 60


@pytest.mark.parametrize("block", [1, 16])
def test_the_longest_answer_may_be_any_number(tiny_model, tiny_processor, many, block):
    model = tiny_model(LINEAR)
    ending = Stopping(tiny_processor, *range(model.config.vocab_size))
    answers = engine.generate(model, ending, many[:2], max_new_tokens=10**23, block=block)
    assert [answer.finish for answer in answers] == ["stop", "stop"]
