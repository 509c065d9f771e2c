"""A conversation that carries its state is the conversation read anew, and the loop around it survives mistakes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from mmmamba.checkpoints import save_student
from mmmamba.data.processor import Processor
from mmmamba.data.samples import Turn
from mmmamba.data.tiling import normalise
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.inference import chat as chat_module
from mmmamba.inference import engine
from mmmamba.inference.chat import Chat, chat, converse
from mmmamba.inference.sampling import Sampling

RED, WIDE = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (112, 56), "blue")
SAMPLING = Sampling(temperature=2.0, seed=11)


@pytest.fixture
def letters_only(monkeypatch, tiny_processor: Processor) -> set[int]:
    """The tokens that the model may say: single letters, whose text tokenises back to them. A test may add the end."""
    letters = [tiny_processor.tokenizer.token_id(letter) for letter in "bcxyz"]
    assert tiny_processor.tokenizer.encode("zyxcb", allow_special=False) == letters[::-1]
    allowed = set(letters)
    monkeypatch.setattr(engine, "_unspeakable", lambda model: [i for i in range(320) if i not in allowed])
    return allowed


def test_carried_state_equals_the_whole_conversation_read_anew(model, tiny_processor, letters_only):
    session = Chat(model, tiny_processor, SAMPLING)
    questions = [("<image>\nwhat colour is it?", [RED]), ("how many?", []), ("and these?", [WIDE, RED]), ("sure?", [])]
    turns: list[Turn] = []
    shown: list[Image.Image] = []
    for i, (text, images) in enumerate(questions):
        # Every second answer is ended by the model (which picks among six tokens), the others by their length.
        ended_by_model, end = i % 2 == 0, tiny_processor.stop_token_ids[0]
        (letters_only.add if ended_by_model else letters_only.discard)(end)
        session.max_new_tokens = 100 if ended_by_model else 5
        marks = "" if "<image>" in text else "<image>\n" * len(images)
        turns.append(Turn("human", marks + text))
        shown += images
        pieces = session.ask(text, images)
        whole = tiny_processor.prompt(turns, shown)
        with torch.no_grad():
            ids = torch.from_numpy(whole.input_ids).long()[None]
            expected = model(ids, normalise(torch.from_numpy(whole.tiles)).double(), logits="last", return_state=True)
        assert torch.equal(session.answer.state.positions, expected.state.positions)
        assert torch.allclose(session.answer._logits, expected.logits, atol=1e-9, rtol=0)
        anew = engine.stream(
            model, tiny_processor, whole, max_new_tokens=session.max_new_tokens, sampling=SAMPLING, sequence=i
        )
        answer = "".join(pieces)
        assert answer == "".join(anew) and session.answer.token_ids == anew.token_ids
        assert session.answer.finish == ("stop" if ended_by_model else "length")
        turns.append(Turn("gpt", answer))


def test_an_answer_left_half_way_counts_as_said_up_to_there(model, tiny_processor, letters_only):
    session = Chat(model, tiny_processor, SAMPLING, max_new_tokens=9)
    pieces = session.ask("go on")
    said = next(pieces) + next(pieces)
    session.ask("stop. why?")
    whole = tiny_processor.prompt([Turn("human", "go on"), Turn("gpt", said), Turn("human", "stop. why?")])
    with torch.no_grad():
        expected = model(torch.from_numpy(whole.input_ids).long()[None], logits="last").logits
    assert torch.allclose(session.answer._logits, expected, atol=1e-9, rtol=0)


def test_reset_forgets(tiny_model, tiny_processor):
    session = Chat(tiny_model(), tiny_processor, max_new_tokens=3)
    first = "".join(session.ask("what?"))
    "".join(session.ask("and now?"))
    session.reset()
    assert "".join(session.ask("what?")) == first and session.turns == 1


def test_a_question_that_cannot_be_read_leaves_the_conversation_as_it_was(tiny_model, tiny_processor, tmp_path):
    session = Chat(tiny_model(), tiny_processor, max_new_tokens=3)
    "".join(session.ask("what?"))
    before = session.answer
    with pytest.raises(UserError, match=r"gone\.png"):
        session.ask("and this?", [tmp_path / "gone.png"])
    assert session.answer is before and session.turns == 1


def talk(session: Chat, lines: list[str]) -> str:
    """What the loop prints when these lines are typed."""
    typed = iter(lines)
    console = Console(file=io.StringIO(), width=200)
    converse(session, [], console, lambda _: next(typed, None))
    return console.file.getvalue()


@pytest.fixture
def spoken(monkeypatch, tiny_model, tiny_processor):
    """A session that records what it is asked and says "answer"."""
    session = Chat(tiny_model(), tiny_processor, max_new_tokens=2)
    session.asked = []
    monkeypatch.setattr(
        session, "ask", lambda text, images=(): session.asked.append((text, len(images))) or iter(["ans", "wer"])
    )
    return session


def test_pictures_go_with_the_next_question_and_wrong_paths_do_not_end_the_loop(spoken, tmp_path):
    path = tmp_path / "a red one.png"
    RED.save(path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = ["/image nowhere.png", f"/image {tmp_path / 'broken.png'}", f"/image {path}", f'/image "{path}"', "what?",
             "", "  again? ", "/image", "/nonsense"]  # fmt: skip
    printed = talk(spoken, lines)
    assert spoken.asked == [("what?", 2), ("again?", 0)]
    assert printed.count("error:") == 2 and "nowhere.png" in printed and "broken.png" in printed
    assert printed.count("answer\n") == 2 and "no command /nonsense" in printed and "needs the path" in printed
    assert all(len(line) < 200 for line in printed.splitlines())


def test_commands(spoken):
    spoken.turns = 5
    printed = talk(spoken, ["/help", "/reset", "/quit", "never asked"])
    assert "/image PATH" in printed and spoken.turns == 0 and spoken.asked == []


def test_stopping_an_answer_keeps_the_loop(spoken, monkeypatch):
    def interrupted(text, images=()):
        yield "an"
        raise KeyboardInterrupt

    monkeypatch.setattr(spoken, "ask", interrupted)
    printed = talk(spoken, ["what?", "/help"])
    assert "an\n(stopped)" in printed and "/image PATH" in printed


def test_an_answer_cannot_steer_the_terminal(spoken, monkeypatch):
    monkeypatch.setattr(spoken, "ask", lambda text, images=(): iter(["a\x1b[2J", "\tb\r\n\x9bc"]))
    assert talk(spoken, ["what?"]) == "a[2J\tb\nc\n"


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path) -> Path:
    """A checkpoint folder of a tiny linear student."""
    from mmmamba.checkpoints import save_hovle

    teacher = tiny_model()
    save_hovle(teacher, tiny_processor, tmp_path / "teacher", dtype=torch.float32)
    student = tiny_model(("mamba2",) * 5)
    save_student(student, tmp_path / "student", teacher=tmp_path / "teacher", delta=False, processor=tiny_processor)
    return tmp_path / "student"


def test_verb_answers_one_question(folder, tmp_path, capsys, tiny_model, tiny_processor, letters_only):
    RED.save(tmp_path / "red.png")
    chat(str(folder), "what colour?", image=(tmp_path / "red.png",), max_new_tokens=5, device="cpu")
    prompt = tiny_processor.prompt([Turn("human", "what colour?")], [RED])
    (expected,) = engine.generate(tiny_model(("mamba2",) * 5), tiny_processor, [prompt], max_new_tokens=5)
    assert capsys.readouterr().out == expected.text + "\n"


def test_verb_without_a_question_converses_until_the_input_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n/reset\n"))
    chat(str(folder), max_new_tokens=3, device="cpu")
    printed = capsys.readouterr().out
    assert "/help lists the commands" in printed and "forgotten" in printed


def test_verb_refuses_bad_arguments_before_it_loads_a_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_module, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="temperature"):
        chat(str(folder), temperature=-1.0)
    with pytest.raises(UserError, match="max-new-tokens"):
        chat(str(folder), max_new_tokens=0)
    with pytest.raises(UserError, match=r"gone\.png"):
        chat(str(folder), "what?", image=(tmp_path / "gone.png",))
    for device in ("tpu", "cuda:99", "cuda:x"):
        with pytest.raises(UserError, match="--device"):
            chat(str(folder), device=device)


REWRITING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content + ']' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_changes_what_came_before_is_read_anew(tiny_model, tiny_config, tiny_processor, letters_only):
    """Its header of an answer (a space) is not in the prompt: no state can be carried, and the answers are the same."""
    definition = tiny_processor.tokenizer.definition
    tokenizer = Tokenizer(definition, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": REWRITING})
    processor = Processor(tokenizer, tiny_config(template="tokenizer", system_message=None, vision=None))
    network = tiny_model().double()
    session = Chat(network, processor, max_new_tokens=4)
    turns: list[Turn] = []
    for i, question in enumerate(["what?", "and now?", "why?"]):
        turns.append(Turn("human", question))
        answer = "".join(session.ask(question))
        whole = processor.prompt(turns)
        anew = engine.stream(network, processor, whole, max_new_tokens=4, sequence=i)
        assert "".join(anew) == answer and session.answer.token_ids == anew.token_ids
        turns.append(Turn("gpt", answer))
    assert int(session.answer.state.positions[0]) >= len(whole.input_ids)
