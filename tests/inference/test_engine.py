"""Generation, streaming and scoring: batches, chunks and carried states change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmmamba.data import lazy_pictures, video
from mmmamba.data.lazy_pictures import PictureFile
from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import Sample, Turn
from mmmamba.data.tiling import normalise
from mmmamba.errors import UserError
from mmmamba.inference import engine, steps
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.stream import Stream
from mmmamba.model import Mamba2Options, Model, RopeScaling, VisionConfig, initialise
from tiny import make_config
from videos import write_video

NEW = 8


@dataclass
class StoppingAt:
    """A processor whose answers end at other tokens than its template's."""

    processor: Processor
    stop_token_ids: tuple[int, ...]

    def decode(self, ids):
        return self.processor.decode(ids)


def picture(colour: str, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new("RGB", size, colour)


def pixels(encoded: Encoded) -> torch.Tensor | None:
    return normalise(torch.from_numpy(encoded.tiles)).double() if len(encoded.tiles) else None


def greedy_without_state(model: Model, encoded: Encoded, steps: int, **fixed: int | None) -> list[int]:
    """The plainest decoding there is: the whole sequence again for each token."""
    ids = torch.from_numpy(encoded.input_ids).long()[None]
    picked: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            scores = model(ids, pixels(encoded), logits="last", **fixed).logits[0]
            scores[model.config.img_context_token_id] = -math.inf
            picked.append(int(scores.argmax()))
            ids = torch.cat([ids, torch.tensor([[picked[-1]]])], dim=1)
    return picked


def test_generate_equals_decoding_from_scratch(model, tiny_processor, prompts):
    processor = StoppingAt(tiny_processor, ())
    answers = engine.generate(model, processor, prompts, max_new_tokens=NEW)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == greedy_without_state(model, prompt, NEW)
        assert answer.finish == "length" and answer.text == tiny_processor.decode(answer.token_ids)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=50, seed=3, repetition_penalty=1.2)])
def test_answers_do_not_depend_on_the_batch(model, tiny_processor, prompts, sampling):
    # Stop tokens taken from the answers make rows leave the batch at different steps.
    free = engine.generate(model, StoppingAt(tiny_processor, ()), prompts, max_new_tokens=NEW, sampling=sampling)
    stops = (free[0].token_ids[2], free[1].token_ids[4], free[2].token_ids[0])
    processor = StoppingAt(tiny_processor, stops)

    def run(**options) -> list[engine.Generated]:
        return engine.generate(model, processor, prompts, max_new_tokens=NEW, sampling=sampling, **options)

    together = run()
    for before, answer in zip(free, together, strict=True):
        ends = [i for i, token in enumerate(before.token_ids) if token in stops]
        assert answer.token_ids == before.token_ids[: ends[0]] if ends else answer.token_ids == before.token_ids
        assert answer.finish == ("stop" if ends else "length")
        assert len(answer.logprobs) == len(answer.token_ids)
    assert len({len(answer.token_ids) for answer in together}) > 2
    for options in ({"batch_tokens": 1}, {"batch_tokens": 150}, {"prefill_chunk": 5}, {"block": 3}, {"block": 16}):
        for one, other in zip(together, run(**options), strict=True):
            assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_the_whole(model, prompts, chunk):
    for prompt in prompts:
        ids = torch.from_numpy(prompt.input_ids).long()[None]
        with torch.no_grad():
            whole = model(ids, pixels(prompt), logits="last", return_state=True)
            logits, state = steps.prefill(model, [prompt], chunk=chunk, max_new_tokens=1)
        assert torch.allclose(logits, whole.logits, atol=1e-9, rtol=0)
        assert torch.equal(state.positions, whole.state.positions)


