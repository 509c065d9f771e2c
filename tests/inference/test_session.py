"""A conversation that is saved, loaded and gone on with is the conversation that went on, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mmmamba.checkpoints import tensor_hashes
from mmmamba.checkpoints.io import read_with_metadata
from mmmamba.checkpoints.tensor_hashes import digest
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError
from mmmamba.inference import session as module
from mmmamba.inference.conversation import Chat
from mmmamba.inference.model_fingerprint import fingerprint
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.session import HEADER, load_session, read_session, save_session
from mmmamba.model import MAMBA2, Mamba2Options
from small_run import ENVIRONMENT

RED = Image.new("RGB", (56, 56), "red")
SAMPLING = Sampling(temperature=2.0, seed=11, repetition_penalty=1.3)
LINEAR = (MAMBA2,) * 5


def bits(chat: Chat) -> dict[str, bytes]:
    past = chat.past
    assert past is not None
    return {name: tensor.numpy().tobytes() for name, tensor in module._tensors(past.state).items()}


def say(chat: Chat, text: str, *images, tokens: int | None = None) -> str:
    """The answer, or as much of it as has that many tokens."""
    pieces, said = chat.ask(text, images), []
    while tokens is None or len(chat.answer.token_ids) < tokens:
        piece = next(pieces, None)
        if piece is None:
            break
        said.append(piece)
    return "".join(said)


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_saved_and_loaded_equals_gone_on(tiny_model, layer_map, tiny_processor, sampling, tmp_path):
    """Two answers to their end, one left half-way; float32, where every change of a sum's order would show."""
    network = tiny_model(layer_map, Mamba2Options(rope=True))
    whole = Chat(network, tiny_processor, sampling, max_new_tokens=6)
    parts = Chat(network, tiny_processor, sampling, max_new_tokens=6)
    questions = [
        ("what is this?", (RED,), None),
        ("sure?", (), 3),
        ("<image>\nand this?", (RED,), None),
        ("so?", (), None),
    ]
    for i, (text, images, tokens) in enumerate(questions):
        expected = say(whole, text, *images, tokens=tokens)
        assert say(parts, text, *images, tokens=tokens) == expected
        assert bits(parts) == bits(whole) and parts.past.unfed == whole.past.unfed
        path = save_session(tmp_path / f"{i}.state", parts)
        parts = load_session(path, network, tiny_processor, sampling, max_new_tokens=6)
        assert bits(parts) == bits(whole)
        assert (parts.past.turns, parts.past.unfed, parts.turns) == (whole.past.turns, whole.past.unfed, i + 1)
        assert save_session(tmp_path / "again.state", parts).read_bytes() == path.read_bytes()


def test_a_branch_and_a_copy_go_their_own_ways(tiny_model, layer_map, tiny_processor, tmp_path):
    network = tiny_model(layer_map)
    stem = Chat(network, tiny_processor, SAMPLING, max_new_tokens=5)
    say(stem, "a long text. what?", RED)
    path = save_session(tmp_path / "stem.state", stem)
    shutil.copy(path, tmp_path / "copy.state")
    before = bits(stem)
    one, other = stem.branch(), stem.branch()
    copy = load_session(tmp_path / "copy.state", network, tiny_processor, SAMPLING, max_new_tokens=5)
    answers = [say(one, "first?"), say(other, "second?"), say(copy, "second?")]
    assert bits(stem) == before and stem.turns == 1 and one.turns == 2
    assert answers[1] == answers[2] and bits(other) == bits(copy)
    assert say(stem, "first?") == answers[0] and bits(stem) == bits(one)
    other.reset()
    assert other.past is None and stem.turns == 2
    half = stem.branch()
    say(half, "third?", tokens=2)
    assert say(half.branch(), "why?") == say(half, "why?")


