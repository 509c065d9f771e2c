"""From answers to numbers: each model's scores, the share of its teacher's that it keeps, and how often both agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmmamba.errors import UserError
from mmmamba.evaluation import scoring
from mmmamba.evaluation.predict import Answers
from mmmamba.evaluation.statistics import (
    Interval,
    chance_corrected,
    mean_of,
    mean_retention,
    proportion,
    retention,
    wilson,
)
from mmmamba.evaluation.suite import Item, Suite


@dataclass(frozen=True, kw_only=True)
class AbilityResult:
    """One model on one ability, or (``n`` over all of them) the mean over abilities.

    Attributes:
        n: questions asked.
        correct: sum of the scores (the number of right answers, where an answer is right or wrong).
        score: mean score with its 95 % interval. The metric's own extra numbers are in ``extra``.
        retention: min(student / teacher, 1) with its paired interval.
        chance: what guessing scores: the blind teacher where it was asked, else what the data states.
        retention_over_chance: (student − chance) / (teacher − chance), clipped to [0, 1].
        agreement: share of questions on which it says what the teacher says.
        nll, perplexity: mean nats per token of the reference answers, and exp of that.
        seconds, tokens_per_second: generating the answers; prompt tokens count.
    """

    n: int
    correct: float
    score: Interval
    nll: float
    perplexity: float
    seconds: float
    tokens_per_second: float
    retention: Interval | None = None
    chance: float | None = None
    chance_from: str | None = None
    retention_over_chance: float | None = None
    agreement: Interval | None = None
    extra: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One row: a model, what it was compared with, and its numbers. ``blind``: it saw grey pictures only."""

    label: str
    path: str
    layers: str
    against: str | None
    blind: bool
    abilities: dict[str, AbilityResult]
    mean: AbilityResult

    @property
    def retention(self) -> Interval | None:
        return self.mean.retention


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of ``predictions-LABEL.jsonl``."""

    id: str
    ability: str
    prompt: str
    reference: str | list[str]
    prediction: str
    score: float
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """Several models on the same questions."""

    suite: str
    metric: str
    source: str
    models: tuple[ModelResult, ...]
    items: tuple[Item, ...]
    predictions: dict[str, tuple[Prediction, ...]]
    bad_samples: tuple[dict[str, str], ...]
    request: dict[str, Any]
    environment: dict[str, str]

    @property
    def abilities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.ability for item in self.items))

    def model(self, label: str) -> ModelResult:
        return next(model for model in self.models if model.label == label)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model that was asked: its answers and what they are compared with (labels of other rows)."""

    label: str
    path: str
    layers: str
    answers: Answers
    against: str | None = None
    blind: bool = False


def assemble(
    suite: Suite, rows: Sequence[Row], *, seed: int, request: dict[str, Any], environment: dict[str, str]
) -> Report:
    """Score all rows on the questions that every one of them could be asked."""
    kept = [i for i in range(len(suite.items)) if all(i in row.answers.texts for row in rows)]
    if not kept:
        raise UserError(f"{suite.source}: no question could be asked; {len(suite.items)} were skipped as bad samples")
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise UserError(f"two rows are called {next(label for label in labels if labels.count(label) > 1)!r}")
    by_label = {row.label: _Scored(suite, row, kept) for row in rows}
    blinds = {row.against: by_label[row.label] for row in rows if row.blind}
    models = tuple(_model(by_label[row.label], by_label, blinds, seed) for row in rows)
    bad = {note["where"]: note for row in rows for note in row.answers.bad_samples}
    return Report(
        suite=suite.name,
        metric=suite.metric,
        source=suite.source,
        models=models,
        items=tuple(suite.items[i] for i in kept),
        predictions={row.label: by_label[row.label].predictions() for row in rows},
        bad_samples=(*suite.bad_samples, *bad.values()),
        request=request,
        environment=environment,
    )


class _Scored:
    """One row's answers to the kept items, scored, and grouped by ability."""

    def __init__(self, suite: Suite, row: Row, kept: Sequence[int]) -> None:
        self.row, self.suite = row, suite
        self.kept = kept
        self.items = {i: suite.items[i] for i in kept}
        self.scores = {
            i: scoring.score_answer(suite.metric, row.answers.texts[i], item.references, item.choices)
            for i, item in self.items.items()
        }
        self.abilities = tuple(dict.fromkeys(item.ability for item in self.items.values()))

    def of(self, ability: str) -> list[int]:
        return [i for i, item in self.items.items() if item.ability == ability]

    def units(self, ability: str) -> list[float]:
        """Scores of the units that ratios and their intervals are computed from.

        In MME a unit is a picture: the mean of its two answers and whether both are right, halved, so that 200 times
        the mean over units is the subtask's score. Elsewhere a unit is a question.
        """
        if self.suite.metric != "mme":
            return [self.scores[i] for i in self.of(ability)]
        pairs: dict[str, list[float]] = {}
        for i in self.of(ability):
            pairs.setdefault(self.items[i].unit, []).append(self.scores[i])
        return [(sum(pair) / len(pair) + min(pair)) / 2 for pair in pairs.values()]

    def extra(self, ability: str) -> dict[str, float | None]:
        indices = self.of(ability)
        texts = [self.row.answers.texts[i] for i in indices]
        if self.suite.metric == "yes_no":
            return scoring.yes_no_summary(texts, [self.items[i].references[0] for i in indices])
        if self.suite.metric == "mme":
            return {**scoring.mme_summary([self.scores[i] for i in indices], [self.items[i].unit for i in indices])}
        if self.suite.metric == "choice":
            parsed = [
                scoring.choice_answer(text, self.items[i].choices) for text, i in zip(texts, indices, strict=True)
            ]
            return {"unparsed": float(parsed.count(None))}
        return {}

    def nll(self, indices: Sequence[int]) -> float:
        found = [self.row.answers.likelihood[i] for i in indices]
        tokens = sum(score.tokens for score in found)
        return sum(score.nll for score in found) / tokens if tokens else math.nan

    def predictions(self) -> tuple[Prediction, ...]:
        return tuple(
            Prediction(
                id=item.sample.id,
                ability=item.ability,
                prompt=item.prompt,
                reference=item.references[0] if len(item.references) == 1 else list(item.references),
                prediction=self.row.answers.texts[i],
                score=self.scores[i],
                correct=self.scores[i] >= 0.5,
            )
            for i, item in self.items.items()
        )