def test_scaled_patches_are_answered_alike_however_they_are_read(tiny_model, layer_map, tiny_processor):
    scaling = {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "max_position_embeddings": 24}
    config = make_config(layer_map, vision=VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc="post"))
    config = replace(config, embedding=replace(config.embedding, **scaling), decoder=replace(config.decoder, **scaling))
    model = initialise(Model(config), 0).double().eval()
    processor = Processor(tiny_processor.tokenizer, config)
    prompts = [
        processor.prompt(
            [Turn("human", "<image> what <image>\nhow many?")], [picture("red"), picture("blue", (112, 56))]
        ),
        processor.prompt([Turn("human", "<image> what?")], [picture("red")]),
        processor.prompt([Turn("human", "what?")], []),
    ]
    alone = [greedy_without_state(model, prompt, NEW, **steps.fixed_for(model, [prompt], NEW)) for prompt in prompts]
    for options in ({}, {"prefill_chunk": 6}, {"batch_tokens": 1}):
        answers = engine.generate(model, StoppingAt(tiny_processor, ()), prompts, max_new_tokens=NEW, **options)
        assert [list(answer.token_ids) for answer in answers] == alone
    for prompt, tokens in zip(prompts, alone, strict=True):
        stream = Stream(model, StoppingAt(tiny_processor, ()), prompt, max_new_tokens=NEW)
        assert "".join(stream) is not None and list(stream.token_ids) == tokens


@pytest.mark.parametrize("chunk", [1, 6, 20])
def test_patches_that_become_tokens_late_are_read_in_chunks_too(tiny_model, layer_map, tiny_processor, chunk):
    config = make_config(layer_map, vision=VisionConfig(image_size=56, patch_size=14, pixel_shuffle_loc="post"))
    model = initialise(Model(config), 0).double().eval()
    prompt = Processor(tiny_processor.tokenizer, config).prompt(
        [Turn("human", "<image> what <image>\nhow many?")], [picture("red"), picture("blue", (112, 56))]
    )
    with torch.no_grad():
        ids = torch.from_numpy(prompt.input_ids).long()[None]
        whole = model(ids, pixels(prompt), logits="last", return_state=True)
        logits, state = steps.prefill(model, [prompt], chunk=chunk, max_new_tokens=1)
    assert torch.allclose(logits, whole.logits, atol=1e-9, rtol=0)
    assert torch.equal(state.positions, whole.state.positions) and torch.equal(state.embedded, whole.state.embedded)


def test_many_pictures_are_decoded_and_embedded_as_they_are_read(tiny_model, tiny_processor, monkeypatch, tmp_path):
    model = tiny_model(("mamba2",) * 5).double()
    random = np.random.default_rng(0)
    files = []
    for i in range(50):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (56, 112, 3), np.uint8)).save(files[-1])
    turns = [Turn("human", "what?")]
    whole = tiny_processor.prompt(turns, files)
    unread = tiny_processor.prompt(turns, [PictureFile.check(file, "here") for file in files])
    events: list[int] = []  # -1 for a picture decoded, else how many tiles are embedded together
    read, embed = lazy_pictures.load_image, model.vision.forward
    monkeypatch.setattr(lazy_pictures, "load_image", lambda path, where: events.append(-1) or read(path, where))
    monkeypatch.setattr(model.vision, "forward", lambda pixels: events.append(len(pixels)) or embed(pixels))
    chunk = 5 * model.config.vision.tokens_per_tile
    with torch.no_grad():
        logits, state = steps.prefill(model, [unread], chunk=chunk, max_new_tokens=1)
        embedded = [event for event in events if event > 0]
        assert events.count(-1) == 50 and sum(embedded) == len(whole.tiles) == 150 and max(embedded) <= 5
        ahead = np.cumsum([3 if event < 0 else -event for event in events])  # tiles decoded and not embedded yet
        assert ahead.max() <= 5 + 2 and ahead[-1] == 0
        expected = model(
            torch.from_numpy(whole.input_ids).long()[None], pixels(whole), logits="last", return_state=True
        )
    assert torch.allclose(logits, expected.logits, atol=1e-9, rtol=0)
    for one, other in zip(state.layers, expected.state.layers, strict=True):
        assert torch.allclose(one.ssm, other.ssm, atol=1e-9, rtol=0) and torch.allclose(one.conv, other.conv)


