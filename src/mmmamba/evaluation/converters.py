"""Published benchmark files → our JSONL. Each converter reads local files only; nothing is downloaded.

``mmmamba data convert pope coco_pope_random.json --image-root val2014 --out pope.jsonl`` and then
``mmmamba eval MODEL --data pope.jsonl --metric yes_no``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mmmamba.checkpoints.io import write_atomically
from mmmamba.errors import UserError
from mmmamba.evaluation.choices import LETTERS, choice_answer
from mmmamba.jsonfile import MAX_DATA_BYTES, parse_json, read_json
from mmmamba.outputs import check_file
from mmmamba.progress import Terminal

Source = Literal["pope", "scienceqa", "mme", "textvqa", "gqa"]
Record = dict[str, Any]

METRIC_OF: Mapping[str, str] = {"pope": "yes_no", "scienceqa": "choice", "mme": "mme", "textvqa": "vqa", "gqa": "vqa"}
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
PICTURES = (".jpg", ".jpeg", ".png")


def convert_dataset(
    source: Source,
    path: Path,
    *,
    out: Path,
    image_root: Path | None = None,
    split: str = "test",
    prompt: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a public benchmark's own files, already on this machine, into our JSONL.

    For example:

        mmmamba data convert pope coco/coco_pope_random.json --image-root val2014 --out pope.jsonl
        mmmamba eval nano-linear --data pope.jsonl --metric yes_no

    Nothing is downloaded, and pictures are not copied: the JSONL names them where they are. Every picture must be
    there. The last line printed is the command that scores the result by the benchmark's own rule.

    Args:
        source: Which benchmark the files are of.
        path: pope: a coco_pope_*.json file, or a folder with several (each becomes an ability). scienceqa: the folder
            with problems.json and pid_splits.json. mme: the folder with one folder per subtask. textvqa: the file
            TextVQA_0.5.1_val.json. gqa: the file testdev_balanced_questions.json.
        out: The JSONL file to write.
        image_root: The folder with the pictures. Default: the folder of the questions (scienceqa: its folder named
            like the split).
        split: Which split of scienceqa to take.
        prompt: What to add after each question. Default: the usual request for a short answer or a letter;
            an empty text adds nothing.
        overwrite: Replace the file at --out, unless it is one of the files that are read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if image_root is not None and not image_root.is_dir():
        raise UserError(f"{image_root}: no such image folder")
    check_file(out, read=[path, *([image_root] if image_root else [])], overwrite=overwrite)
    reader = _READERS[source]
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with open(temporary, "w", encoding="utf-8") as file:
            for record in reader(path, image_root, split, prompt):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        if count == 0:
            raise UserError(f"{path}: no {source} question found")

    write_atomically(out, write)
    console = Terminal()
    console.print(f"{count} questions: {out}", soft_wrap=True)
    console.print(f"mmmamba eval MODEL --data {out} --metric {METRIC_OF[source]}", soft_wrap=True)
    return out


# --- one reader per benchmark -----------------------------------------------------------------------------------------


def pope(path: Path, image_root: Path | None, split: str = "", prompt: str | None = None) -> Iterator[Record]:
    """POPE: JSON lines {"question_id", "image", "text", "label"}; each file is an ability (random, popular, …)."""
    files = [path] if path.is_file() else sorted([*path.glob("*pope*.json"), *path.glob("*pope*.jsonl")])
    if not files:
        raise UserError(f"{path}: no coco_pope_*.json file in this folder")
    for file in files:
        ability = file.stem.removeprefix("coco_pope_")
        root = image_root or file.parent
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            row = _object(parse_json(line, where), where)
            label = _field(row, "label", str, where).strip().lower()
            if label not in ("yes", "no"):
                raise UserError(f"{where}: field 'label' must be yes or no, got {label!r}")
            identity = f"{ability}-{row.get('question_id', number)}"
            image = _picture(root / _field(row, "image", str, where), where, "image")
            question = _field(row, "text", str, where)
            yield _record(identity, image, _asked(question, prompt, SHORT_ANSWER), label, ability)


def scienceqa(path: Path, image_root: Path | None, split: str = "test", prompt: str | None = None) -> Iterator[Record]:
    """ScienceQA: problems.json and pid_splits.json; pictures at SPLIT/PID/image.png; options become A, B, C, …."""
    splits = _mapping(path / "pid_splits.json")
    if split not in splits:
        raise UserError(f"{path / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    problems_file = path / "problems.json"
    problems = _mapping(problems_file)
    root = image_root or path / split
    for pid in _field(splits, split, list, str(path / "pid_splits.json")):
        where = f"{problems_file}: problem {pid}"
        if str(pid) not in problems:
            raise UserError(f"{problems_file}: problem {pid} of split {split!r} is missing")
        row = _object(problems[str(pid)], where)
        choices = _field(row, "choices", list, where)
        if not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{where}: field 'choices' must be a list of texts")
        answer = _field(row, "answer", int, where)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise UserError(f"{where}: field 'answer' is {answer} for {len(choices)} choices")
        hint = str(row.get("hint") or "")
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = "\n".join(part for part in (hint, _field(row, "question", str, where), options) if part)
        image = None
        if row.get("image"):
            file = str(row["image"])
            image = _picture(_first_existing(root / str(pid) / file, root / file), where, "image")
        ability = "image" if image else "text"
        record = _record(str(pid), image, _asked(question, prompt, LETTER_ANSWER), LETTERS[answer], ability)
        # Where the letter is the text of another option, the reference is the option's own text.
        if choice_answer(LETTERS[answer], choices) != LETTERS[answer]:
            record["answer"] = choices[answer]
        yield record | {"choices": choices, "chance": 1 / len(choices)}


def mme(path: Path, image_root: Path | None, split: str = "", prompt: str | None = None) -> Iterator[Record]:
    """MME: one folder per subtask with NAME.txt of two lines "question<TAB>answer", with NAME.jpg or .png.

    The layout with ``questions_answers_YN/`` and ``images/`` inside a subtask is read too.
    """
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    if path.is_dir() and next(path.glob("*.txt"), None) is not None:
        folders = [path]  # one subtask by itself
    for folder in folders:
        nested = folder / "questions_answers_YN"
        texts, pictures = (nested, folder / "images") if nested.is_dir() else (folder, folder)
        if image_root is not None:
            pictures = image_root / pictures.relative_to(path)
        for file in sorted(texts.glob("*.txt")):
            image = _first_existing(*(pictures / f"{file.stem}{ending}" for ending in PICTURES))
            lines = [line for line in _lines(file) if line.strip()]
            if len(lines) != 2:
                raise UserError(f"{file}: must hold two questions, one a line, and holds {len(lines)}")
            for number, line in enumerate(lines, start=1):
                question, tab, answer = line.rpartition("\t")
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    raise UserError(f"{file}:{number}: must be a question, a tab, and Yes or No; got {line!r}")
                # MME's questions end with their own request for yes or no.
                asked = _asked(question, prompt, "")
                found = _picture(image, f"{file}:{number}", "image")
                yield _record(f"{folder.name}-{file.stem}-{number}", found, asked, answer.strip(), folder.name)


def textvqa(path: Path, image_root: Path | None, split: str = "", prompt: str | None = None) -> Iterator[Record]:
    """TextVQA: {"data": [{"question", "image_id", "question_id", "answers"}, …]}; pictures are IMAGE_ID.jpg."""
    rows = _field(_mapping(path), "data", list, str(path))
    for number, entry in enumerate(rows):
        where = f"{path}: data[{number}]"
        row = _object(entry, where)
        answers = _field(row, "answers", list, where)
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"{where}: field 'answers' must be a list of texts (the test split has none)")
        name = _field(row, "image_id", str, where)
        image = _picture((image_root or path.parent) / f"{name}.jpg", where, "image_id")
        question = _asked(_field(row, "question", str, where), prompt, SHORT_ANSWER)
        most_said = max(answers, key=answers.count)
        record = _record(str(row.get("question_id", number)), image, question, most_said, "textvqa")
        yield record | {"answers": answers}


def gqa(path: Path, image_root: Path | None, split: str = "", prompt: str | None = None) -> Iterator[Record]:
    """GQA: {id: {"question", "answer", "imageId"}}; pictures are IMAGEID.jpg."""
    for identity, entry in _mapping(path).items():
        where = f"{path}: question {identity}"
        row = _object(entry, where)
        image = _picture((image_root or path.parent) / f"{_field(row, 'imageId', str, where)}.jpg", where, "imageId")
        question = _asked(_field(row, "question", str, where), prompt, SHORT_ANSWER)
        yield _record(str(identity), image, question, _field(row, "answer", str, where), "gqa")


Reader = Callable[[Path, "Path | None", str, "str | None"], Iterator[Record]]
_READERS: Mapping[str, Reader] = {"pope": pope, "scienceqa": scienceqa, "mme": mme, "textvqa": textvqa, "gqa": gqa}


# --- small readers and checks -----------------------------------------------------------------------------------------


def _record(identity: str, image: Path | None, question: str, answer: str, ability: str) -> Record:
    record: Record = {"id": identity}
    if image is not None:
        record["image"] = str(image.absolute())
    mark = "<image>\n" if image is not None else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return record | {"conversations": turns, "ability": ability}


def _asked(question: str, prompt: str | None, usual: str) -> str:
    prompt = usual if prompt is None else prompt
    return f"{question.strip()}\n{prompt}" if prompt else question.strip()


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error


def _lines(file: Path) -> list[str]:
    """The lines of a text. Only a line feed ends one: ``splitlines`` would cut at U+2028 and a form feed, too."""
    return [line.removesuffix("\r") for line in _text(file).split("\n")]


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    return read_json(file, limit=MAX_DATA_BYTES)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, got {value!r:.60}")
    return value


def _field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: field '{name}' is missing")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise UserError(f"{where}: field '{name}' must be {kind.__name__}, got {row[name]!r:.60}")
    return row[name]


def _first_existing(*paths: Path) -> Path:
    return next((path for path in paths if path.is_file()), paths[0])


def _picture(path: Path, where: str, name: str) -> Path:
    if not path.is_file():
        raise UserError(f"{where}: field '{name}': no such picture: {path}")
    return path
