"""The ``chat`` verb: one question, or a loop of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from rich.text import Text

from mmmamba.checkpoints import load
from mmmamba.console import is_text
from mmmamba.data.processor import Processor
from mmmamba.device import pick_device, pick_dtype, within_memory
from mmmamba.errors import UserError, printable
from mmmamba.inference.attachments import Attachments
from mmmamba.inference.conversation import Chat
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.session import read_session, save_session
from mmmamba.locks import alone_with
from mmmamba.outputs import check_file, same
from mmmamba.progress import Terminal

__all__ = ["Chat", "chat", "converse"]

HELP = """\
Type a question and press Enter. Lines that begin with a slash are commands:
  /image PATH   show a picture with the next question (repeat for several)
  /video PATH   show frames of a video with the next question
  /text PATH    put a text file before the next question
  /save PATH    write the conversation to a new session file, to go on from here another time
  /reset        forget the conversation
  /help         this text
  /quit         leave (so does the end of the input, Ctrl-D)
Ctrl-C stops an answer; the conversation goes on from what was said."""

# What an answer may not hold when it is shown: control characters (but tab and newline) could steer the terminal.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})

# The commands that take a path, and of what.
LONGEST_LINE = 2**24  # characters of a question that comes from no terminal
_PATHS = {"/image": "a picture", "/video": "a video", "/text": "a text file", "/save": "a session file"}


def chat(
    model: str = "nano-linear",
    question: str | None = None,
    *,
    image: tuple[Path, ...] = (),
    video: tuple[Path, ...] = (),
    text: tuple[Path, ...] = (),
    fps: float = 1.0,
    max_frames: int = 64,
    session: Path | None = None,
    keep_session: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    stop: tuple[str, ...] = (),
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    int8: bool = False,
) -> None:
    """Ask a model about pictures, videos and text, once or in a conversation.

    With a question, the command prints the answer while it is generated, and ends. Without one, a conversation begins.
    In it the model remembers what was said, and reads only the new text. For example:

        mmmamba chat nano-linear --image picture.png "What is in the picture?"

    With --session the conversation is kept in a file, and the next command continues it.

    Args:
        model: A checkpoint folder, or the name of a built-in model such as nano-linear, nano-hybrid or nano-teacher.
        question: What to ask. Leave it out for a conversation.
        image: A picture to show with the (first) question. Repeat the option for several pictures.
        video: A video to show frames of with the (first) question. Repeat the option for several. Needs PyAV:
            pip install 'mmmamba[video]'.
        text: A text file (UTF-8) to put before the (first) question. Repeat the option for several.
        fps: Frames to take for each second of a video.
        max_frames: Most frames to take of a video. From a longer video, this many are taken, spread evenly.
        session: The file that holds the conversation. If it exists, the conversation continues from there; if not, a
            new one begins. The file is written again after each answer. It can only be used with this model and this
            --dtype.
        keep_session: Continue from the session, but do not change its file.
        temperature: 0 always takes the most likely token. 1 draws from the model's own distribution. Lower is more
            cautious, higher is more varied.
        top_k: Draw only among the k most likely tokens. Off by default.
        top_p: Draw only among the most likely tokens that together have this probability, such as 0.9. Off by default.
        repetition_penalty: Above 1, makes tokens less likely that are already in the answer.
        seed: Which random numbers are drawn. The same seed and questions give the same answers.
        max_new_tokens: Longest answer, in tokens.
        stop: A text that ends an answer. It is not shown. Repeat the option for several.
        device: Where to run, such as cpu or cuda. The default is a GPU, if there is one.
        dtype: Number format of the weights. The default is bfloat16 on a GPU and float32 elsewhere.
        int8: Round the weights to int8 while an answer is generated (the question is read with the weights as they
            are). A GPU then reads half the bytes for each token, and is faster. A CPU gains nothing.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if "" in stop:
        raise UserError("--stop must not be empty")
    shown = Attachments(fps=fps, max_frames=max_frames)
    for path in image:
        shown.add_picture(path)
    for path in text:
        shown.add_text(path)
    for path in video:
        shown.add_video(path)
    if question is not None and not question.strip() and not (image or text or video):
        raise UserError("the question is empty; leave it out for a conversation")
    if keep_session and session is None:
        raise UserError("--keep-session needs --session")
    if session is not None and not keep_session:
        check_file(session, "--session", read=[*image, *text, *video], overwrite=True)  # what is there is read first
        with alone_with(session, "give another --session"):
            _chat(
                model, question, shown, session, sampling, max_new_tokens, stop, device, dtype, int8, keep_session=False
            )
        return
    _chat(model, question, shown, session, sampling, max_new_tokens, stop, device, dtype, int8, keep_session)


