"""A kind of layer that the package has never heard of goes the whole way: recipe, seed, stages, files, chat, benchmark.

The mixer is linear attention with a fixed decay for each head (RetNet, arXiv 2307.08621). All of it is defined here. No
file of the package knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import small_run
from mmmamba import cli
from mmmamba.benchmark import bench
from mmmamba.checkpoints import load, read_config, save_student
from mmmamba.data.processor import Processor
from mmmamba.inference.conversation import Chat
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.session import load_session, save_session
from mmmamba.inspection import describe
from mmmamba.jsonfile import read_json
from mmmamba.model.mixers import LayerState, Mixer, Options, Part, kinds, register
from mmmamba.model.rope import Rotation
from mmmamba.model.stack import StackConfig
from mmmamba.ops import ssd

# ---------------------------------------------------------------------------------------------- the mixer


@dataclass(frozen=True, kw_only=True)
class RetentionOptions(Options):
    """The decays run from 1 - 2^-shortest, of the first head, to 1 - 2^-longest, of the last."""

    kind: Literal["retention"] = "retention"
    shortest: float = 3.0
    longest: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.longest < 20:
            raise ValueError(f"shortest ({self.shortest}) and longest ({self.longest}) must rise, within 0 and 20")


@dataclass(frozen=True)
class RetentionState(LayerState):
    """The decayed sum of v k^T of all tokens seen, (s, h, p, p)."""

    memory: Tensor


class Retention(Mixer[RetentionState]):
    """S_t = decay · S_{t-1} + v_t k_t^T, y_t = S_t q_t, normalised and times a gain."""

    name, options_class = "retention", RetentionOptions
    parts: ClassVar[Mapping[str, Part]] = {
        "gain": Part(float32=True, decays=False),
        **{name: Part(inherited=True, matrix=True) for name in ("q_proj", "k_proj", "v_proj")},
    }

    def __init__(self, hidden_size: int, stack: StackConfig, options: RetentionOptions) -> None:
        super().__init__(hidden_size, stack, options)
        h, g, p, bias = stack.num_heads, stack.num_kv_heads, stack.head_dim, stack.qkv_bias
        self.q_proj = nn.Linear(hidden_size, h * p, bias=bias)
        self.k_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.v_proj = nn.Linear(hidden_size, g * p, bias=bias)
        self.gain = nn.Parameter(torch.empty(h, p))
        self.o_proj = nn.Linear(h * p, hidden_size, bias=stack.o_bias)
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self, generator: torch.Generator | None = None) -> None:
        self.gain.fill_(1.0)

    def heads(
        self,
        x: Tensor,
        state: RetentionState | None = None,
        *,
        rotation: Rotation,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, RetentionState | None]:
        q, k, v = (one(x).unflatten(-1, (-1, self.head_dim)) for one in (self.q_proj, self.k_proj, self.v_proj))
        options = cast(RetentionOptions, self.options)
        wide = torch.promote_types(x.dtype, torch.float32)
        powers = torch.linspace(options.shortest, options.longest, self.heads_count, dtype=wide, device=x.device)
        # The state space recurrence with steps of 1 is this one.
        y, memory = ssd(
            v, torch.ones(*x.shape[:2], self.heads_count, dtype=wide, device=x.device), torch.log1p(-(2**-powers)),
            rotation(k), rotation(q), initial_state=None if state is None else state.memory, cu_seqlens=cu_seqlens,
            return_final_state=keep_state,
        )  # fmt: skip
        y = (F.rms_norm(y.to(wide), (self.head_dim,)) * self.gain).to(x.dtype)
        return y, RetentionState(memory) if memory is not None else None

    def empty_state(
        self, rows: int, *, dtype: torch.dtype, wide: torch.dtype, device: torch.device | str
    ) -> RetentionState:
        return RetentionState(
            torch.zeros(rows, self.heads_count, self.head_dim, self.head_dim, dtype=wide, device=device)
        )


# ---------------------------------------------------------------------------------------------- its way


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """The kind is registered for these tests alone."""
    register(Retention)
    yield
    cast(dict[str, Any], kinds()).pop("retention")


@pytest.fixture(scope="module")
def recipe(teacher_folder: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid's recipe. What each stage trains is left to its default."""
    plan = small_run.recipe(
        teacher=str(teacher_folder), data__sources=[{"path": str(small_data)}], layers="measured:3",
        mixer={"kind": "retention", "longest": 7.0},
    )  # fmt: skip
    for stage in ("stage1", "stage2", "stage3"):
        del plan[stage]["train"]
    return small_run.write_recipe(tmp_path_factory.mktemp("recipes") / "retention.yaml", plan)