def test_the_file_of_a_linear_student_does_not_grow(tiny_model, tiny_processor, tmp_path):
    """Its data is, for every layer, the SSM state (h·p·n) in float32, the last k-1 inputs of the convolution, and a
    position: for HoVLE-2.6B (32 layers, 16 heads and 8 groups of 128, k = 2) 34 MB in bfloat16.
    """
    network = tiny_model(LINEAR)
    chat = Chat(network, tiny_processor, max_new_tokens=3)

    def data(layers: int, heads: int, groups: int, p: int, kernel: int, size: int) -> int:
        return layers * (heads * p * p * 4 + (kernel - 1) * (2 * groups + heads) * p * size) + 8

    found = set()
    for text in ("a", "b " * 50, "c " * 500):
        say(chat, text)
        file = save_session(tmp_path / "s.state", chat).read_bytes()
        found.add(len(file) - 8 - int.from_bytes(file[:8], "little"))
    assert found == {data(5, 4, 2, 16, 2, 4)}
    assert 33.5e6 < data(32, 16, 8, 128, 2, 2) < 34.5e6
    cached = Chat(tiny_model(), tiny_processor, max_new_tokens=3)
    sizes = [len(save_session(tmp_path / "c.state", cached).read_bytes()) for text in "ab" if say(cached, text) or True]
    assert sizes[1] > sizes[0] + 1000, "a cache does"


def test_a_template_that_reads_anew_gets_its_pictures_back(tiny_model, rewriting, tmp_path):
    processor = rewriting()
    assert not processor.appends
    picture = tmp_path / "red.png"
    RED.save(picture)
    network = tiny_model(LINEAR)
    whole, parts = (Chat(network, processor, SAMPLING, max_new_tokens=4) for _ in range(2))
    for text, images in (("what?", [picture]), ("and?", []), ("so?", [picture])):
        assert say(whole, text, *images) == say(parts, text, *images)
        parts = load_session(save_session(tmp_path / "s", parts), network, processor, SAMPLING, max_new_tokens=4)
        assert bits(parts) == bits(whole)
    (first, second) = read_session(tmp_path / "s").header.pictures
    assert first == second and first.path == str(picture) and (first.width, first.height) == RED.size
    Image.new("RGB", (56, 56), "blue").save(picture)
    with pytest.raises(UserError, match=r"picture .*red\.png has changed"):
        load_session(tmp_path / "s", network, processor)
    picture.unlink()
    with pytest.raises(UserError, match=r"picture .*red\.png is no longer there"):
        load_session(tmp_path / "s", network, processor)
    with pytest.raises(UserError, match=r"picture .*red\.png is no longer there"):
        save_session(tmp_path / "s", whole)
    RED.save(picture)
    say(whole, "this?", RED)
    with pytest.raises(UserError, match=r"not saved: .* picture 3 lies in no file"):
        save_session(tmp_path / "s", whole)


@pytest.fixture
def saved(tiny_model, tiny_processor, tmp_path):
    """(the model, the file of a conversation with it)."""
    network = tiny_model(LINEAR)
    chat = Chat(network, tiny_processor, max_new_tokens=3)
    say(chat, "what?")
    return network, save_session(tmp_path / "talk.state", chat)


def test_the_transcript_can_be_read_by_anything(saved):
    with safe_open(saved[1], framework="pt") as stored:
        header = json.loads(stored.metadata()[HEADER])
    assert header["version"] == 1 and header["transcript"][0] == {"role": "human", "text": "what?"}
    assert [turn["role"] for turn in header["transcript"]] == ["human", "gpt"]


def refused(path: Path, network, processor: Processor) -> str:
    with pytest.raises(UserError) as error:
        load_session(path, network, processor)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)


def test_another_model_is_refused(saved, tiny_model, tiny_processor):
    network, path = saved
    load_session(path, tiny_model(LINEAR), tiny_processor)
    assert "another model" in refused(path, tiny_model(LINEAR, seed=1), tiny_processor)
    assert "another model" in refused(path, tiny_model(LINEAR, Mamba2Options(rope=True)), tiny_processor)
    assert "another model" in refused(path, tiny_model(), tiny_processor)
    assert "was made in float32, but the model runs in float64" in refused(path, network.double(), tiny_processor)


def test_another_processor_is_another_model(saved, tiny_processor, tiny_config):
    definition = json.loads(tiny_processor.tokenizer.definition)
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    for changed in (
        Processor(Tokenizer(json.dumps(definition)), tiny_config()),
        Processor(tiny_processor.tokenizer, tiny_config(system_message="be brief")),
    ):
        assert "another model" in refused(saved[1], saved[0], changed)