def _chat(
    model: str,
    question: str | None,
    shown: Attachments,
    session: Path | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop: tuple[str, ...],
    device: str,
    dtype: str,
    int8: bool,
    keep_session: bool,
) -> None:
    """The conversation, alone with its session file."""
    stored = read_session(session) if session is not None and (session.exists() or keep_session) else None
    where = pick_device(device)
    read = partial(load, model, dtype=pick_dtype(dtype, where), device=where, int8=int8)
    network, processor = within_memory(read, where, f"{model} was read"), Processor.from_folder(model)
    if stored is None:
        conversation = Chat(network, processor, sampling, max_new_tokens=max_new_tokens, stop=stop)
    else:
        conversation = stored.resume(network, processor, sampling, max_new_tokens=max_new_tokens, stop=stop)
    kept = None if keep_session else session
    console = Terminal()
    if question is not None:
        _print_answer(console, conversation.ask(*shown.before(question)))
        if kept is not None:
            save_session(kept, conversation)
        return
    begun = f", continues from {session} (question {conversation.turns + 1})" if conversation.turns else ""
    console.print(
        Text.assemble((printable(model), "bold"), printable(begun), ", /help lists the commands"), soft_wrap=True
    )
    converse(conversation, shown, console, _read_line, kept)


def converse(
    conversation: Chat,
    shown: Attachments,
    console: Terminal,
    read: Callable[[Terminal], str | None],
    session: Path | None = None,
) -> None:
    """The interactive loop: read a line, do what it says, until /quit or the end of the input.

    Args:
        conversation: what is gone on with.
        shown: files for the first question.
        console: where answers go.
        read: the next line, or None at the end of the input.
        session: the file that is written after each answer, complete or stopped.
    """
    saved: set[Path] = set()  # what this conversation wrote by /save, and may write again
    while (line := read(console)) is not None:
        command, _, argument = line.strip().partition(" ")
        path = argument.strip().strip("\"'")
        try:
            if not is_text(line):
                raise UserError("this line is not UTF-8 text")
            if command == "/quit":
                return
            if command == "/save" and path:
                _save(Path(path).expanduser(), conversation, session, saved)
                console.print(f"Saved: {path}", soft_wrap=True)
            elif command.startswith("/"):
                _obey(command, path, conversation, shown, console)
            elif command:
                answer = conversation.ask(*shown.before(line.strip()))
                shown.clear()
                _print_answer(console, answer, stopped="\n(stopped)")
                if session is not None:
                    save_session(session, conversation)
        except UserError as error:  # a wrong path or question must not end the conversation
            console.print(f"error: {error}", style="red", soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\n(stopped)")


def _obey(command: str, path: str, conversation: Chat, shown: Attachments, console: Terminal) -> None:
    """Do what a command says that starts no answer and writes no file."""
    if command == "/help":
        console.print(HELP)
    elif command == "/reset":
        conversation.reset()
        shown.clear()
        console.print("The conversation is forgotten.")
    elif command in _PATHS and not path:
        console.print(f"{command} needs the path of {_PATHS[command]}.")
    elif command in _PATHS:
        add = {"/image": shown.add_picture, "/video": shown.add_video, "/text": shown.add_text}[command]
        add(Path(path).expanduser())
        console.print(f"Shown with your next question: {shown}.")
    else:
        console.print(f"There is no command {command}; /help lists them.")


def _save(path: Path, conversation: Chat, session: Path | None, saved: set[Path]) -> None:
    """Write a session file that is new, or this conversation's own."""
    if session is not None and same(path, session):
        save_session(path, conversation)  # whose lock is held
        return
    check_file(path, "/save", overwrite=path.resolve() in saved, flag="")
    with alone_with(path, "give another path"):
        saved.add(save_session(path, conversation).resolve())


def _print_answer(console: Terminal, pieces: Iterator[str], stopped: str | None = None) -> None:
    """Show an answer as it comes. With ``stopped``, Ctrl-C ends it, and this is shown."""
    try:
        for piece in pieces:
            console.file.write(piece.translate(CONTROLS))
            console.file.flush()
    except KeyboardInterrupt:
        if stopped is None:
            raise
        console.print(stopped)
        return
    console.print()


def _read_line(console: Terminal) -> str | None:
    """A line from the terminal, or None at the end of the input or at Ctrl-C.

    Raises:
        UserError: for a line without an end: what is no terminal may send anything.
    """
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() line editing and history, where the system has it
    prompt = Text("> ", "bold cyan")
    try:
        if sys.stdin.isatty():
            return console.input(prompt)
        console.print(prompt, end="")
        line = sys.stdin.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise UserError(f"standard input: a line of more than {LONGEST_LINE:,} characters")
        if not line:
            raise EOFError
        return line.removesuffix("\n")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
