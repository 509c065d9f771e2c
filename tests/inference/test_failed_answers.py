"""Whatever goes wrong in a conversation: one clear line, and the session file is what it was, or whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmmamba import cli
from mmmamba.checkpoints import load
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.errors import UserError
from mmmamba.inference import chat as chat_module
from mmmamba.inference import engine, stream
from mmmamba.inference.conversation import Chat
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.sampling import Sampler
from mmmamba.inference.session import load_session, read_session, save_session
from mmmamba.model import Model
from small_run import ENVIRONMENT
from videos import write_no_frame

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def failing(error: BaseException, after: int = 0):
    """A stand-in for a method that fails when it was called ``after`` times; the calls before go to ``original``."""

    def wrap(original):
        calls = iter(range(10**9))

        def call(*args, **options):
            if next(calls) >= after:
                raise error
            return original(*args, **options)

        return call

    return wrap


# ---------------------------------------------------------------------------------------------- memory


def test_generating_and_scoring_name_what_did_not_fit(tiny_model, tiny_processor, prompts, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(Model, "forward", failing(FULL)(Model.forward))
    with pytest.raises(UserError, match=r"out of memory on cpu while 6 prompts .* lower batch_tokens \(100\)"):
        engine.generate(model, tiny_processor, prompts, batch_tokens=100)
    with pytest.raises(UserError, match=r"out of memory on cpu while 6 samples .* lower batch_tokens \(8,192\)"):
        engine.score(model, prompts)
    monkeypatch.undo()
    monkeypatch.setattr(Decoder, "step", failing(FULL)(Decoder.step))
    with pytest.raises(UserError, match="out of memory on cpu while 6 prompts"):
        engine.generate(model, tiny_processor, prompts)


# ---------------------------------------------------------------------------------------------- a stream, a chat


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(tiny_model, layer_map, tiny_processor, monkeypatch):
    chat = Chat(tiny_model(layer_map), tiny_processor, max_new_tokens=3)
    "".join(chat.ask("what?"))
    before, follow = chat.past.turns, "".join(chat.branch().ask("why?"))
    for name, wrapped, reason in (
        ("full", failing(FULL)(Model.forward), r"out of memory on cpu while \d+ tokens were read: show less"),
        ("nan", nan_logits, "the model gives NaN at token 0 of its answer"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=reason):
            patch.setattr(Model, "forward", wrapped)
            chat.ask(name)
        assert chat.past.turns == before and chat.turns == 1
    assert "".join(chat.ask("why?")) == follow


FORWARD = Model.forward


def nan_logits(self, *args, **options):
    out = FORWARD(self, *args, **options)
    if out.logits is not None:
        out.logits.fill_(torch.nan)
    return out


@pytest.mark.parametrize("reason", ["out of memory", "NaN"])
def test_nothing_follows_an_answer_that_broke_off_in_a_token(reason, tiny_model, tiny_processor, monkeypatch, tmp_path):
    chat = Chat(tiny_model(("mamba2",) * 5), tiny_processor, max_new_tokens=9)
    "".join(chat.ask("what?"))
    file = save_session(tmp_path / "s.state", chat).read_bytes()
    step = Decoder.step
    wrong = failing(FULL, after=3)(step)
    if reason == "NaN":
        calls = iter(range(99))
        wrong = lambda *args: step(*args) * (torch.nan if next(calls) == 3 else 1)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(UserError, match=reason):
        patch.setattr(Decoder, "step", wrong)
        "".join(chat.ask("and now?"))
    for go_on in (lambda: chat.ask("sure?"), chat.branch, lambda: save_session(tmp_path / "s.state", chat)):
        with pytest.raises(UserError, match="broke off in the middle of a token"):
            go_on()
    assert (tmp_path / "s.state").read_bytes() == file
    chat.reset()
    assert "".join(chat.ask("what?")) == "".join(Chat(chat.model, tiny_processor, max_new_tokens=9).ask("what?"))


def test_memory_for_the_pool_may_be_missing_and_the_conversation_goes_on(tiny_model, tiny_processor, monkeypatch):
    """The state after the question is whole: the answer ends at its first token."""
    chat = Chat(tiny_model(), tiny_processor, max_new_tokens=9)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory on cpu while token 1 was made"):
        patch.setattr(Decoder, "__init__", failing(FULL)(Decoder.__init__))
        "".join(chat.ask("what?"))
    assert len(chat.answer.token_ids) == 1
    chat.ask("why?")
    assert len(chat.past.turns) == 4


def test_ctrl_c_waits_for_the_token_and_the_state_is_that_of_what_was_said(
    tiny_model, layer_map, tiny_processor, monkeypatch
):
    model, pick, picks = tiny_model(layer_map).double(), Sampler.pick, iter(range(99))

    def interrupted(self, logits):
        if next(picks) == 4:
            signal.raise_signal(signal.SIGINT)  # in the middle: the token before was fed, this one is not picked yet
        return pick(self, logits)

    monkeypatch.setattr(Sampler, "pick", interrupted)
    monkeypatch.setattr(stream, "unspeakable", lambda model: (*range(20), model.config.img_context_token_id))
    answer = engine.stream(model, tiny_processor, prompt := tiny_processor.prompt([Turn("human", "what?")]))
    handler, pieces = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        for piece in answer:
            pieces.append(piece)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(answer.token_ids) == 5 and "".join(pieces) == answer._answer.text
    fed = answer.token_ids[: len(answer.token_ids) - len(answer.unfed)]
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt.input_ids, *fed]]), return_state=True).state
    assert torch.equal(answer.state.positions, expected.positions)
    for ours, truth in zip(answer.state.layers, expected.layers, strict=True):
        for name, tensor in vars(truth).items():
            torch.testing.assert_close(getattr(ours, name), tensor, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def talk(teacher_folder, tmp_path, capsys) -> Path:
    """A session file of one question; what it holds must never be lost."""
    file = tmp_path / "talk.state"
    assert cli.main(["chat", str(teacher_folder), "what?", "--session", str(file), *OPTIONS]) == 0
    capsys.readouterr()
    return file


OPTIONS = ["--device", "cpu", "--max-new-tokens", "4"]


def error(capsys, *words: object) -> str:
    """The one line with which ``mmmamba chat`` refuses."""
    assert cli.main(["chat", *map(str, words), *OPTIONS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_chat_that_runs_out_of_memory(teacher_folder, talk, capsys, monkeypatch):
    file = talk.read_bytes()
    for owner, name, reason in (
        (chat_module, "load", f"out of memory on cpu while {teacher_folder} was read"),
        (Model, "forward", "out of memory on cpu while"),
        (Decoder, "__init__", "out of memory on cpu while token 1 was made"),
        (Decoder, "step", "out of memory on cpu while token 1 was made"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(FULL)(getattr(owner, name)))
            assert error(capsys, teacher_folder, "why?", "--session", talk).startswith(reason)
        assert talk.read_bytes() == file


def test_chat_of_a_model_that_gives_nan(teacher_folder, talk, capsys, monkeypatch):
    file = talk.read_bytes()
    monkeypatch.setattr(Model, "forward", nan_logits)
    assert "the model gives NaN at token 0" in error(capsys, teacher_folder, "why?", "--session", talk)
    assert talk.read_bytes() == file


def test_eval_that_runs_out_of_memory(teacher_folder, small_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Model, "forward", failing(FULL)(Model.forward))
    command = ["eval", str(teacher_folder), "--data", str(small_data), "--out", str(tmp_path / "e"), "--device", "cpu"]
    assert cli.main([*command, "--batch-tokens", "500"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: out of memory on cpu while") and "lower batch_tokens (500)" in line


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(question, teacher_folder, talk, capsys, monkeypatch):
    file = talk.read_bytes()
    monkeypatch.setattr(chat_module, "load", lambda *_, **__: pytest.fail("loaded"))
    assert error(capsys, teacher_folder, question, "--session", talk).startswith("the question is empty")
    assert talk.read_bytes() == file


def test_pictures_and_marks_that_do_not_agree(teacher_folder, talk, tmp_path, capsys):
    file = talk.read_bytes()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    line = error(capsys, teacher_folder, "<image> or <image>?", "--image", tmp_path / "red.png", "--session", talk)
    assert "2 <image> marks for 1 images" in line
    assert talk.read_bytes() == file


def test_a_video_without_a_frame(teacher_folder, talk, tmp_path, capsys):
    pytest.importorskip("av")
    file, video = talk.read_bytes(), write_no_frame(tmp_path / "none.avi")
    line = error(capsys, teacher_folder, "what?", "--video", video, "--session", talk)
    assert line == f"{video}: the video has no frame that can be decoded"
    assert talk.read_bytes() == file


SPEAKING = """
import sys
from mmmamba import cli
from mmmamba.inference import stream
allowed = {int(token) for token in sys.argv[1].split(",")}  # letters, whose text comes at once; never the end
stream.unspeakable = lambda model: [i for i in range(320) if i not in allowed]
sys.exit(cli.main(sys.argv[2:]))
"""


def speaking(processor: Processor, *words: object, **options) -> subprocess.Popen:
    """``mmmamba chat`` in a process of its own, of a model that says letters without end."""
    letters = ",".join(str(processor.tokenizer.token_id(letter)) for letter in "bcxyz")
    command = [sys.executable, "-c", SPEAKING, letters, "chat", *map(str, words), "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--max-new-tokens", "100000"], env=ENVIRONMENT, stderr=subprocess.PIPE, **options
    )


@pytest.mark.parametrize("asked", ["at once", "in the loop"])
def test_a_reader_that_leaves_ends_it_quietly(asked, teacher_folder, tiny_processor, talk):
    file = talk.read_bytes()
    question = ["why?"] if asked == "at once" else []
    process = speaking(
        tiny_processor, teacher_folder, *question, "--session", talk, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if not question:
        process.stdin.write(b"why?\n")
    process.stdin.close()
    assert process.stdout.read(1)
    process.stdout.close()
    process.wait(60)
    with process.stderr:
        assert (process.returncode, process.stderr.read()) == (141, b"")
    assert talk.read_bytes() == file


def test_ctrl_c_at_a_question_that_was_asked_at_once(teacher_folder, tiny_processor, talk):
    file = talk.read_bytes()
    process = speaking(tiny_processor, teacher_folder, "why?", "--session", talk, stdout=subprocess.PIPE)
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.decode().strip().startswith("interrupted: ")
    assert talk.read_bytes() == file and sorted(os.listdir(talk.parent)) == [talk.name]


def test_ctrl_c_in_the_loop_keeps_what_was_said(teacher_folder, tiny_processor, tmp_path):
    kept = tmp_path / "kept.state"
    process = speaking(tiny_processor, teacher_folder, "--session", kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"why?\n")
    process.stdin.flush()
    while process.stdout.read(1) != b"\n":  # the line that greets
        pass
    process.stdout.read(22)  # the prompt's sign, and of the answer
    process.send_signal(signal.SIGINT)
    limit = time.monotonic() + 60
    while not kept.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and b"(stopped)" in output and errors == b""
    model, processor = load(teacher_folder), Processor.from_folder(teacher_folder)
    question, answer = read_session(kept).header.transcript
    assert question.text == "why?" and len(answer.text) >= 20 and set(answer.text) <= set("bcxyz")
    past = load_session(kept, model, processor).past
    ids = [*processor.prompt([question]).input_ids, *processor.tokenizer.encode(answer.text, allow_special=False)]
    assert int(past.state.positions) + len(past.unfed) == len(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids[: int(past.state.positions)]]), return_state=True).state
    for ours, truth in zip(past.state.layers, expected.layers, strict=True):
        for name, tensor in vars(truth).items():
            torch.testing.assert_close(getattr(ours, name), tensor, rtol=1e-3, atol=1e-3)