def run(*words: str | Path) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def student(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student that ``mmmamba distill`` makes of it, interrupted by nobody."""
    out = tmp_path_factory.mktemp("runs") / "retention"
    run("distill", recipe, "--out", out, "--device", "cpu")
    return out / "model"


def test_it_is_distilled_and_placed(student: Path, teacher_folder: Path) -> None:
    manifest = read_json(student.parent / "manifest.json")
    assert set(manifest["stages"]) == {"stage1", "stage2", "stage3"} and len(manifest["softmax_layers"]) == 2
    config = read_config(student)
    assert config.attention_layers == tuple(manifest["softmax_layers"])
    assert {config.layer_map[layer] for layer in config.new_layers} == {"retention"}
    assert config.options("retention") == RetentionOptions(longest=7.0)
    teacher, made, layer = load(teacher_folder), load(student), config.new_layers[0]
    assert not torch.equal(made.mixer(layer).q_proj.weight, teacher.mixer(layer).q_proj.weight)  # stage 2 moved it
    assert torch.equal(made.mixer(layer).o_proj.weight, teacher.mixer(layer).o_proj.weight)  # and W_o nobody
    assert not torch.equal(made.mixer(layer).gain, torch.ones(4, 16))  # stage 1 moved it
    run("distill", student.parent / "recipe.yaml", "--out", student.parent, "--device", "cpu", "--resume")


def test_it_is_saved_and_loaded_bit_for_bit(student: Path, teacher_folder: Path, tmp_path: Path) -> None:
    model, ids = load(student), torch.arange(10, 40)[None]
    for delta in (False, True):
        folder = tmp_path / f"delta-{delta}"
        save_student(model, folder, teacher=str(teacher_folder), delta=delta)
        assert torch.equal(load(folder)(ids).logits, model(ids).logits)
    theirs = AutoModelForImageTextToText.from_pretrained(student)
    assert torch.equal(theirs(input_ids=ids).logits, model(ids).logits)
    written = theirs.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= ids.shape[1] + 4


def test_prefill_in_chunks_and_steps_of_the_pool_are_one_pass(student: Path) -> None:
    model = load(student).double()
    ids = torch.randint(10, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits[0]
    first = model(ids[:, :50], return_state=True)
    second = model(ids[:, 50:70], state=first.state, return_state=True)
    torch.testing.assert_close(torch.cat([first.logits[0], second.logits[0]]), whole[:70], rtol=0, atol=1e-9)
    row, borders = torch.cat([ids[:, :30], ids], 1), torch.tensor([0, 30, 120], dtype=torch.int32)
    torch.testing.assert_close(model(row, cu_seqlens=borders).logits[0, 30:], whole, rtol=0, atol=1e-9)
    decoder, slot = Decoder(model, 3, 90, max_length=90), torch.tensor([1])
    decoder.admit(slot, second.state)
    steps = [decoder.step(ids[0, i : i + 1], slot)[0].clone() for i in range(70, 90)]
    torch.testing.assert_close(torch.stack(steps), whole[70:], rtol=0, atol=1e-9)


def test_a_conversation_goes_on_from_its_file(student: Path, tmp_path: Path) -> None:
    model, processor = load(student), Processor.from_folder(student)
    first = Chat(model, processor, max_new_tokens=3)
    "".join(first.ask("how many red circles are there ?"))
    save_session(tmp_path / "said.session", first)
    resumed = load_session(tmp_path / "said.session", model, processor, max_new_tokens=3)
    assert "".join(resumed.ask("what colour ?")) == "".join(first.ask("what colour ?"))


def test_it_is_inspected(student: Path) -> None:
    found = describe(student)
    model = load(student)
    assert found["parameters"]["retention"] == sum(
        parameter.numel() for layer in model.config.new_layers for parameter in model.mixer(layer).parameters()
    )
    assert found["state"]["model"]["recurrent"] == 3 * 4 * 16 * 16 * 4
    assert found["mixer"] == {"longest": {"here": 7.0, "published": 6.0}}
    run("inspect", student)


def test_a_dry_run_says_what_it_needs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("distill", recipe, "--dry-run", "--out", tmp_path / "run", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "mixer gain" in printed and "did not fit" not in printed
    taken = printed.partition("First steps on this CPU")[2].splitlines()
    differences = [line.split("%")[0].split()[-1] for line in taken if line.strip().startswith("stage") and "%" in line]
    assert len(differences) == 3 and all(abs(int(difference)) <= 40 for difference in differences), differences


def test_it_is_measured(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SAMPLE_SECONDS, "cpu", 0.0)
    monkeypatch.setattr("mmmamba.benchmark.memory.release", lambda device: None)  # collecting garbage does too
    monkeypatch.setattr(bench, "write_report", lambda results, folder: folder)  # drawing takes time
    run("bench", student, "--contexts", "8", "--measure", "decode", "--measure", "prefill", "--report", tmp_path / "r",
        "--device", "cpu")  # fmt: skip
    found = read_json(tmp_path / "r" / "results.json")
    assert found["complete"] and "hybrid" in {series["kind"] for series in found["series"]}


def test_a_mistake_in_its_options_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in {
        "mixer.longest=1": "'mixer': shortest (3.0) and longest (1.0) must rise",
        "mixer.longer=1": "unknown key 'mixer.longer' (did you mean 'longest'?)",
        "mixer.kind=retensjon": "'mixer': there is no kind of layer 'retensjon' (known: attention, mamba2, retention)",
        "stage1.train=[conv]": "stage1.train: a retention mixer with these options has no 'conv', it has gain, q_proj",
    }.items():
        assert cli.main(["distill", str(recipe), "--dry-run", "--device", "cpu", "--set", change]) == 2
        assert message in capsys.readouterr().err
