"""A conversation that carries its state equals one that is read again; the loop around it survives mistakes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from mmmamba import cli
from mmmamba.checkpoints import load, save_student
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.data.tiling import normalise
from mmmamba.data.video import read_frames
from mmmamba.errors import UserError
from mmmamba.inference import batch, engine, stream
from mmmamba.inference import chat as chat_module
from mmmamba.inference.attachments import Attachments
from mmmamba.inference.chat import Chat, chat, converse
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.session import load_session, read_session
from mmmamba.locks import alone_with
from videos import write_video

RED, WIDE = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (112, 56), "blue")
SAMPLING = Sampling(temperature=2.0, seed=11)


@pytest.fixture
def letters_only(monkeypatch, tiny_processor: Processor) -> set[int]:
    """The tokens that the model may say: single letters, whose text tokenises back to them. A test may add the end."""
    letters = [tiny_processor.tokenizer.token_id(letter) for letter in "bcxyz"]
    assert tiny_processor.tokenizer.encode("zyxcb", allow_special=False) == letters[::-1]
    allowed = set(letters)
    for module in (batch, stream):
        monkeypatch.setattr(module, "unspeakable", lambda model: [i for i in range(320) if i not in allowed])
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
        again = engine.stream(
            model, tiny_processor, whole, max_new_tokens=session.max_new_tokens, sampling=SAMPLING, sequence=i
        )
        answer = "".join(pieces)
        assert answer == "".join(again) and session.answer.token_ids == again.token_ids
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
    converse(session, Attachments(), console, lambda _: next(typed, None))
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
    assert all(f"{name} PATH" in printed for name in ("/image", "/video", "/text", "/save"))
    assert spoken.turns == 0 and spoken.asked == []


def test_videos_and_texts_go_with_the_next_question(spoken, tmp_path):
    pytest.importorskip("av")
    video = write_video(tmp_path / "a video.mkv", range(0, 2500, 100))
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    lines = [f"/text {tmp_path / 'a.txt'}", f"/video {video}", f"/text {tmp_path / 'b.txt'}", "/video no.mp4", "what?",
             "again?", "/video", "/text", "/save", "/save never.state"]  # fmt: skip
    printed = talk(spoken, lines)
    assert spoken.asked == [("once\nFrame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat?", 3), ("again?", 0)]
    assert "Shown with your next question: 1 text, 1 video (3 frames)." in printed
    assert printed.count("error:") == 3 and "not UTF-8" in printed and "no.mp4: no such file" in printed
    assert printed.count("needs the path of") == 3 and "never.state: not saved: nothing has been said" in printed


def test_a_conversation_is_saved_after_each_answer_and_branches_from_the_loop(tiny_model, tiny_processor, tmp_path):
    network, kept, branch = tiny_model(("mamba2",) * 5), tmp_path / "kept.state", tmp_path / "branch.state"
    session = Chat(network, tiny_processor, SAMPLING, max_new_tokens=4)
    typed = iter(["first?", f"/save {branch}", "second?", "/reset"])
    seen = []

    def read(_):
        seen.append(load_session(kept, network, tiny_processor).turns if kept.exists() else 0)
        return next(typed, None)

    console = Console(file=io.StringIO(), width=200)
    converse(session, Attachments(), console, read, kept)
    assert seen == [0, 1, 1, 2, 2], "what is forgotten stays in the file until something else is said"
    assert f"Saved: {branch}" in console.file.getvalue()
    again = load_session(branch, network, tiny_processor, SAMPLING, max_new_tokens=4)
    assert again.turns == 1
    list(again.ask("second?"))
    assert again.past.turns == load_session(kept, network, tiny_processor).past.turns


def test_a_stopped_answer_is_saved_as_far_as_it_was_said(
    tiny_model, tiny_processor, letters_only, tmp_path, monkeypatch
):
    session = Chat(tiny_model(("mamba2",) * 5), tiny_processor, SAMPLING, max_new_tokens=50)
    original = session.ask

    def interrupted(text, images=()):
        pieces = original(text, images)
        yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "ask", interrupted)
    typed = iter(["what?"])
    console = Console(file=io.StringIO(), width=200)
    converse(session, Attachments(), console, lambda _: next(typed, None), tmp_path / "s.state")
    said = load_session(tmp_path / "s.state", session.model, tiny_processor).past.turns[-1].text
    assert len(said) == 1 and console.file.getvalue() == f"{said}\n(stopped)\n"


def test_stopping_an_answer_keeps_the_loop(spoken, monkeypatch):
    def interrupted(text, images=()):
        yield "an"
        raise KeyboardInterrupt

    monkeypatch.setattr(spoken, "ask", interrupted)
    printed = talk(spoken, ["what?", "/help"])
    assert "an\n(stopped)" in printed and "/image PATH" in printed


def test_save_replaces_nothing_but_its_own_file(tiny_model, tiny_processor, tmp_path):
    session = Chat(tiny_model(), tiny_processor, SAMPLING, max_new_tokens=2)
    RED.save(tmp_path / "photo.png")
    other = tmp_path / "other.state"
    talk(Chat(tiny_model(), tiny_processor, max_new_tokens=2), ["hello?", f"/save {other}"])
    before = {path: path.read_bytes() for path in (tmp_path / "photo.png", other)}
    lines = ["first?", f"/save {tmp_path / 'photo.png'}", f"/save {other}", f"/save {tmp_path / 'a.state'}", "second?"]
    printed = talk(session, [*lines, f"/save {tmp_path / 'a.state'}", f"/save {tmp_path}"])
    assert printed.count("is there already; give another /save") == 2 and printed.count("Saved: ") == 2
    assert "is a folder; /save takes a file" in printed
    assert {path: path.read_bytes() for path in before} == before
    assert load_session(tmp_path / "a.state", session.model, tiny_processor).turns == 2


def test_two_conversations_on_one_session_file_do_not_lose_turns(folder, tmp_path, capsys):
    kept = tmp_path / "talk.state"
    with alone_with(kept, "wait"):
        said = rf"talk\.state: is in use by .* \({os.getpid()}\); wait for it, or give another --session"
        with pytest.raises(UserError, match=said):
            chat(str(folder), "hello?", session=kept, max_new_tokens=2, device="cpu")
    chat(str(folder), "hello?", session=kept, max_new_tokens=2, device="cpu")
    with alone_with(kept, "wait"):  # one that only reads is not kept out
        chat(str(folder), "and?", session=kept, keep_session=True, max_new_tokens=2, device="cpu")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dangling: is a link to nothing"):
        chat(str(folder), "hello?", session=tmp_path / "dangling", max_new_tokens=2, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir() if "talk" in path.name) == ["talk.state"]


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


def test_verb_answers_with_int8_weights(folder, capsys, tiny_model, tiny_processor, letters_only):
    chat(str(folder), "what colour?", max_new_tokens=9, device="cpu", int8=True)
    model = tiny_model(("mamba2",) * 5)
    prompt = tiny_processor.prompt([Turn("human", "what colour?")])
    answers = []
    for model.int8_steps in (False, True):
        (answer,) = engine.generate(model, tiny_processor, [prompt], max_new_tokens=9)
        answers.append(answer)
    assert capsys.readouterr().out == answers[1].text + "\n"
    assert answers[0].logprobs[0] == answers[1].logprobs[0]  # the prompt is read with the weights as they are
    assert answers[0].logprobs[1] != answers[1].logprobs[1]


def test_verb_without_a_question_converses_until_the_input_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n/reset\n"))
    chat(str(folder), max_new_tokens=3, device="cpu")
    printed = capsys.readouterr().out
    assert "/help lists the commands" in printed and "forgotten" in printed


def test_verb_refuses_bad_arguments_before_it_loads_a_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_module, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="temperature"):
        chat(str(folder), temperature=-1.0)
    with pytest.raises(UserError, match="fps must be positive"):
        chat(str(folder), fps=0.0)
    with pytest.raises(UserError, match="max_frames must be at least 1"):
        chat(str(folder), max_frames=0)
    with pytest.raises(UserError, match="max-new-tokens"):
        chat(str(folder), max_new_tokens=0)
    with pytest.raises(UserError, match=r"gone\.png"):
        chat(str(folder), "what?", image=(tmp_path / "gone.png",))
    for device in ("tpu", "cuda:99", "cuda:x"):
        with pytest.raises(UserError, match="--device"):
            chat(str(folder), device=device)


def run(capsys, *words: object) -> str:
    """What the command line prints; it must succeed."""
    assert cli.main(["chat", *map(str, words), "--device", "cpu", "--max-new-tokens", "5"]) == 0
    return capsys.readouterr().out


def error(capsys, *words: object) -> str:
    """The one line with which the command line refuses."""
    assert cli.main(["chat", *map(str, words), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_stop_strings_end_what_is_printed(folder, capsys, letters_only):
    whole = run(capsys, folder, "what colour?").rstrip("\n")
    assert len(whole) == 5
    for stop in (whole[1:3], whole[4]):
        shown = whole[: whole.index(stop)] + "\n"
        assert run(capsys, folder, "what colour?", "--stop", "nowhere", "--stop", stop) == shown
    assert error(capsys, folder, "what colour?", "--stop", "") == "error: --stop must not be empty"


def test_text_file_equals_typing_it(folder, tmp_path, capsys, letters_only):
    text = "is it left of the square ? " * 40 + "\nhow many?"
    (tmp_path / "long.txt").write_text(text)
    typed = run(capsys, folder, f"{text}\nwhy?")
    assert run(capsys, folder, "--text", tmp_path / "long.txt", "why?") == typed
    (tmp_path / "long.txt").write_bytes(b"abc\xff")
    assert error(capsys, folder, "--text", tmp_path / "long.txt", "why?").endswith("byte 0xff at offset 3")


def test_video_equals_its_frames_as_pictures(folder, tmp_path, capsys, letters_only):
    pytest.importorskip("av")
    video = write_video(tmp_path / "v.mkv", range(0, 3000, 100))
    frames = read_frames(video, [0, 5, 10, 15, 20, 25])
    pictures: list[object] = []
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
        pictures += ["--image", tmp_path / f"{i}.png"]

    def question(count: int) -> str:
        return "".join(f"Frame{i + 1}: <image>\n" for i in range(count)) + "what?"

    expected = run(capsys, folder, question(6), *pictures)
    assert run(capsys, folder, "what?", "--video", video, "--fps", 2) == expected
    every_other = [pictures[i] for i in (0, 1, 4, 5, 8, 9)]
    expected = run(capsys, folder, question(3), *every_other)
    assert run(capsys, folder, "what?", "--video", video) == expected
    assert run(capsys, folder, "what?", "--video", video, "--fps", 2, "--max-frames", 3) == expected
    (tmp_path / "none.mp4").write_bytes(b"")
    assert "none.mp4: the video is an empty file" in error(capsys, folder, "--video", tmp_path / "none.mp4", "what?")
    assert "fps must be positive" in error(capsys, folder, "--video", video, "--fps", 0, "what?")


def test_session_goes_on_from_its_file(folder, tmp_path, capsys, letters_only, monkeypatch):
    RED.save(tmp_path / "red.png")
    network, processor = load(folder), Processor.from_folder(folder)
    whole = Chat(network, processor, Sampling(temperature=2.0, seed=3), max_new_tokens=5)
    expected = ["".join(whole.ask("what?", [RED])) + "\n", "".join(whole.ask("sure?")) + "\n"]
    file = tmp_path / "talk.state"
    same = ["--temperature", 2.0, "--seed", 3, "--session", file]
    assert run(capsys, folder, "what?", "--image", tmp_path / "red.png", *same) == expected[0]
    before = file.read_bytes()
    assert run(capsys, folder, "sure?", *same, "--keep-session") == expected[1]
    assert file.read_bytes() == before
    assert run(capsys, folder, "sure?", *same) == expected[1]
    assert read_session(file).header.transcript == whole.past.turns
    monkeypatch.setattr("sys.stdin", io.StringIO("and now?\n"))
    assert f"continues from {file} (question 3)" in run(capsys, folder, *same)
    assert read_session(file).header.answers == 3


def test_session_that_cannot_be_gone_on_with_is_named(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "talk.state"
    assert "--keep-session needs --session" in error(capsys, folder, "what?", "--keep-session")
    assert f"{file}: no such file" in error(capsys, folder, "what?", "--session", file, "--keep-session")
    run(capsys, folder, "what?", "--session", file)
    teacher = tmp_path / "teacher"
    assert f"{file}: was made with another model" in error(capsys, teacher, "what?", "--session", file)
    wrong = error(capsys, folder, "what?", "--session", file, "--dtype", "bfloat16")
    assert f"{file}: was made in float32, but the model runs in bfloat16" in wrong
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr(chat_module, "load", lambda *_, **__: pytest.fail("loaded"))
    assert f"{file}: truncated" in error(capsys, folder, "what?", "--session", file)


def test_a_template_that_changes_what_came_before_is_read_anew(tiny_model, rewriting, letters_only):
    """Its header of an answer (a space) is not in the prompt: no state can be carried, and the answers are the same."""
    processor = rewriting(vision=None)
    network = tiny_model().double()
    session = Chat(network, processor, max_new_tokens=4)
    turns: list[Turn] = []
    for i, question in enumerate(["what?", "and now?", "why?"]):
        turns.append(Turn("human", question))
        answer = "".join(session.ask(question))
        whole = processor.prompt(turns)
        again = engine.stream(network, processor, whole, max_new_tokens=4, sequence=i)
        assert "".join(again) == answer and session.answer.token_ids == again.token_ids
        turns.append(Turn("gpt", answer))
    assert int(session.answer.state.positions[0]) >= len(whole.input_ids)
