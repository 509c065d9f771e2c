"""What is asked: a `Suite` is a list of questions with their accepted answers, grouped by ability.

The built-in suite ``nano`` reads the test parts that ``mmmamba data build`` makes; `own_suite` reads a user's JSONL.
Which questions are taken depends only on the data, the limit and the seed, so every model sees the same ones.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmmamba.data.jsonl import JsonlDataset, encodable
from mmmamba.data.sample import BadSample, Sample, Turn
from mmmamba.errors import UserError
from mmmamba.evaluation.choices import LETTERS, choice_answer, normalise
from mmmamba.evaluation.scoring import METRICS
from mmmamba.outputs import file_hash

NANO_ABILITIES = ("easy", "read", "count", "relate", "absent", "text", "recall-1x", "recall-4x", "recall-16x")
NANO_FILES = ("easy-vqa/test.jsonl", "primer/test.jsonl")
NANO_LIMIT = 200
NANO_DATA = Path("data/nano")
OnBadSample = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: the sample to ask, what counts as right, and what it is grouped under."""

    sample: Sample
    ability: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    chance: float | None = None

    @property
    def unit(self) -> str:
        """What the item is paired by in MME: its picture."""
        return self.sample.images[0] if self.sample.images else self.sample.id

    @property
    def prompt(self) -> str:
        return next((turn.text for turn in reversed(self.sample.turns) if turn.role == "human"), "")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Questions in the order of their abilities. ``bad_samples``: what was skipped, as {id, where, reason}."""

    name: str
    metric: str
    items: tuple[Item, ...]
    max_new_tokens: int
    source: str
    bad_samples: tuple[dict[str, str], ...] = field(default=())

    @property
    def abilities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.ability for item in self.items))

    def of(self, ability: str) -> list[int]:
        """Indices of the items of one ability."""
        return [i for i, item in enumerate(self.items) if item.ability == ability]

    def content_hash(self) -> str:
        """A short hash of all that is asked and of what counts as right, the pictures' content excepted."""
        digest = hashlib.sha256(f"{self.metric} {self.max_new_tokens}".encode())
        for item in self.items:
            said = [(turn.role, turn.text) for turn in item.sample.turns]
            about = [item.sample.id, said, len(item.sample.images), item.ability, item.references, item.choices]
            digest.update(json.dumps([*about, item.chance]).encode())
        return digest.hexdigest()[:16]

    def picture_hash(self) -> str:
        """A short hash of the bytes of all pictures, in the order in which they are shown."""
        digest = hashlib.sha256()
        known: dict[str, bytes] = {}
        for item in self.items:
            for path in item.sample.images:
                if path not in known:
                    known[path] = file_hash(Path(path)).encode() + b";"  # unreadable files are reported later
                digest.update(known[path])
        return digest.hexdigest()[:16]


def nano_suite(
    data_dir: Path | str,
    *,
    limit: int | None = NANO_LIMIT,
    abilities: Sequence[str] | None = None,
    seed: int = 0,
    max_new_tokens: int = 16,
    on_bad_sample: OnBadSample = "stop",
) -> Suite:
    """The built-in suite: up to ``limit`` unseen questions per ability from what ``mmmamba data build`` made."""
    folder = Path(data_dir)
    missing = [name for name in NANO_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {' or '.join(missing)}; build it with: mmmamba data build --out {folder}")
    known = _checked_abilities(abilities, NANO_ABILITIES, str(folder))
    records, bad = _read([folder / name for name in NANO_FILES], None, on_bad_sample)
    items = []
    for sample in records:
        ability = sample.extra.get("ability")
        if ability not in NANO_ABILITIES:
            known_names = ", ".join(NANO_ABILITIES)
            raise BadSample(f"{sample.where}: field 'ability' must be one of {known_names}, got {ability!r}")
        if ability in known:
            items.append(_item(sample, "exact", str(ability)))
    absent = [ability for ability in known if not any(item.ability == ability for item in items)]
    if absent:
        raise UserError(f"{folder}: no test questions for {', '.join(absent)}")
    chosen = _choose(items, known, limit, seed, metric="exact")
    return Suite(
        name="nano", metric="exact", items=chosen, max_new_tokens=max_new_tokens, source=str(folder),
        bad_samples=tuple(bad),
    )  # fmt: skip


def own_suite(
    data: Path | str,
    *,
    metric: str = "exact",
    image_root: Path | str | None = None,
    limit: int | None = None,
    abilities: Sequence[str] | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    on_bad_sample: OnBadSample = "stop",
) -> Suite:
    """A user's JSONL set. The reference is the keys ``answers`` or ``answer``, or else the last gpt turn.

    Optional keys of a record: ``ability`` (the group it is reported under; "all" without), ``choices`` (option texts,
    for the metric ``choice``), ``chance`` (what guessing scores).
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    path = Path(data)
    samples, bad = _read([path], image_root, on_bad_sample)
    items: list[Item] = []
    for sample in samples:
        try:
            items.append(_item(sample, metric, _ability(sample)))
        except BadSample as error:
            _stop_or_note(error, sample.id, sample.where, on_bad_sample, bad)
    if not items:
        raise UserError(f"{path}: no question to ask")
    known = _checked_abilities(abilities, tuple(dict.fromkeys(item.ability for item in items)), str(path))
    chosen = _choose(items, known, limit, seed, metric)
    if metric == "mme":
        _check_pairs(chosen, path, tolerate=bool(bad))
    return Suite(
        name=path.stem, metric=metric, items=chosen, max_new_tokens=max_new_tokens, source=str(path),
        bad_samples=tuple(bad),
    )  # fmt: skip


def bad_sample_note(error: Exception, sample_id: str, where: str) -> dict[str, str]:
    return {"id": sample_id, "where": where, "reason": str(error)}


def _stop_or_note(error: BadSample, sample_id: str, where: str, on_bad_sample: str, bad: list[dict[str, str]]) -> None:
    if on_bad_sample == "stop":
        raise error
    bad.append(bad_sample_note(error, sample_id, where))


def _read(
    paths: Iterable[Path], image_root: Path | str | None, on_bad_sample: str
) -> tuple[list[Sample], list[dict[str, str]]]:
    samples: list[Sample] = []
    bad: list[dict[str, str]] = []
    for path in paths:
        dataset = JsonlDataset(path, image_root)
        for i in range(len(dataset)):
            try:
                samples.append(dataset[i])
            except BadSample as error:
                _stop_or_note(error, f"record {i}", dataset.where(i), on_bad_sample, bad)
    return samples, bad


def _item(sample: Sample, metric: str, ability: str) -> Item:
    """Find what counts as right, and give the sample a last gpt turn (perplexity is measured on it)."""
    turns = sample.turns
    said = turns[-1].text if turns and turns[-1].role == "gpt" else None
    choices = tuple(_texts(sample, "choices")) if "choices" in sample.extra else ()
    key = next((key for key in ("answers", "answer") if key in sample.extra), None)
    references = tuple(_texts(sample, key)) if key else (said,) if said is not None else ()
    if not references:
        raise BadSample(
            f"{sample.where}: no reference answer: needs a last turn from 'gpt', or the field 'answer' or 'answers'"
        )
    if metric == "choice":
        references = tuple(_letter(sample, reference, choices) for reference in references)
    if metric in ("yes_no", "mme"):
        unclear = [reference for reference in references if normalise(reference) not in ("yes", "no")]
        if unclear:
            raise BadSample(f"{sample.where}: the metric '{metric}' needs the answer 'yes' or 'no', got {unclear[0]!r}")
    if said is None:
        sample = replace(sample, turns=(*turns, Turn(role="gpt", text=references[0])))
    return Item(sample=sample, ability=ability, references=references, choices=choices, chance=_chance(sample))


def _texts(sample: Sample, key: str) -> Iterator[str]:
    """The texts under a key: a string or number, or a list of them or of VQA's ``{"answer": text}``."""
    value = sample.extra[key]
    for entry in value if isinstance(value, list) else [value]:
        text: Any = entry.get("answer") if isinstance(entry, dict) else entry
        if not isinstance(text, (str, int, float)) or isinstance(text, bool):
            raise BadSample(f"{sample.where}: field '{key}' must be text or a list of texts, got {entry!r:.60}")
        yield encodable(str(text), sample.where, key)


def _ability(sample: Sample) -> str:
    """The group of a question: "all" where the record has none, or null."""
    value = sample.extra.get("ability")
    if value is None:
        return "all"
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"{sample.where}: field 'ability' must be a text that is not empty, got {value!r:.60}")
    return encodable(value, sample.where, "ability")


