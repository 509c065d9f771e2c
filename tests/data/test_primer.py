"""The primer keeps its promises: held-out splits, true answers, even odds, bounded lengths, and no hidden state."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.sources.primer import ABILITIES, GROUPS, SPLITS, Example, Meter, corpus_texts, make, split_of
from mmmamba.data.sources.primer.lettering import CONTRAST, MARGIN, TILE, Lettering, load_font, luminance
from mmmamba.data.sources.primer.recall import SPANS
from mmmamba.data.sources.primer.scene import COLOURS, KINDS, SHAPES, Scene, Thing, big_shape
from mmmamba.data.tokenizer import Tokenizer

RECORDS = {"recall-4x": 25, "recall-16x": 12, "recall-1x": 80}
DEFAULT_RECORDS = 400
SINGULAR = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}


def groups(split: str) -> tuple[str, ...]:
    return GROUPS if split == "train" else ABILITIES


@pytest.fixture(scope="module")
def examples() -> dict[tuple[str, str], list[Example]]:
    """(split, group) → its first records."""
    meter = Meter()
    return {
        (split, group): [make(0, split, group, i, meter) for i in range(RECORDS.get(group, DEFAULT_RECORDS))]
        for split in SPLITS
        for group in groups(split)
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bpe(train_bpe(corpus_texts(), 640))


def turns(all_examples: dict[tuple[str, str], list[Example]]) -> Iterator[tuple[str, str, Example, str, str]]:
    """(split, group, example, question without the mark of a single picture, answer) of every turn."""
    for (split, group), some in all_examples.items():
        for example in some:
            for turn in example.turns:
                yield split, group, example, turn.question.removeprefix("<image>\n"), turn.answer


# ---------------------------------------------------------------------------------------------- splits


def test_every_key_belongs_to_the_split_that_uses_it(examples):
    for (split, _), some in examples.items():
        for example in some:
            assert example.keys
            assert {split_of(key) for key in example.keys} == {split}


def test_splits_share_no_word_number_scene_table_sequence_or_sum(examples):
    """Found again from the finished questions, answers and pictures, not from the keys that the generators give."""
    seen: dict[str, set[tuple[str, str]]] = {split: set() for split in SPLITS}
    for (split, group), some in examples.items():
        for example in some:
            seen[split] |= set(_held_out(example, group))
    kinds = {kind for found in seen.values() for kind, _ in found}
    assert kinds == {"word", "number", "scene", "row", "table", "sequence", "sum"}
    for split in SPLITS:
        assert kinds == {kind for kind, _ in seen[split]}
        for other in SPLITS:
            assert split == other or not seen[split] & seen[other]


def _held_out(example: Example, group: str) -> Iterator[tuple[str, str]]:
    row = []
    for picture in example.pictures:
        if isinstance(picture, Lettering):
            yield "number" if picture.text.isdigit() else "word", picture.text
        elif isinstance(picture, Scene):
            if group.startswith("recall"):
                row.append(picture.things[0].kind)
            else:
                yield "scene", " ".join(sorted(thing.kind for thing in picture.things))
    if row:
        yield "row", " ".join(row)
    for turn in example.turns:
        for key, code in re.findall(r"the code of ([A-Z]+) is (\d+)\.", turn.question):
            yield "word", key
            yield "number", code
        if group == "text":
            yield _text_task(turn.question)


def _text_task(question: str) -> tuple[str, str]:
    if "+" in question:
        return "sum", "+".join(sorted(re.findall(r"\d+", question)))
    if ":" in question:
        sequence = question.split(": ")[1]
        return "sequence", min(sequence, sequence[::-1])
    return "table", ", ".join(sorted(question.split(". ")[0].split(", ")))


def test_about_a_tenth_is_held_out_for_each_small_split():
    share = Counter(split_of(f"word:{i}") for i in range(5000))
    assert abs(share["train"] - 4000) < 150
    assert abs(share["test"] - 500) < 100
    assert abs(share["validation"] - 500) < 100


# ---------------------------------------------------------------------------------------------- answers


def test_answers_about_scenes_follow_from_the_scene(examples):
    checked: Counter[str] = Counter()
    for _, group, example, question, answer in turns(examples):
        if group in ("scene", "count", "relate", "absent"):
            scene = example.pictures[0]
            assert isinstance(scene, Scene)
            form, expected = _see(scene, question.lower())
            assert answer == expected, question
            checked[form] += 1
    assert min(checked[form] for form in ("count", "is", "which", "what", "there", "list")) > 100


def _see(scene: Scene, question: str) -> tuple[str, str]:
    """The answer worked out from the objects' places, with another code than the generator's."""
    named = re.findall(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question)
    if question.startswith(("how many", "count")):
        colour, noun = re.fullmatch(
            r"(?:how many|count the) (?:(\w+) )??(\w+)(?: are there\?| can you see\?|\.)", question
        ).groups()
        shape = SINGULAR.get(noun)
        found = [t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)]
        assert noun == "objects" or shape is not None
        return "count", str(len(found))
    if question.endswith(("from left to right.", "from left to right?", "from top to bottom.", "from top to bottom?")):
        axis = "x" if "left" in question else "y"
        return "list", ", ".join(thing.kind for thing in sorted(scene.things, key=lambda thing: _at(thing, axis)))
    if re.match(r"is there|can you", question):
        return "there", "yes" if _things(scene, named[0]) else "no"
    (first, *rest) = [_only(scene, name) for name in named]
    if question.startswith("which"):
        (second,) = rest
        ratio = first.size / second.size
        assert max(ratio, 1 / ratio) >= 1.4
        larger, smaller = (first, second) if ratio > 1 else (second, first)
        return "which", (smaller if "smaller" in question else larger).kind
    axis, sign = _direction(question)
    if question.startswith("what"):
        ahead = [t for t in scene.things if t != first and sign * (_at(t, axis) - _at(first, axis)) > 0]
        assert len(ahead) == 1
        return "what", ahead[0].kind
    (second,) = rest
    difference = sign * (_at(first, axis) - _at(second, axis))
    assert abs(difference) >= 10 if axis != "size" else abs(np.log(first.size / second.size)) >= np.log(1.4)
    return "is", "yes" if difference > 0 else "no"


def _direction(question: str) -> tuple[str, int]:
    for axis, sign, words in (
        ("x", -1, ("left of",)),
        ("x", 1, ("right of",)),
        ("y", -1, ("above", "higher")),
        ("y", 1, ("below", "lower")),
        ("size", 1, ("larger", "bigger")),
        ("size", -1, ("smaller",)),
    ):
        if any(word in question for word in words):
            return axis, sign
    raise AssertionError(question)


def _at(thing: Thing, axis: str) -> float:
    return {"x": thing.left + thing.size / 2, "y": thing.top + thing.size / 2, "size": thing.size}[axis]


def _things(scene: Scene, name: tuple[str, str]) -> list[Thing]:
    return [thing for thing in scene.things if (thing.colour, thing.shape) == name]


def _only(scene: Scene, name: tuple[str, str]) -> Thing:
    (thing,) = _things(scene, name)
    return thing


def test_what_is_read_is_what_is_written(examples):
    for _, group, example, question, answer in turns(examples):
        if group == "read":
            text = example.pictures[0].text
            if "first" in question:
                assert answer == text[0]
            elif "last" in question:
                assert answer == text[-1]
            else:
                assert answer == text


def test_text_tasks_are_right(examples):
    for _, group, _, question, answer in turns(examples):
        if group == "text":
            kind, _ = _text_task(question)
            if kind == "sum":
                assert int(answer) == sum(map(int, re.findall(r"\d+", question)))
            elif kind == "sequence":
                assert answer.split() == question.split(": ")[1].split()[::-1]
            else:
                table, asked = question.split(". ")
                assert answer == dict(entry.split() for entry in table.split(", "))[asked.rstrip("?").split()[-1]]


def test_recall_answers_stand_in_the_text_or_the_pictures(examples):
    for _, group, example, question, answer in turns(examples):
        if not group.startswith("recall"):
            continue
        text = example.turns[0].question
        asked = question.splitlines()[-1]
        facts = dict(re.findall(r"the code of ([A-Z]+) is (\d+)\.", text))
        if facts:
            assert len({key[:2] for key in facts}) == len(facts)
            assert answer == facts[re.search(r"[A-Z]{2,}", asked)[0]]
            continue
        assert re.findall(r"Image-(\d+): <image>", text) == [str(i + 1) for i in range(len(example.pictures))]
        picture = example.pictures[int(re.search(r"image (\d+)", asked)[1]) - 1]
        if isinstance(picture, Lettering):
            assert answer == picture.text
            assert picture.text.isdigit() == ("number" in asked)
        else:
            (thing,) = picture.things
            assert answer == (thing.colour if "colour" in asked else thing.shape)


# ---------------------------------------------------------------------------------------------- odds


@pytest.mark.parametrize("ability", ["relate", "absent"])
def test_yes_and_no_are_even(examples, ability):
    answers = Counter(e.turns[0].answer for split in ("validation", "test") for e in examples[split, ability])
    assert abs(answers["yes"] / (answers["yes"] + answers["no"]) - 0.5) < 0.06


def test_half_of_what_is_absent_nearly_is_there(examples):
    near = total = 0
    for _, group, example, question, answer in turns(examples):
        if group == "absent" and answer == "no":
            colour, shape = re.search(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question.lower()).groups()
            near += any(t.colour == colour or t.shape == shape for t in example.pictures[0].things)
            total += 1
    assert near / total > 0.6


def test_no_constant_answer_beats_the_stated_chance(examples):
    for (split, ability), some in examples.items():
        if split == "train":
            continue
        stated = sum(example.chance for example in some) / len(some)
        best = Counter(turn.answer for example in some for turn in example.turns).most_common(1)[0][1] / len(some)
        assert best <= stated + 3 * np.sqrt(0.25 / len(some)), (split, ability)


def test_counts_reach_from_one_to_six_and_are_rarely_zero(examples):
    answers = Counter(example.turns[0].answer for example in examples["test", "count"])
    assert set(answers) == set("0123456")
    assert answers["0"] < min(answers[digit] for digit in "123456")


def test_about_two_fifths_of_what_is_read_is_wide(examples):
    widths = Counter(e.pictures[0].width for split in SPLITS for e in examples[split, "read"])
    assert set(widths) == {64, 128, 192, 256}
    assert abs(1 - widths[64] / widths.total() - 0.4) < 0.06


def test_training_talks_longer_than_tests(examples):
    for (split, group), some in examples.items():
        lengths = {len(example.turns) for example in some}
        assert max(lengths) <= 16
        assert lengths == {1} if split != "train" else max(lengths) > 1, (split, group)


# ---------------------------------------------------------------------------------------------- pictures


def test_lettering_is_legible_and_whole(examples):
    for split in SPLITS:
        for example in examples[split, "read"]:
            picture = example.pictures[0]
            _, top, _, bottom = load_font(picture.font, picture.size).getbbox("H")
            assert bottom - top >= 11
            assert abs(luminance(picture.ink) - luminance(picture.paper)) >= CONTRAST
            pixels = np.asarray(picture.render(), dtype=int)
            assert pixels.shape == (TILE, picture.width, 3)
            inked = np.argwhere((pixels != picture.paper).any(axis=-1))
            assert inked.min() >= MARGIN - 1
            assert (inked.max(axis=0) <= (TILE - MARGIN, picture.width - MARGIN)).all()


def test_things_keep_apart_and_inside_and_show_their_colour(examples):
    for example in examples["train", "scene"]:
        scene = example.pictures[0]
        pixels = np.asarray(scene.render())
        boxes = np.zeros((TILE, TILE), dtype=int)
        for thing in scene.things:
            assert 0 <= thing.left and thing.left + thing.size <= TILE
            assert 0 <= thing.top and thing.top + thing.size <= TILE
            boxes[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size] += 1
            middle = thing.top + thing.size // 2, thing.left + thing.size // 2
            assert tuple(pixels[middle]) == thing.fill
        assert boxes.max() == 1
        assert tuple(pixels[boxes == 0][0]) == scene.paper
        assert (pixels[boxes == 0] == scene.paper).all()


def test_kinds_look_different():
    pictures = {kind: np.asarray(big_shape(Random("same place"), kind).render()) for kind in KINDS}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(KINDS)


# ---------------------------------------------------------------------------------------------- lengths, tokens


def test_recall_keeps_to_its_lengths_in_real_tokens(tokenizer):
    def count(text: str) -> int:
        return len(tokenizer.encode(text, allow_special=False))

    meter, ruler = Meter(count), Meter(count)
    for ability, span in SPANS.items():
        for split in ("train", "test"):
            flavours = set()
            for i in range(max(12, RECORDS[ability] // 2)):
                example = make(0, split, ability, i, meter)
                assert span.tokens[0] <= ruler.exact(example.turns) <= span.tokens[1]
                flavours.add(bool(example.pictures))
                if example.pictures:
                    assert span.pictures[0] <= len(example.pictures) <= span.pictures[1]
                else:
                    facts = re.findall(r"the code of [A-Z]+ is", example.turns[0].question)
                    assert span.facts[0] <= len(facts) <= span.facts[1]
            assert flavours == {True, False}


def test_estimate_comes_near_the_real_length(tokenizer):
    real = Meter(lambda text: len(tokenizer.encode(text, allow_special=False)))
    for ability, span in SPANS.items():
        lengths = [real.exact(make(0, "test", ability, i, Meter()).turns) for i in range(10)]
        assert span.tokens[0] * 0.9 <= min(lengths) and max(lengths) <= span.tokens[1] * 1.1


def test_words_to_read_are_spelled_letter_by_letter(tokenizer):
    for text in ("BAKO", "THE", "IS", " WHAT", "QUZX"):
        assert len(tokenizer.encode(text, allow_special=False)) == len(text)
    assert tokenizer.decode(tokenizer.encode("K T W")) == "K T W"


def test_answers_are_short(examples, tokenizer):
    for _, _, _, question, answer in turns(examples):
        if question.lower().startswith(("list", "what is there")):
            continue  # names every thing; for training only
        longest = 11 if ":" in question else 8  # six letters and the spaces between; a long word
        assert 1 <= len(tokenizer.encode(answer, allow_special=False)) <= longest, answer


def test_corpus_is_repeatable_and_holds_no_word_to_read():
    texts = list(corpus_texts(3, 300))
    assert texts == list(corpus_texts(3, 300)) != list(corpus_texts(4, 300))
    assert len(texts) == 300
    assert not any(re.search(r"\b[A-Z]+\b|<image>| [A-Z]", text) for text in texts)
    everything = "".join(corpus_texts(0, 3000))
    assert all(part in everything for part in ("rectangle", "assistant\n", "图片", "🙂", "how many", "garden"))


# ---------------------------------------------------------------------------------------------- purity


def test_a_record_is_a_function_of_seed_split_group_and_index(examples):
    meter = Meter()
    for (split, group), some in examples.items():
        again = make(0, split, group, 7, meter)  # out of order, with another memory
        assert again == some[7]
        assert make(1, split, group, 7, meter) != some[7]
        for picture, same in zip(again.pictures, some[7].pictures, strict=True):
            assert picture.render().tobytes() == same.render().tobytes()
