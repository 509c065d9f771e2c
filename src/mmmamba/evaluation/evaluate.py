"""The ``eval`` verb, and `compare`: several models on the same questions, as one report."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mmmamba.checkpoints import fingerprint, resolve
from mmmamba.errors import UserError
from mmmamba.evaluation.aggregate import Report, Row, assemble
from mmmamba.evaluation.predict import Loaded, answer, load_model
from mmmamba.evaluation.report import check_results, write_report
from mmmamba.evaluation.scoring import Metric
from mmmamba.evaluation.suite import NANO_DATA, NANO_FILES, NANO_LIMIT, OnBadSample, Suite, nano_suite, own_suite
from mmmamba.evaluation.tables import print_report
from mmmamba.file_names import file_labels, unique
from mmmamba.locks import alone_in
from mmmamba.outputs import check_folder
from mmmamba.progress import Progress, Terminal
from mmmamba.report.environment import environment


def evaluate(
    model: str,
    *,
    suite: Literal["nano"] = "nano",
    against: str | None = None,
    data: Path | None = None,
    metric: Metric = "exact",
    image_root: Path | None = None,
    data_dir: Path | None = None,
    abilities: tuple[str, ...] = (),
    limit: int | None = None,
    blind: bool = True,
    int8: bool = False,
    half_states: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    max_new_tokens: int | None = None,
    on_bad_sample: OnBadSample = "stop",
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int = 0,
) -> Report:
    """Measure what a model can do, by letting it answer questions.

    The model answers every question greedily, and each answer is compared with the reference: likelihoods alone hide
    losses that answers show. With --against, the same questions go to a teacher, and the report says how much of it
    the model keeps (retention) and how often both say the same (agreement). For example:

        mmmamba eval nano-linear --against nano-teacher

    Without --data the built-in nano suite is asked: shapes and colours (easy), reading, counting, relations, absent
    things, facts in text, and recall from far back in the context (1x, 4x and 16x the training length). With --data
    your own questions are asked:

        mmmamba eval nano-linear --data questions.jsonl --metric yes_no

    The results go to a folder: results.json, results.md, a plot (abilities.png, abilities.svg), and what each model
    said to each question (predictions-MODEL.jsonl).

    Args:
        model: A checkpoint folder, or the name of a built-in model such as nano-linear, nano-hybrid or nano-teacher.
        suite: The built-in questions to ask.
        against: The teacher to compare with: a checkpoint folder or the name of a built-in model.
        data: Your own questions instead: a JSONL file with id, image and conversations. The right answer is the last
            turn from gpt, or the key answer or answers. Optional keys: ability (the group to report under), choices
            (option texts for the metric choice), chance (what guessing scores).
        metric: How your own answers are scored. exact: equal but for case and a final period. yes_no: POPE's accuracy,
            precision, recall and F1. choice: an option's letter or text. mme: MME's accuracy per question and per
            picture. vqa: the votes of TextVQA, or the single answer of GQA.
        image_root: The folder that image paths in your own data start from. Default: the folder of the file.
        data_dir: A folder made by mmmamba data build. Default: data/nano, made when it is not there yet.
        abilities: Ask these abilities only, such as --abilities read --abilities count.
        limit: Most questions per ability; which ones depends on --seed only. Default: 200 of the nano suite, all of
            your own.
        blind: Also ask the teacher (or the model itself) with the pictures blanked, to show what guessing gives.
        int8: Ask the model once more with the tokens of its answers decoded from weights rounded to int8, to show what
            that costs.
        half_states: Ask the model once more with the states of its Mamba-2 layers kept in bfloat16 between the tokens
            of an answer, which large batches gain from, to show what that costs.
        out: The folder for the results. Default: runs/eval-MODEL.
        overwrite: Replace another evaluation's results in that folder, and other files of the same names. Without it,
            only what the same evaluation wrote there is replaced: the same models, questions and pictures.
        max_new_tokens: Longest answer, in tokens. Default: 16 in the nano suite, 64 for your own data.
        on_bad_sample: What to do with a question that cannot be used (a broken picture, a missing answer): stop with
            an error, or skip, count and list it.
        batch_tokens: Tokens to run at once. Less needs less memory.
        device: Where to run, such as cpu or cuda. The default takes a GPU when there is one.
        dtype: Number format of the weights. The default is bfloat16 on a GPU and float32 elsewhere.
        seed: Chooses the questions, and the random draws behind the intervals.
    """
    if data is None and (metric != "exact" or image_root is not None):
        raise UserError("--metric and --image-root speak of your own questions: pass them with --data FILE.jsonl")
    if data is not None and data_dir is not None:
        raise UserError("--data asks your own questions and --data-dir the built-in ones: pass one of them")
    models = _labelled(model, against)
    label = next(iter(models))
    folder = out if out is not None else Path("runs") / f"eval-{file_labels([label])[label]}"
    paths = {name: resolve(path) for name, path in models.items()}  # a wrong name is said before any data is built
    check_folder(folder, read=paths.values())
    against_labels = {label: list(models)[1]} if against else {}
    asked = list(models), _blinded(models, against_labels, blind), [label] * int8, [label] * half_states
    with alone_in(folder):
        questions = _questions(
            suite, data, data_dir, metric, image_root, limit, abilities, seed, max_new_tokens, on_bad_sample
        )
        request = {
            "models": {name: str(path) for name, path in models.items()},
            "questions": str(data) if data else suite, "metric": metric, "abilities": list(abilities), "limit": limit,
            "blind": blind, "int8": int8, "half_states": half_states, "max_new_tokens": max_new_tokens,
            "on_bad_sample": on_bad_sample, "device": device, "dtype": dtype, "seed": seed,
            "weights": {name: fingerprint(path)[:16] for name, path in paths.items()},
            "asked": questions.content_hash(), "pictures": questions.picture_hash(),
        }  # fmt: skip
        labels = [*models, *_controls(*asked).values()]
        check_results(folder, request, labels, read=[data] if data is not None else [], overwrite=overwrite)
        report = compare(
            models, questions, against=against_labels, blind=blind, int8=asked[2], half_states=asked[3],
            on_bad_sample=on_bad_sample, batch_tokens=batch_tokens, device=device, dtype=dtype, seed=seed,
            request=request,
        )  # fmt: skip
        results = write_report(report, folder)
    print_report(report)
    Terminal().print(f"results: {results}", soft_wrap=True)
    return report


def _questions(
    suite: str,
    data: Path | None,
    data_dir: Path | None,
    metric: Metric,
    image_root: Path | None,
    limit: int | None,
    abilities: tuple[str, ...],
    seed: int,
    max_new_tokens: int | None,
    on_bad_sample: OnBadSample,
) -> Suite:
    """What the verb asks: the built-in suite or a user's own."""
    if data is not None:
        return own_suite(
            data, metric=metric, image_root=image_root, limit=limit, abilities=abilities, seed=seed,
            max_new_tokens=64 if max_new_tokens is None else max_new_tokens, on_bad_sample=on_bad_sample,
        )  # fmt: skip
    return nano_suite(
        data_dir or _built_data(), limit=NANO_LIMIT if limit is None else limit, abilities=abilities, seed=seed,
        max_new_tokens=16 if max_new_tokens is None else max_new_tokens, on_bad_sample=on_bad_sample,
    )  # fmt: skip