def _letter(sample: Sample, reference: str, choices: tuple[str, ...]) -> str:
    """A choice's reference as a letter: an option's text wins, then a letter; a whole number counts from 0.

    ScienceQA counts its options so.
    """
    if len(choices) > len(LETTERS):
        raise BadSample(
            f"{sample.where}: field 'choices' has {len(choices)} options, at most {len(LETTERS)} have letters"
        )
    letter = choice_answer(reference, choices)
    if letter is not None:
        return letter
    # A number of two digits at most: Python refuses to read one of five thousand.
    if reference.isdecimal() and len(reference) <= 2 and int(reference) < (len(choices) or len(LETTERS)):
        return LETTERS[int(reference)]
    raise BadSample(f"{sample.where}: the metric 'choice' needs a letter or an option's text, got {reference!r:.80}")


def _chance(sample: Sample) -> float | None:
    chance = sample.extra.get("chance")
    if chance is None:
        return None
    if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 <= chance <= 1:
        raise BadSample(f"{sample.where}: field 'chance' must be a number from 0 to 1, got {chance!r}")
    return float(chance)


def _checked_abilities(wanted: Sequence[str] | None, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not wanted:
        return known
    unknown = [ability for ability in wanted if ability not in known]
    if unknown:
        raise UserError(f"{where}: unknown ability {unknown[0]!r}; known: {', '.join(known)}")
    return tuple(ability for ability in known if ability in wanted)


def _choose(items: list[Item], abilities: Sequence[str], limit: int | None, seed: int, metric: str) -> tuple[Item, ...]:
    """At most ``limit`` units of each ability, in file order; a smaller limit takes part of what a larger does."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    chosen: list[Item] = []
    for ability in abilities:
        mine = [item for item in items if item.ability == ability]
        # MME is scored by pairs: the unit is the picture. Elsewhere every item is a unit.
        keys = [item.unit if metric == "mme" else str(i) for i, item in enumerate(mine)]
        units = list(dict.fromkeys(keys))
        if limit is not None and limit < len(units):
            order = np.random.default_rng([seed, zlib.crc32(ability.encode())]).permutation(len(units))
            units = [units[i] for i in order[:limit]]
        kept = set(units)
        chosen += [item for item, key in zip(mine, keys, strict=True) if key in kept]
    return tuple(chosen)


def _check_pairs(items: Sequence[Item], path: Path, tolerate: bool) -> None:
    """MME asks two questions about each picture. ``tolerate``: bad samples were skipped, so a pair may be broken."""
    questions: dict[tuple[str, str], int] = {}
    for item in items:
        questions[item.ability, item.unit] = questions.get((item.ability, item.unit), 0) + 1
    for (ability, unit), n in questions.items():
        if n != 2 and not (tolerate and n == 1):
            raise UserError(f"{path}: the metric 'mme' needs two questions per image; {unit} ({ability}) has {n}")
