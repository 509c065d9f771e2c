"""Stop strings: cut off exactly, in whole answers, streams and chat, whatever tokens and bytes the text comes in."""

from __future__ import annotations

import pytest
import torch

from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.errors import UserError
from mmmamba.inference import engine
from mmmamba.inference.conversation import Chat
from mmmamba.inference.sampling import Sampler

SAID = ["so it is. END of it", "naïve 你好，世界 👩‍👩‍👧 ok", "no end, no EN D", "\n\nUser: hi\n", "", "ENENDED"]
CASES = [
    (["END"], ["so it is. ", SAID[1], SAID[2], SAID[3], "", "EN"]),
    (["你好", "世"], [SAID[0], "naïve ", SAID[2], SAID[3], "", SAID[5]]),
    (["👩‍👧", "D", "\n"], ["so it is. EN", "naïve 你好，世界 👩‍", "no end, no EN ", "", "", "ENEN"]),
    (["hi\n", "\n\n"], [SAID[0], SAID[1], SAID[2], "", "", SAID[5]]),
    (["hi", "界"], [SAID[0], "naïve 你好，世", SAID[2], "\n\nUser: ", "", SAID[5]]),
    ([], SAID),
]
PROMPTS = len(SAID)


@pytest.fixture
def spoken(monkeypatch, tiny_processor: Processor) -> list[list[int]]:
    """The model's answer to prompt i is ``SAID[i]``, whatever its logits say; the tokens of all answers."""
    said = [tiny_processor.tokenizer.encode(text, allow_special=False) for text in SAID]
    assert any(len(ids) > len(text) for ids, text in zip(said, SAID, strict=True))  # characters of several tokens
    pick = Sampler.pick

    def scripted(self, logits):
        keys = zip(self._sequences.tolist(), self._steps.tolist(), strict=True)
        line = [(said[sequence] + [tiny_processor.stop_token_ids[0]] * 100)[step] for sequence, step in keys]
        return torch.tensor(line), pick(self, logits)[1]

    monkeypatch.setattr(Sampler, "pick", scripted)
    return said


@pytest.fixture
def asked(tiny_processor: Processor):
    return [tiny_processor.prompt([Turn("human", "what? " * (1 + i))]) for i in range(PROMPTS)]


@pytest.mark.parametrize(("stop", "expected"), CASES)
def test_answers_and_streams_end_before_a_stop_string(stop, expected, spoken, asked, tiny_model, tiny_processor):
    model = tiny_model()
    for block in (1, 5, 16):
        answers = engine.generate(
            model, tiny_processor, asked, max_new_tokens=90, stop=stop, block=block, batch_tokens=300
        )
        assert [answer.text for answer in answers] == expected
        assert all(answer.finish == "stop" for answer in answers)
    for i, answer in enumerate(answers):
        ids = answer.token_ids
        assert list(ids) == spoken[i][: len(ids)] and len(answer.logprobs) == len(ids)
        if answer.text == SAID[i]:
            assert list(ids) == spoken[i]
        else:  # the last token is the one that completed the string
            whole, before = tiny_processor.decode(ids), tiny_processor.decode(ids[:-1])
            assert any(string in whole for string in stop) and not any(string in before for string in stop)
        stream = engine.stream(model, tiny_processor, asked[i], max_new_tokens=90, stop=stop, sequence=i)
        shown = ""
        for piece in stream:
            shown += piece
            assert answer.text.startswith(shown)
        assert (shown, stream.finish, stream.token_ids) == (answer.text, "stop", ids)


def test_what_is_held_back_comes_when_the_answer_ends_by_its_length(spoken, asked, tiny_model, tiny_processor):
    ids = spoken[0]
    stop = [SAID[0] + "!"]  # all of the answer may be its beginning
    (answer,) = engine.generate(tiny_model(), tiny_processor, asked[:1], max_new_tokens=len(ids), stop=stop)
    assert (answer.text, answer.finish, list(answer.token_ids)) == (SAID[0], "length", ids)
    stream = engine.stream(tiny_model(), tiny_processor, asked[0], max_new_tokens=len(ids), stop=stop)
    assert list(stream) == [SAID[0]]


def test_a_chat_goes_on_behind_a_stop_string_with_all_that_was_said(spoken, tiny_model, tiny_processor):
    chat = Chat(tiny_model().double(), tiny_processor, stop=["END"])
    assert "".join(chat.ask("is it?")) == "so it is. "
    said = tiny_processor.decode(chat.answer.token_ids)
    assert said.startswith("so it is. END") and chat.past.turns[-1] == Turn("gpt", said)
    assert chat.past.state.positions.item() + len(chat.past.unfed) == len(
        tiny_processor.prompt([Turn("human", "is it?")]).input_ids
    ) + len(chat.answer.token_ids)
    assert "".join(chat.ask("and now?")) == SAID[1]


def test_bad_stop_strings_are_named(asked, tiny_model, tiny_processor):
    model = tiny_model()
    for run in (engine.generate, engine.stream):
        prompts = asked if run is engine.generate else asked[0]
        with pytest.raises(UserError, match="must not be empty"):
            run(model, tiny_processor, prompts, stop=["END", ""])
        with pytest.raises(UserError, match=r"list of strings, such as \['END'\]"):
            run(model, tiny_processor, prompts, stop="END")