def compare(
    models: Mapping[str, str | Path | Loaded],
    suite: Suite,
    *,
    against: Mapping[str, str] | None = None,
    blind: bool | Sequence[str] = True,
    int8: Sequence[str] = (),
    half_states: Sequence[str] = (),
    on_bad_sample: OnBadSample = "stop",
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    request: Mapping[str, object] | None = None,
    console: Terminal | None = None,
) -> Report:
    """Ask several models the same questions, one model in memory at a time.

    Args:
        models: label → checkpoint folder, built-in name, or a model already loaded.
        suite: the questions, from `nano_suite` or `own_suite`.
        against: label → label of the teacher its retention is measured against.
        blind: labels to ask once more with the pictures blanked. True: every teacher, or the first model where there
            is none. The rows are called "blind", or "LABEL, blind" where there are several.
        int8: labels to ask once more with the tokens of answers decoded from weights rounded to int8: "LABEL, int8".
        half_states: labels to ask once more with SSM states in bfloat16 between those tokens: "LABEL, bfloat16 states".
        request: what was asked for, kept in the results; the arguments of this call when omitted.

    Returns:
        The report; see `report.write_report` and `webpage.write_html`.
    """
    against = dict(against or {})
    for student, teacher in against.items():
        unknown = next((label for label in (student, teacher) if label not in models), None)
        if unknown is not None or student == teacher:
            raise UserError(f"cannot compare '{student}' with '{teacher}': models are {', '.join(models)}")
    if not suite.items:
        raise UserError(f"{suite.source}: no question to ask")
    blinded = _blinded(models, against, blind)
    for what, labels in (("int8 weights", int8), ("bfloat16 states", half_states)):
        if strangers := [label for label in labels if label not in models]:
            raise UserError(f"cannot ask '{strangers[0]}' with {what}: models are {', '.join(models)}")
    controls = _controls(list(models), blinded, int8, half_states)
    rows: list[Row] = []
    for label, model in models.items():
        loaded = model if isinstance(model, Loaded) else load_model(model, device=device, dtype=dtype)
        path = "(in memory)" if isinstance(model, Loaded) else str(model)
        net, its_teacher = loaded.model, against.get(label)
        own = net.int8_steps, net.half_states
        runs = [(label, its_teacher, False, own)]
        if label in int8:
            runs.append((controls[label, "int8"], its_teacher, False, (True, own[1])))
        if label in half_states:
            if not net.config.new_layers:
                raise UserError(f"cannot ask '{label}' with bfloat16 states: it has no Mamba-2 layer")
            runs.append((controls[label, "bfloat16 states"], its_teacher, False, (own[0], True)))
        if label in blinded:
            runs.append((controls[label, "blind"], label, True, own))
        for name, teacher_label, is_blind, (net.int8_steps, net.half_states) in runs:
            with Progress(name, len(suite.items), console=console) as bar:
                answers = answer(
                    loaded, suite, blind=is_blind, batch_tokens=batch_tokens, on_bad_sample=on_bad_sample,
                    progress=bar.advance,
                )  # fmt: skip
            layers = layers_of(loaded)
            rows.append(
                Row(label=name, path=path, layers=layers, answers=answers, against=teacher_label, blind=is_blind)
            )
        net.int8_steps, net.half_states = own
        made_on = environment_of(loaded)
        del loaded, net  # before the next model is read
        gc.collect()
    rows.sort(key=lambda row: row.blind)  # blind rows come last; the sort is stable
    return assemble(
        suite, rows, seed=seed, environment=made_on,
        request=dict(request) if request is not None else {
            "models": {label: "(in memory)" if isinstance(m, Loaded) else str(m) for label, m in models.items()},
            "against": against, "blind": blinded, "int8": list(int8), "half_states": list(half_states),
            "device": device, "dtype": dtype, "seed": seed,
        },
    )  # fmt: skip


