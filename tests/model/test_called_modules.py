"""A module that is wrapped, hooked, parametrised, quantised or offloaded is called, in passes and in decoding steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmmamba.distill.losses import answer_loss, divergence
from mmmamba.errors import UserError
from mmmamba.inference.decoder import Decoder, decodable
from mmmamba.model import ATTENTION, MAMBA2, Mamba2Options, Model
from mmmamba.model.plain import plain

HYBRID = (ATTENTION, MAMBA2, MAMBA2, ATTENTION, MAMBA2)
MIXER = Mamba2Options(rope=True, qk_norm=True, gate_bias=True, rule="gated_delta")
IDS = torch.tensor([[9, 40, 7, 7, 7, 7, 200, 31, 77], [88, 10, 7, 7, 7, 7, 12, 13, 300]])  # 7: a picture's token
PROMPT, END = 6, IDS.shape[1]
LINEAR = [
    "layers.0.mixer.q_proj", "layers.0.mixer.o_proj", "layers.0.mlp.up", "layers.1.mixer.q_proj",
    "layers.1.mixer.v_proj",
    "layers.1.mixer.dt_proj", "layers.1.mixer.beta_proj", "layers.1.mixer.gate_proj", "layers.1.mixer.o_proj",
    "layers.1.mlp.gate", "layers.1.mlp.down", "head",
]  # fmt: skip


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(HYBRID, MIXER).double()


@pytest.fixture
def tiles() -> Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3)).double()


@torch.no_grad()
def read(model: Model, tiles: Tensor | None = None) -> Tensor:
    return model(IDS, tiles).logits


@torch.no_grad()
def decoded(model: Model, tiles: Tensor | None = None) -> Tensor:
    """Logits behind the prompt and behind each token after it, the latter by the pool's steps."""
    out = model(IDS[:, :PROMPT], tiles, logits="last", return_state=True, max_length=20)
    decoder, slots = Decoder(model, 3, 20, max_length=20), torch.tensor([2, 0])
    decoder.admit(slots, out.state)
    idle = torch.tensor([2, -1, 0])
    steps = [decoder.step(torch.tensor([a, 5, b]), idle)[[0, 2]] for a, b in IDS[:, PROMPT:].T.tolist()]
    return torch.stack([out.logits, *steps], 1)