def test_a_fingerprint_is_of_all_parameters_and_not_of_defaults(tiny_model, tiny_processor):
    network = tiny_model(LINEAR)
    found = fingerprint(network, tiny_processor)
    assert found == fingerprint(tiny_model(LINEAR), tiny_processor)
    for parameter in (network.norm.weight, network.layers[4].mixer.A_log, network.vision.position_embedding):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
            assert fingerprint(network, tiny_processor) != found
            parameter.view(-1)[-1] -= 1
    network.config = replace(network.config, mixer=Mamba2Options(qk_norm=True))
    assert fingerprint(network, tiny_processor) != found


def test_parameters_are_hashed_again_only_when_they_were_changed_or_moved(tiny_model, tiny_processor, monkeypatch):
    hashed = []
    line = tensor_hashes._line
    monkeypatch.setattr(tensor_hashes, "_line", lambda name, tensor: hashed.append(name) or line(name, tensor))
    network = tiny_model(LINEAR)
    found, count = fingerprint(network, tiny_processor), len(hashed)
    assert fingerprint(network, tiny_processor) == found and len(hashed) == count
    with torch.no_grad():
        network.layers[2].mlp.up.weight[0, 0] += 1
    changed = fingerprint(network, tiny_processor)
    assert changed != found and len(hashed) == 2 * count
    network.head.weight.data = network.head.weight.data * 2
    assert fingerprint(network, tiny_processor) not in (found, changed)
    assert fingerprint(network.double(), tiny_processor) != fingerprint(tiny_model(LINEAR), tiny_processor) == found


def rewritten(path: Path, change, checksum: bool = True) -> Path:
    """The file with its header changed, its checksum set right or left."""
    tensors, metadata = read_with_metadata(path)
    content = json.loads(metadata[HEADER])
    change(content, tensors)
    if checksum:
        del content["sha256"]
        content["sha256"] = digest([json.dumps(content, ensure_ascii=False)], tensors)
    save_file(tensors, path, {HEADER: json.dumps(content)})
    return path


def test_a_broken_file_is_refused(saved, tiny_processor, tmp_path):
    network, path = saved
    whole = path.read_bytes()

    def reason(data: bytes) -> str:
        path.write_bytes(data)
        return refused(path, network, tiny_processor)

    assert "truncated or not a safetensors file" in reason(whole[:-1])
    assert "truncated or not a safetensors file" in reason(whole[:100])
    assert "truncated or not a safetensors file" in reason(b"")
    assert "truncated or not a safetensors file" in reason(b"no session\n" * 9)
    random = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*random.integers(0, header, 150), *random.integers(header, len(whole), 50)]:
        altered = bytearray(whole)
        altered[place] ^= 1 << int(random.integers(8))
        assert reason(bytes(altered))
    altered = bytearray(whole)
    altered[-1] ^= 1
    assert "was altered or damaged: its checksum does not match" in reason(bytes(altered))
    path.unlink()
    assert "no such file" in refused(path, network, tiny_processor)
    assert "is a folder" in refused(tmp_path, network, tiny_processor)


def test_a_file_that_says_something_else_is_refused(saved, tiny_processor, tmp_path):
    network, path = saved
    whole = path.read_bytes()

    def reason(change, checksum: bool = True) -> str:
        path.write_bytes(whole)
        return refused(rewritten(path, change, checksum), network, tiny_processor)

    assert "checksum" in reason(lambda header, _: header["transcript"][0].update(text="why?"), checksum=False)
    newer = "is of format version 2, newer than this mmmamba reads (1)"
    assert newer in reason(lambda header, _: header.update(version=2, more="later"))
    assert newer in reason(lambda header, _: header.update(version=2), checksum=False)
    assert "no 'version'" in reason(lambda header, _: header.pop("version"))
    assert "'unfed'" in reason(lambda header, _: header.update(unfed="x"))
    assert "'answers'" in reason(lambda header, _: header.pop("answers"))
    assert "tensor 'layers.0.ssm' is missing" in reason(lambda _, tensors: tensors.pop("layers.0.ssm"))
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    assert "is not a session file" in refused(path, network, tiny_processor)


def test_nothing_said_is_not_saved(tiny_model, tiny_processor, tmp_path, monkeypatch):
    chat = Chat(tiny_model(LINEAR), tiny_processor, max_new_tokens=2)
    with pytest.raises(UserError, match="nothing has been said"):
        save_session(tmp_path / "s", chat)
    say(chat, "what?")
    monkeypatch.setattr(module, "MAX_HEADER", 100)
    with pytest.raises(UserError, match="the transcript takes"):
        save_session(tmp_path / "s", chat)
    assert not (tmp_path / "s").exists()