def _blinded(models: Mapping[str, object], against: Mapping[str, str], blind: bool | Sequence[str]) -> list[str]:
    if isinstance(blind, bool):
        return (list(dict.fromkeys(against.values())) or list(models)[:1]) if blind else []
    unknown = [label for label in blind if label not in models]
    if unknown:
        raise UserError(f"cannot blind '{unknown[0]}': models are {', '.join(models)}")
    return list(blind)


def _controls(
    models: Sequence[str], blinded: Sequence[str], int8: Sequence[str], half_states: Sequence[str]
) -> dict[tuple[str, str], str]:
    """(model, what is done to it) → the label of its row; no row is called as a model or another row is."""
    found: dict[tuple[str, str], str] = {}
    for kind, labels in (("int8", int8), ("bfloat16 states", half_states), ("blind", blinded)):
        for label in labels:
            taken = [*models, *found.values()]
            short = kind == "blind" and len(blinded) == 1 and kind not in taken
            found[label, kind] = unique(kind if short else f"{label}, {kind}", taken)
    return found


def _labelled(model: str, against: str | None) -> dict[str, str]:
    """The last part of each path as its label; the teacher's gets a mark when both are the same."""
    label = Path(model).name or model
    if against is None:
        return {label: model}
    teacher = Path(against).name or against
    return {label: model, teacher if teacher != label else f"{teacher} (teacher)": against}


def _built_data() -> Path:
    """The default data folder; a small version is made, with a notice, when nothing is there."""
    if not all((NANO_DATA / name).is_file() for name in NANO_FILES):
        from mmmamba.data.build import build

        Terminal().print(f"{NANO_DATA} is not there: building it (once; about a minute)")
        build(out=NANO_DATA)
    return NANO_DATA


def layers_of(loaded: Loaded) -> str:
    """How many layers of each kind a model has."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(loaded.model.config.layer_map).items()))


def environment_of(loaded: Loaded) -> dict[str, str]:
    """What a model is asked with: versions, device and number format."""
    weight = next(loaded.model.parameters())
    found = environment(weight.device, weight.dtype)
    return {name: found[name] for name in ("mmmamba", "torch", "python", "platform", "device")} | {
        "dtype": found["weights"]
    }