def test_the_frames_of_a_video_are_decoded_and_embedded_as_they_are_read(
    tiny_model, tiny_processor, monkeypatch, tmp_path
):
    pytest.importorskip("av")
    path = write_video(tmp_path / "v.mkv", range(0, 6000, 100))
    frames = video.choose_frames(path, fps=10)
    model, events = tiny_model(("mamba2",) * 5).double(), []  # 1 for a frame decoded, -n for n embedded together
    decoded, embed = video._decoded, model.vision.forward

    def counted(path):
        for item in decoded(path):
            events.append(1)
            yield item

    monkeypatch.setattr(video, "_decoded", counted)
    monkeypatch.setattr(model.vision, "forward", lambda pixels: events.append(-len(pixels)) or embed(pixels))
    prompt = tiny_processor.prompt([Turn("human", video.frame_marks(frames) + "what?")], frames)
    assert events == []
    engine.stream(model, tiny_processor, prompt, prefill_chunk=60)
    ahead = np.cumsum(events)
    assert events.count(1) == 60 == -sum(event for event in events if event < 0)
    assert ahead.max() <= 8 and ahead[-1] == 0


def test_tiles_and_positions_that_do_not_agree_are_refused(tiny_model, prompts):
    for tiles in (prompts[1].tiles[:0], np.concatenate([prompts[1].tiles] * 2)):
        with pytest.raises(UserError, match="<IMG_CONTEXT> positions for"):
            steps.prefill(tiny_model(), [replace(prompts[1], tiles=tiles)], chunk=9, max_new_tokens=1)


def test_stream_equals_generate(model, tiny_processor, prompts):
    sampling = Sampling(temperature=1.0, seed=5)
    answers = engine.generate(model, tiny_processor, prompts, max_new_tokens=NEW, sampling=sampling)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stream = engine.stream(
            model, tiny_processor, prompt, max_new_tokens=NEW, sampling=sampling, sequence=i, prefill_chunk=9
        )
        assert "".join(stream) == answer.text
        assert (stream.token_ids, stream.finish) == (answer.token_ids, answer.finish)
        assert stream.logprobs == pytest.approx(answer.logprobs, abs=1e-9)


def continued(prompt: Encoded, token_ids: tuple[int, ...]) -> Encoded:
    ids = np.array([*prompt.input_ids, *token_ids], dtype=np.int32)
    return replace(prompt, input_ids=ids, labels=np.full_like(ids, -100))


@pytest.mark.parametrize("tokens_read", [0, 3, NEW])
def test_a_stream_can_be_carried_on_from_anywhere(model, tiny_processor, prompts, tokens_read):
    processor = StoppingAt(tiny_processor, ())
    stream = engine.stream(model, processor, prompts[1], max_new_tokens=NEW)
    pieces: Iterator[str] = iter(stream)
    while len(stream.token_ids) < tokens_read:
        next(pieces)
    more = (65, 66, 67)
    follow = replace(prompts[0], input_ids=np.array([*stream.unfed, *more], dtype=np.int32))
    again = engine.stream(model, processor, follow, state=stream.state, max_new_tokens=NEW)
    "".join(again)
    whole = continued(prompts[1], (*stream.token_ids, *more))
    assert list(again.token_ids) == greedy_without_state(model, whole, NEW)


def test_the_state_of_a_stopped_answer_has_seen_the_answer_but_not_the_stop(model, tiny_processor, prompts):
    free = engine.stream(model, StoppingAt(tiny_processor, ()), prompts[0], max_new_tokens=NEW)
    "".join(free)
    assert free.unfed == free.token_ids[-1:] and free.finish == "length"
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    stopped = engine.stream(model, StoppingAt(tiny_processor, (stop,)), prompts[0], max_new_tokens=NEW)
    "".join(stopped)
    assert stopped.finish == "stop" and stopped.token_ids == free.token_ids[:first] and stopped.unfed == ()
    assert stopped.state.positions.tolist() == [len(prompts[0].input_ids) + first]
    assert list(stopped) == []


def test_the_model_never_says_an_image_position(tiny_model, tiny_processor, prompts):
    model = tiny_model()
    image = model.config.img_context_token_id
    with torch.no_grad():  # its logit is always the largest or the smallest
        model.head.weight[image] *= 1e4
    answers = engine.generate(model, tiny_processor, prompts, max_new_tokens=NEW)
    assert all(image not in answer.token_ids for answer in answers)


