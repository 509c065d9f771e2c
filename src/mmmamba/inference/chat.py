"""A conversation that carries the model's state from turn to turn, and the ``chat`` verb around it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from mmmamba.checkpoints import load
from mmmamba.data.images import load_image
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.samples import Turn
from mmmamba.data.template import add_missing_marks
from mmmamba.device import pick_device, pick_dtype
from mmmamba.errors import UserError
from mmmamba.inference.engine import Stream, stream
from mmmamba.inference.sampling import Sampling
from mmmamba.model.model import Model

HELP = """\
Type a question and press Enter. Lines that begin with a slash are commands:
  /image PATH   show a picture with the next question (repeat for several)
  /reset        forget the conversation
  /help         this text
  /quit         leave (so does the end of the input, Ctrl-D)
Ctrl-C stops an answer; the conversation goes on from what was said."""

# What an answer may not hold when it is shown: control characters (but tab and newline) could steer the terminal.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})


class Chat:
    """A conversation with a model. Only the new turn is read at each question; the state holds the rest.

    (Some models' own chat templates change what came before when a conversation goes on, and then it is read anew.)

    Args:
        model: the network.
        processor: its processor.
        sampling: how tokens are picked; greedy by default. Turn i draws the random numbers of sequence i.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Model, processor: Processor, sampling: Sampling | None = None, *, max_new_tokens: int = 256
    ) -> None:
        self.model = model
        self.processor = processor
        self.sampling = sampling or Sampling()
        self.max_new_tokens = max_new_tokens
        self.answer: Stream | None = None  # the latest answer: its state and unfed tokens are the conversation so far
        self.turns = 0
        self._turns: list[Turn] = []  # all that was said before the latest answer
        self._shown: list[Image.Image | str | Path] = []  # with these pictures

    def ask(self, text: str, images: Sequence[Image.Image | str | Path] = ()) -> Iterator[str]:
        """Pieces of the answer to ``text``, as they come.

        The question is read at once. An answer left before its end counts as said up to there. A question that cannot
        be encoded (a broken picture) leaves the conversation as it was.
        """
        turn = Turn(role="human", text=text)
        (marked,) = add_missing_marks([turn], len(images))
        turns, shown = [*self._said(), marked], [*self._shown, *images]
        if self.answer is not None and self.processor.appends:
            state, encoded = self.answer.state, self._follow(self.answer, turn, images)
        else:
            state, encoded = None, self.processor.prompt(turns, shown)
        self.answer = stream(
            self.model,
            self.processor,
            encoded,
            state=state,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            sequence=self.turns,
        )
        self.turns += 1
        self._turns, self._shown = turns, shown
        return iter(self.answer)

    def reset(self) -> None:
        """Forget the conversation."""
        self.answer = None
        self.turns = 0
        self._turns, self._shown = [], []

    def _said(self) -> list[Turn]:
        """The conversation so far."""
        if self.answer is None:
            return []
        return [*self._turns, Turn(role="gpt", text=self.processor.decode(self.answer.token_ids))]

    def _follow(self, answer: Stream, turn: Turn, images: Sequence[Image.Image | str | Path]) -> Encoded:
        """What the state has not seen: the last of the answer, the mark that ends it, then the new turn.

        Whatever ended the answer (the model, its longest length, the user), the template closes it with its own mark.
        """
        encoded = self.processor.continuation(turn, list(images))
        ending = np.array([*answer.unfed, self.processor.stop_token_ids[0]], dtype=encoded.input_ids.dtype)
        return replace(
            encoded,
            input_ids=np.concatenate([ending, encoded.input_ids]),
            labels=np.concatenate([np.full_like(ending, UNSCORED), encoded.labels]),
        )


def chat(
    model: str = "nano-linear",
    question: str | None = None,
    *,
    image: tuple[Path, ...] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Ask a model about pictures and text, once or in a conversation.

    With a question, the answer is printed as it is generated and the command ends. Without one, a conversation begins:
    each question adds to what the model remembers, and only the new text is read. For example:

        mmmamba chat nano-linear --image picture.png "What is in the picture?"

    Args:
        model: A checkpoint folder, or the name of a built-in model such as nano-linear, nano-hybrid or nano-teacher.
        question: What to ask. Leave it out for a conversation.
        image: A picture to show with the (first) question. Repeat the option for several pictures.
        temperature: 0 always takes the most likely token. 1 draws from the model's own distribution; lower is more
            cautious, higher more varied.
        top_k: Draw among the k most likely tokens only. Off by default.
        top_p: Draw among the most likely tokens that together hold this probability only, such as 0.9. Off by default.
        repetition_penalty: Above 1, makes tokens that the answer already holds less likely.
        seed: Which random numbers are drawn. The same seed and questions give the same answers.
        max_new_tokens: Longest answer, in tokens.
        device: Where to run, such as cpu or cuda. The default takes a GPU when there is one.
        dtype: Number format of the weights. The default is bfloat16 on a GPU and float32 elsewhere.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    images = [load_image(path, "chat") for path in image]
    where = pick_device(device)
    network = load(model, dtype=pick_dtype(dtype, where), device=where)
    session = Chat(network, Processor.from_folder(model), sampling, max_new_tokens=max_new_tokens)
    console = Console()
    if question is not None:
        _print_answer(console, session.ask(question, images))
        return
    console.print(f"[bold]{escape(model)}[/bold], /help lists the commands", highlight=False, soft_wrap=True)
    converse(session, images, console, _read_line)


def converse(
    session: Chat, images: Sequence[Image.Image], console: Console, read: Callable[[Console], str | None]
) -> None:
    """The interactive loop: read a line, do what it says, until /quit or the end of the input.

    Args:
        session: the conversation.
        images: pictures for the first question.
        console: where answers go.
        read: the next line, or None at the end of the input.
    """
    shown = list(images)
    while (line := read(console)) is not None:
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/help":
                console.print(HELP, markup=False, highlight=False)
            elif command == "/reset":
                session.reset()
                shown = []
                console.print("The conversation is forgotten.")
            elif command == "/image" and not argument.strip():
                console.print("/image needs the path of a picture.")
            elif command == "/image":
                shown.append(load_image(Path(argument.strip().strip("\"'")).expanduser(), "chat"))
                console.print(f"Shown with your next question: {len(shown)} picture{'s' * (len(shown) > 1)}.")
            elif command.startswith("/"):
                console.print(f"There is no command {command}; /help lists them.", markup=False, highlight=False)
            elif command:
                answer = session.ask(line.strip(), shown)
                shown = []
                _print_answer(console, answer)
        except UserError as error:  # a wrong path or question must not end the conversation
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\n(stopped)")


def _print_answer(console: Console, pieces: Iterator[str]) -> None:
    for piece in pieces:
        console.file.write(piece.translate(CONTROLS))
        console.file.flush()
    console.print()


def _read_line(console: Console) -> str | None:
    """A line from the terminal, or None at the end of the input or at Ctrl-C."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() line editing and history, where the system has it
    try:
        return console.input("[bold cyan]>[/bold cyan] ")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
