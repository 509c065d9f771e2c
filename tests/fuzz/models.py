"""Model folders: config.json, weights, GGUF files, tokenizers and templates."""

from __future__ import annotations

import json
import random
import runpy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from fuzz import mutate
from fuzz.files import write
from mmmamba.checkpoints import load, save_hovle, save_student
from mmmamba.checkpoints.model_source import read_config
from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.model import MAMBA2, Model, initialise
from tiny import SPECIALS, WORDS, make_config


def folder_of(folder: Path, layers: tuple[str, ...] = (), *, hovle: bool = False) -> Path:
    """The smallest model: one layer a stack."""
    config = make_config()
    stack = replace(config.embedding, num_layers=1, intermediate_size=16, num_heads=2, num_kv_heads=1, head_dim=8)
    config = replace(config, hidden_size=16, embedding=stack, decoder=stack, layer_map=layers, max_dynamic_patch=2)
    processor = Processor(train_bpe(WORDS * 4, 320, SPECIALS), config)
    model = initialise(Model(config), 0)
    if hovle:
        save_hovle(model, processor, folder, dtype=torch.float32)
    else:
        save_student(model, folder, teacher="pico-teacher", delta=False, processor=processor)
    return folder


def linked(source: Path, here: Path) -> Path:
    """A copy of a folder, its files shared."""
    here.mkdir()
    for file in source.iterdir():
        (here / file.name).hardlink_to(file)
    return here


def replaced(path: Path, content: bytes) -> Path:
    path.unlink()
    return write(path, content)


def folders(folder: Path) -> list[Path]:
    return [
        folder_of(folder / "hovle", hovle=True),
        folder_of(folder / "linear", (MAMBA2, MAMBA2)),
        folder_of(folder / "hybrid", ("attention", MAMBA2)),
    ]


# ---------------------------------------------------------------------------------------------- configs


def config_seeds(folder: Path) -> list[Path]:
    return folders(folder)


def configs(rng: random.Random, seeds: list[Path], here: Path) -> None:
    folder = linked(rng.choice(seeds), here / "m")
    name = rng.choice(["config.json"] * 3 + sorted(path.name for path in folder.glob("*.json")))
    changed = mutate.tree(rng, json.loads((folder / name).read_text()))
    replaced(folder / name, mutate.json_text(rng, changed, changed=rng.random() < 0.3))
    config = read_config(folder)
    model = load(folder)
    assert model.config == config
    assert all(torch.isfinite(p).all() for p in model.parameters())
    prompt = Processor.from_folder(folder).prompt([Turn("human", "red ?")])
    with torch.no_grad():
        assert torch.isfinite(model(torch.from_numpy(prompt.input_ids).long()[None]).logits).all()


# ---------------------------------------------------------------------------------------------- weights


def checkpoint_seeds(folder: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    found = folders(folder)
    # As PyTorch stores it, and in several files with an index.
    tensors = _tensors(found[0] / "model.safetensors")
    binary = linked(found[0], folder / "bin")
    (binary / "model.safetensors").unlink()
    torch.save(tensors, binary / "pytorch_model.bin")
    return [(path, load(path).state_dict()) for path in [*found, binary]]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def checkpoints(rng: random.Random, seeds: list[tuple[Path, dict[str, torch.Tensor]]], here: Path) -> None:
    source, whole = rng.choice(seeds)
    folder = linked(source, here / "m")
    (path,) = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    raw = path.read_bytes()
    replaced(path, mutate.bytes_(rng, raw) if path.suffix == ".bin" else mutate.safetensors(rng, raw))
    model = load(folder)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    if path.suffix == ".safetensors":  # what was taken is what the library reads: nothing missing, made up or left out
        before, after = _tensors(source / path.name), _tensors(path)
        assert set(before) == set(after)
        if all(torch.equal(before[name], after[name]) for name in before):
            assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- GGUF


def gguf_seeds(folder: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    tests = runpy.run_path(str(Path(__file__).parents[1] / "checkpoints" / "test_gguf.py"))
    path = tests["write_gguf"](folder / "tiny.gguf", tied=False)
    return path.read_bytes(), load(path).state_dict()


def ggufs(rng: random.Random, seeds: tuple[bytes, dict[str, torch.Tensor]], here: Path) -> None:
    raw, whole = seeds
    head = raw[:6000] if rng.random() < 0.7 else raw  # names, types and shapes stand first
    path = write(here / "a.gguf", mutate.bytes_(rng, head) + raw[len(head) :])
    model = load(path)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    if path.read_bytes() == raw:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    Processor.from_folder(path)


# ---------------------------------------------------------------------------------------------- tokenizers


def tokenizer_seeds(folder: Path) -> tuple[Path, list[str]]:
    made = folder_of(folder / "m", (MAMBA2, MAMBA2))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ x or '' }}"
    (made / "chat_template.jinja").write_text(template)
    return made, ["what colour is it ?", "Ünï 中 🙂 \u2028", "<|im_end|><img>", " a  b\n\n\tc ", ""]


def tokenizers(rng: random.Random, seeds: tuple[Path, list[str]], here: Path) -> None:
    source, texts = seeds
    folder = linked(source, here / "m")
    name = rng.choice(["tokenizer.json"] * 3 + ["tokenizer_config.json", "chat_template.jinja"])
    path = folder / name
    if not path.exists():
        path = folder / "tokenizer.json"
    if path.suffix == ".jinja":
        pieces = ["{% for i in range(10**9) %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ x.y.z }}", "{% if %}",
                  "{{ 1/0 }}",
                  "{% set a = [] %}", "{{ messages[9] }}", "{{ ''.__class__ }}", "{% include '/etc/passwd' %}",
                  "{{ raise_exception('x') }}", "{% raw %}", "\0", "{{ m }}", "{{ messages | tojson }}"]  # fmt: skip
        text = path.read_text()
        spot = rng.randint(0, len(text))
        text = text[:spot] + rng.choice([*pieces, *mutate.STRINGS]) + text[spot:]
        replaced(path, text.encode("utf-8", "surrogatepass"))
    else:
        data = json.loads(path.read_text())
        if path.name == "tokenizer.json" and rng.random() < 0.7:  # not always the vocabulary
            key = rng.choice("added_tokens normalizer pre_tokenizer post_processor decoder model version".split())
            data[key] = mutate.tree(rng, data.get(key))
        else:
            data = mutate.tree(rng, data)
        replaced(path, mutate.json_text(rng, data, changed=rng.random() < 0.2))
    tokenizer = Tokenizer.from_folder(folder)
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(isinstance(i, int) and 0 <= i for i in ids)
        tokenizer.decode(ids)
    processor = Processor.from_folder(folder)
    encoded = processor.prompt([Turn("human", rng.choice(texts) or "x")])
    assert (encoded.input_ids >= 0).all() and len(encoded.input_ids)