def test_progress_counts_answers(tiny_model, tiny_processor, prompts):
    calls = []
    engine.generate(
        tiny_model(), tiny_processor, prompts, max_new_tokens=2, batch_tokens=120,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == sorted(set(calls)) and calls[-1] == (6, 6) and len(calls) > 1


def test_groups_keep_to_the_budget(tiny_model):
    model = tiny_model()
    lengths = [5, 100, 7, 30, 31, 6, 300]
    groups = list(steps.groups(model, lengths, budget=100, chunk=4096))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(len(group) == 1 or len(group) * (max(lengths[i] for i in group)) <= 100 for group in groups)
    assert list(steps.groups(model, lengths, budget=10**6, chunk=99))[:2] == [[6], [1]]


def test_no_prompts_no_answers(tiny_model, tiny_processor):
    assert engine.generate(tiny_model(), tiny_processor, []) == []
    assert engine.score(tiny_model(), []) == []


def test_batches_do_not_change_dynamic_rope_scaling(tiny_config, tiny_processor, prompts):
    base = tiny_config(mixer=Mamba2Options(rope=True), layer_map=("attention", "mamba2") * 2 + ("attention",))
    scaled = {"rope_scaling": RopeScaling(type="dynamic", factor=2.0), "max_position_embeddings": 40}
    torch.manual_seed(0)
    config = replace(base, embedding=replace(base.embedding, **scaled), decoder=replace(base.decoder, **scaled))
    model = Model(config).double().eval()
    processor = StoppingAt(tiny_processor, ())
    together = engine.generate(model, processor, prompts, max_new_tokens=NEW)
    alone = [engine.generate(model, processor, [prompt], max_new_tokens=NEW, prefill_chunk=8)[0] for prompt in prompts]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert max(lengths) > 40 > min(lengths) + NEW
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


@pytest.fixture
def samples(tiny_processor) -> list[Encoded]:
    talks = [
        [Turn("human", "how many?"), Turn("gpt", "3 circles")],
        [Turn("human", "what colour is the shape?"), Turn("gpt", "red"), Turn("human", "sure?"), Turn("gpt", "yes")],
        [Turn("human", "left? " * 12), Turn("gpt", "no " * 9)],
    ]
    return [tiny_processor.encode(Sample(id=str(i), turns=tuple(talk))) for i, talk in enumerate(talks)]


def test_score_is_the_cross_entropy_of_the_scored_tokens(model, samples):
    for options in ({}, {"batch_tokens": 1}, {"prefill_chunk": 6}):
        scores = engine.score(model, samples, **options)
        for sample, score in zip(samples, scores, strict=True):
            ids, labels = (torch.from_numpy(a).long() for a in (sample.input_ids, sample.labels))
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            wanted = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            assert score.nll == pytest.approx(float(wanted), rel=1e-5)
            assert score.tokens == int((labels[1:] != -100).sum())
            assert score.mean == score.nll / score.tokens


def test_a_sample_without_scored_tokens_scores_nothing(tiny_model, prompts):
    (score,) = engine.score(tiny_model(), prompts[:1])
    assert score.tokens == 0 and score.nll == 0 and math.isnan(score.mean)


def test_score_asks_for_logits_of_scored_positions_only(tiny_model, samples, monkeypatch):
    model = tiny_model()
    rows = []
    model.head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    engine.score(model, samples)
    assert sum(rows) == sum(int((sample.labels != -100).sum()) for sample in samples)


def test_bad_requests_are_named(tiny_model, tiny_config, tiny_processor, prompts):
    model = tiny_model()
    with pytest.raises(UserError, match="max_new_tokens"):
        engine.generate(model, tiny_processor, prompts, max_new_tokens=0)
    with pytest.raises(UserError, match="batch_tokens"):
        engine.generate(model, tiny_processor, prompts, batch_tokens=0)
    empty = replace(prompts[0], input_ids=np.empty(0, np.int32), labels=np.empty(0, np.int32), id="e7")
    with pytest.raises(UserError, match="e7"):
        engine.generate(model, tiny_processor, [empty])
    with pytest.raises(UserError, match="e7"):
        engine.generate(model, tiny_processor, [empty, prompts[0]])
    blind = Model(replace(tiny_config(), vision=None))
    with pytest.raises(UserError, match="text only"):
        engine.generate(blind, tiny_processor, prompts[1:2])
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="NaN"):
        engine.generate(model, tiny_processor, prompts)