KILLED = """
import sys
from mmmamba.checkpoints import load
from mmmamba.data.processor import Processor
from mmmamba.inference.session import load_session, save_session
chat = load_session(sys.argv[2], load(sys.argv[1]), Processor.from_folder(sys.argv[1]), max_new_tokens=1)
print("begun", flush=True)
while True:
    list(chat.ask("go on"))
    save_session(sys.argv[2], chat)
"""


def test_killed_at_any_moment_the_file_is_whole(teacher_folder, tmp_path):
    from mmmamba.checkpoints import load

    network, processor = load(teacher_folder), Processor.from_folder(teacher_folder)
    chat = Chat(network, processor, max_new_tokens=1)
    say(chat, "what?")
    path = save_session(tmp_path / "talk.state", chat)
    command = [sys.executable, "-c", KILLED, str(teacher_folder), str(path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed = load_session(path, network, processor, max_new_tokens=1)
    assert resumed.turns > 1 and len(resumed.past.turns) == 2 * resumed.turns
    assert resumed.past.turns[0] == Turn("human", "what?")
    say(resumed, "sure?")
    assert save_session(path, resumed) and len(list(tmp_path.iterdir())) == 1, "no half-written file is left"


HYBRID_STATES = ("attention", "mamba2", "mamba2", "attention", "mamba2")
STRANGE = {
    "shape": ("layers.1.ssm", lambda t: t[..., :-1].clone(), r"'layers.1.ssm' is \(1, 4, 16, 15\), expected"),
    "rows": ("layers.0.k", lambda t: torch.cat([t, t]), r"'layers.0.k' is \(2, "),
    "kind": ("layers.1.conv", lambda t: t.to(torch.int32), r"'layers.1.conv' is int32"),
    "narrow": ("layers.3.v", lambda t: t.half(), r"'layers.3.v' is float16"),
    "NaN": ("layers.1.ssm", lambda t: t * torch.nan, r"'layers.1.ssm' has values that are not finite"),
    "infinity": ("layers.0.v", lambda t: t / 0, r"'layers.0.v' has values that are not finite"),
    "flags": ("layers.0.filled", lambda t: t.byte(), r"'layers.0.filled' is uint8"),
    "no tokens": ("layers.0.filled", lambda t: t & False, r"'layers.0.filled' counts 0 tokens, but the sequence has"),
    "scalar": ("layers.0.filled", lambda t: t[0, 0].clone(), r"'layers.0.k' is .*, expected \(1, 0,"),
    "negative": ("positions", lambda t: -t, "'positions' is no number of positions"),
    "endless": ("positions", lambda t: t + 2**62, "'positions' is no number of positions"),
    "two": ("positions", lambda t: torch.cat([t, t]), "'positions' is no number of positions"),
}
TOLD = {
    "unfed": ([320], "'unfed' holds the id 320, but the model has 320 tokens"),
    "answers": (-1, r"'answers' \(-1\)"),
    " answers": (2**64, r"'answers' \(18446744073709551616\)"),
    "max_length": (-5, r"'max_length' \(-5\)"),
    "max_embedded": (-1, r"'max_embedded' \(-1\)"),
}


def test_a_state_that_no_model_left_is_refused(tiny_model, tiny_processor, tmp_path):
    """Also where whoever changed it has put the checksum right."""
    model = tiny_model(HYBRID_STATES)
    chat = Chat(model, tiny_processor, max_new_tokens=4)
    say(chat, "how many?")
    path = save_session(tmp_path / "talk", chat)
    whole = path.read_bytes()

    def reason(change) -> str:
        path.write_bytes(whole)
        with pytest.raises(UserError) as refusal:
            load_session(rewritten(path, change), model, tiny_processor)
        return str(refusal.value)

    for name, alter, complaint in STRANGE.values():
        said = reason(lambda told, tensors: tensors.update({name: alter(tensors[name])}))  # noqa: B023
        assert re.search(complaint, said) and "talk: is not a session of this model" in said, said
    for key, (value, complaint) in TOLD.items():
        assert re.search(complaint, reason(lambda told, tensors: told.update({key.strip(): value})))  # noqa: B023
    path.write_bytes(whole)
    load_session(rewritten(path, lambda told, tensors: None), model, tiny_processor)