def _model(
    scored: _Scored, by_label: Mapping[str, _Scored], blinds: Mapping[str | None, _Scored], seed: int
) -> ModelResult:
    row = scored.row
    teacher = by_label[row.against] if row.against else None
    blind = None if row.blind else blinds.get(row.against or row.label)
    abilities = {ability: _ability(scored, teacher, blind, ability, seed) for ability in scored.abilities}
    return ModelResult(
        label=row.label,
        path=row.path,
        layers=row.layers,
        against=row.against,
        blind=row.blind,
        abilities=abilities,
        mean=_mean(scored, teacher, abilities, seed),
    )


def _ability(scored: _Scored, teacher: _Scored | None, blind: _Scored | None, ability: str, seed: int) -> AbilityResult:
    indices = scored.of(ability)
    values = [scored.scores[i] for i in indices]
    units = scored.units(ability)
    nll = scored.nll(indices)
    cost = scored.row.answers.costs[ability]
    chance, chance_from = _chance(scored, blind, ability)
    measured: dict[str, Any] = {}
    if teacher is not None:
        mine, theirs = _average(units), _average(teacher.units(ability))
        measured["retention"] = retention(units, teacher.units(ability), seed)
        measured["agreement"] = wilson(_agreements(scored, teacher, indices), len(indices))
        if chance is not None and not scored.row.blind:
            measured["retention_over_chance"] = chance_corrected(mine, theirs, chance)
    return AbilityResult(
        n=len(indices),
        correct=sum(values),
        score=proportion(values, seed),
        nll=nll,
        perplexity=_exp(nll),
        seconds=cost.seconds,
        tokens_per_second=cost.tokens_per_second,
        chance=chance,
        chance_from=chance_from,
        extra=scored.extra(ability),
        **measured,
    )


def _mean(scored: _Scored, teacher: _Scored | None, abilities: Mapping[str, AbilityResult], seed: int) -> AbilityResult:
    """The mean over abilities, which count equally; likelihood, agreement and cost are over all questions."""
    results = list(abilities.values())
    nll = scored.nll(scored.kept)
    costs = [scored.row.answers.costs[ability] for ability in abilities]
    seconds = sum(cost.seconds for cost in costs)
    over_chance = [r.retention_over_chance for r in results if r.retention_over_chance is not None]
    extra: dict[str, float | None] = {}
    if scored.suite.metric == "yes_no":
        known = [f1 for r in results if (f1 := r.extra["f1"]) is not None]
        extra["f1"] = _average(known) if known else None
    if scored.suite.metric == "mme":
        extra |= scoring.mme_totals({ability: r.extra["score"] or 0.0 for ability, r in abilities.items()})
    kept = mean_retention([(scored.units(a), teacher.units(a)) for a in abilities], seed) if teacher else None
    return AbilityResult(
        n=len(scored.kept),
        correct=sum(r.correct for r in results),
        score=mean_of([r.score for r in results]),
        nll=nll,
        perplexity=_exp(nll),
        seconds=seconds,
        tokens_per_second=sum(cost.tokens for cost in costs) / seconds if seconds else math.nan,
        retention=kept,
        retention_over_chance=_average(over_chance) if over_chance else None,
        agreement=wilson(_agreements(scored, teacher, scored.kept), len(scored.kept)) if teacher else None,
        extra=extra,
    )


def _chance(scored: _Scored, blind: _Scored | None, ability: str) -> tuple[float | None, str | None]:
    if blind is not None:
        return _average(blind.units(ability)), f"answers of {blind.row.label}"
    if scored.suite.metric == "mme":
        return None, None  # a stated chance is per question, a unit of MME is a pair of them
    stated = [scored.items[i].chance for i in scored.of(ability)]
    known = [chance for chance in stated if chance is not None]
    return (_average(known), "stated by the data") if known and len(known) == len(stated) else (None, None)


def _agreements(scored: _Scored, teacher: _Scored, indices: Sequence[int]) -> int:
    said, also = scored.row.answers.texts, teacher.row.answers.texts
    metric = scored.suite.metric
    return sum(scoring.agrees(metric, said[i], also[i], scored.items[i].choices) for i in indices)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(nll: float) -> float:
    return nll if math.isnan(nll) else math.exp(nll) if nll < 700 else math.inf