def check(model: Model, expected: Model, tiles: Tensor | None = None, *, tolerance: float = 1e-9) -> None:
    """Both say the same, in a pass and in steps, and it is not for want of calling that the model does."""
    truth = read(expected, tiles)
    torch.testing.assert_close(read(model, tiles), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(decoded(model, tiles), truth[:, PROMPT - 1 :], rtol=tolerance, atol=tolerance)
    assert not decodable(model)


def with_doubled(model: Model, name: str) -> Model:
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.get_submodule(name).parameters():
            parameter *= 2
    return found


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Wrapper(nn.Module):
    """As adapters do it: the weight can be read, but it is not all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


class TwiceLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(lambda _, __, output: 2 * output)


def prehooked(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def parametrised(parent: nn.Module, name: str) -> None:
    for kind in [kind for kind, _ in getattr(parent, name).named_parameters()]:
        parametrize.register_parametrization(getattr(parent, name), kind, Twice())


def wrapped(parent: nn.Module, name: str) -> None:
    setattr(parent, name, Wrapper(getattr(parent, name)))


def subclassed(parent: nn.Module, name: str) -> None:
    getattr(parent, name).__class__ = TwiceLinear


def overridden(parent: nn.Module, name: str) -> None:
    module = getattr(parent, name)
    whole = module.forward
    module.forward = lambda x: 2 * whole(x)


@pytest.mark.parametrize("change", [hooked, prehooked, parametrised, wrapped, subclassed, overridden])
@pytest.mark.parametrize("name", LINEAR)
def test_what_a_call_of_a_projection_does_is_done(model: Model, name: str, change: Callable[..., None]) -> None:
    expected = with_doubled(model, name)
    parent, _, own = name.rpartition(".")
    change(model.get_submodule(parent), own)
    bias = expected.get_submodule(name).bias
    if change is prehooked and bias is not None:
        bias.data /= 2  # the input was doubled, the bias was not
    check(model, expected)


def test_a_compiled_module_is_called(model: Model) -> None:
    expected = copy.deepcopy(model)
    model.layers[1].mixer.q_proj.compile(backend="eager")
    check(model, expected)
    model.layers[3] = torch.compile(model.layers[3], backend=lambda graph, _: graph)
    check(model, expected)


@pytest.mark.parametrize(
    "name", ["layers.1.mixer.conv", "layers.1.mixer.norm", "layers.0.input_norm", "layers.2.mlp_norm"]
)
def test_parameters_of_small_modules_may_be_parametrised(model: Model, name: str) -> None:
    expected = with_doubled(model, name)
    parent, _, own = name.rpartition(".")
    parametrised(model.get_submodule(parent), own)
    check(model, expected)


def test_hooks_of_every_module_are_fired_once_a_pass(model: Model, tiles: Tensor) -> None:
    fired: dict[str, int] = {}
    truth = read(model, tiles)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: fired.update({name: fired.get(name, 0) + 1}))
    torch.testing.assert_close(read(model, tiles), truth)
    names = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert names - set(fired) == set() and set(fired.values()) == {1}
    fired.clear()
    torch.testing.assert_close(decoded(model, tiles), truth[:, PROMPT - 1 :])
    steps = END - PROMPT
    assert all(count == 1 + steps for name, count in fired.items() if not name.startswith("vision"))


def test_a_hook_on_all_modules_of_the_process_is_fired(model: Model) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        decoded(model)
    finally:
        handle.remove()
    assert model.layers[1].mixer.q_proj in seen and model.layers[0].mlp.down in seen
    assert decodable(model)


def test_backward_hooks_see_gradients(model: Model) -> None:
    norms: dict[str, float] = {}
    for name in LINEAR:
        module = model.get_submodule(name)
        module.register_full_backward_hook(lambda _, __, given, name=name: norms.update({name: float(given[0].norm())}))
    model(IDS).logits.square().mean().backward()
    assert set(norms) == set(LINEAR) and all(norms.values())


def test_weight_norm_and_pruning_hold(model: Model) -> None:
    expected = copy.deepcopy(model)
    for name in ("layers.1.mixer.k_proj", "layers.0.mixer.v_proj", "layers.2.mlp.up"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model.get_submodule(name))
    parametrizations.weight_norm(model.get_submodule("layers.4.mixer.gate_proj"))
    check(model, expected)
    prune.l1_unstructured(model.get_submodule("layers.1.mixer.q_proj"), "weight", amount=0.5)
    mask = model.get_submodule("layers.1.mixer.q_proj").weight_mask
    expected.get_submodule("layers.1.mixer.q_proj").weight.data *= mask
    check(model, expected)


def test_dynamically_quantised_layers_are_called(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(HYBRID, MIXER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    truth, found = read(model), read(rounded)
    assert rounded.device == model.device and rounded.dtype == model.dtype
    for logits in (found[:, PROMPT - 1 :], decoded(rounded)):
        error = (logits - truth[:, PROMPT - 1 :]).norm() / truth[:, PROMPT - 1 :].norm()
        assert 1e-4 < error < 0.2


MAP = {"text_embeddings": "cpu", "vision": "disk", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu",
       "layers.3": "disk", "layers.4": "disk", "norm": "cpu", "head": "disk"}  # fmt: skip


@pytest.mark.parametrize("place", ["cpu", "disk", "map"])
def test_offloaded_weights_come_when_they_are_called_for(
    model: Model, tiles: Tensor, place: str, tmp_path: Path
) -> None:
    expected = copy.deepcopy(model)
    if place == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif place == "disk":
        disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        dispatch_model(model, MAP, main_device="cpu", offload_dir=str(tmp_path))
    assert model.layers[1].mixer.q_proj.weight.is_meta and model.layers[1].mixer.A_log.is_meta
    assert model.device == torch.device("cpu") and model.dtype == torch.float64
    check(model, expected, tiles)


def test_hooks_that_are_taken_off_leave_a_plain_model(model: Model) -> None:
    from accelerate.hooks import ModelHook

    add_hook_to_module(model.layers[1].mixer.q_proj, ModelHook())
    assert not decodable(model)
    remove_hook_from_submodules(model)
    assert decodable(model) and plain(nn.Linear, model.layers[1].mixer.q_proj)


def test_steps_with_int8_weights_are_refused_where_modules_are_called(model: Model) -> None:
    hooked(model.layers[1].mixer, "q_proj")
    model.int8_steps = True
    with pytest.raises(UserError, match=r"int8 weights .* 'layers.1.mixer.q_proj' is wrapped, hooked or offloaded"):
        Decoder(model, 1, 20, max_length=20)


def test_losses_call_a_head_that_has_to_be_called(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(1, 10, 64, generator=random, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_(True)
    weights = torch.rand(1, 10, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 300, (1, 10), generator=random)
    doubled = with_doubled(model, "head").head
    called = Wrapper(model.head)

    def losses(student: nn.Module, teacher: nn.Module) -> list[Tensor]:
        found = [
            divergence(hidden, student, other, teacher, weights, 1.5),
            answer_loss(hidden, student, labels, torch.arange(9)),
        ]
        return [*found, *torch.autograd.grad(sum(found), hidden)]

    monkeypatch.setattr("mmmamba.distill.losses.CHUNK", 4)
    for ours, truth in zip(losses(called, called), losses(doubled, doubled), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    called.base.weight.grad = None
    divergence(hidden, called, other, model.head, weights).backward()
    assert float(called.base.weight.grad.norm()) > 0
