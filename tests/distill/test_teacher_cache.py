"""The teacher on disk: a sample is asked once, a changed one is another, and students learn the same from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import small_run
from mmmamba.checkpoints import load, save_hovle
from mmmamba.data.packed_batch import Batch
from mmmamba.data.processor import Processor
from mmmamba.distill.distill import distill
from mmmamba.distill.losses import divergence, token_weights
from mmmamba.distill.objectives import inputs
from mmmamba.distill.recipe import DataConfig, SourceConfig
from mmmamba.distill.teacher_cache import META, TeacherCache
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.training_data import TrainingData
from mmmamba.errors import UserError
from mmmamba.ops.kl.top_k import top_k

K = 20


def stage(**changes) -> StageConfig:
    return replace(StageConfig(steps=1, batch_size=3, lr=1e-3, cache_teacher=K, micro_tokens=400), **changes)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder).requires_grad_(False)


@pytest.fixture(scope="module")
def rows(small_data, teacher_folder) -> list[Batch]:
    config = DataConfig(sources=(SourceConfig(path=str(small_data)),), workers=0, cache=False)
    data = TrainingData(config, Processor.from_folder(teacher_folder), 0)
    found = data.rows(stage(steps=2), 2)
    return [row for step in found(0) for row in step]


def cache(teacher, folder: Path, **changes) -> TeacherCache:
    return TeacherCache(teacher, "0" * 64, stage(**changes), torch.float32, folder)


def hidden_of(model, row: Batch) -> torch.Tensor:
    return model(**inputs(model, row), cu_seqlens=row.cu_seqlens, logits="none").hidden


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.top_ids, other.top_ids) and torch.equal(one.top_log_probs, other.top_log_probs)


@pytest.mark.parametrize("prompt_weight", [1.0, 0.0])
def test_a_sample_is_asked_once(teacher, rows, tmp_path, prompt_weight):
    first = cache(teacher, tmp_path, prompt_weight=prompt_weight)
    given = [first.attach(row) for row in rows]
    kept = sum(row.tokens if prompt_weight else len(row.scored) for row in rows)
    assert (first.asked, first.read) == (kept, 0)
    for row, one in zip(rows, given, strict=True):
        hidden = hidden_of(teacher, row)[0]
        ids, log_probs = top_k(hidden if prompt_weight else hidden[row.scored], teacher.head.weight, K)
        assert torch.equal(one.top_ids[0].long(), ids)
        torch.testing.assert_close(one.top_log_probs[0].float(), log_probs, rtol=1e-3, atol=1e-3)
    later = cache(teacher, tmp_path, prompt_weight=prompt_weight)
    assert all(same(later.attach(row), one) for row, one in zip(rows, given, strict=True))
    assert (later.asked, later.read) == (0, kept)
    size = sum(file.stat().st_size for file in later.path.glob("*.bin"))
    assert size == kept * later.bytes_a_token + 24 * sum(row.sequences for row in rows)
    assert f"{later.bytes_a_token} bytes a token" in later.report()


def test_another_picture_is_another_sample(teacher, rows, tmp_path):
    kept = cache(teacher, tmp_path)
    row = next(row for row in rows if len(row.tiles))
    kept.attach(row)
    asked, tiles = kept.asked, row.tiles.clone()
    tiles[0, 0, 0, 0] ^= 1
    kept.attach(replace(row, tiles=tiles))
    assert 0 < kept.asked - asked < row.tokens or row.sequences == 1


def test_what_is_half_written_or_spoilt_is_asked_again(teacher, rows, tmp_path):
    first = cache(teacher, tmp_path)
    given = [first.attach(row) for row in rows]
    first.close()
    (file,) = first.path.glob("*.bin")
    data = file.read_bytes()
    for changed in (data[:-5], data[:30] + bytes([data[30] ^ 4]) + data[31:], data[:3], b""):
        file.write_bytes(changed)
        again = cache(teacher, tmp_path)
        assert all(same(again.attach(row), one) for row, one in zip(rows, given, strict=True))
        assert 0 < again.asked
        again.close()
        for other in again.path.glob("*.bin"):
            if other != file:
                other.unlink()


def test_a_folder_of_another_is_refused(teacher, tmp_path):
    kept = cache(teacher, tmp_path)
    meta = json.loads((kept.path / META).read_text())
    (kept.path / META).write_text(json.dumps({**meta, "k": 3}))
    with pytest.raises(UserError, match=r"teacher\.json: is not what"):
        cache(teacher, tmp_path)


def test_each_setting_has_a_folder_of_its_own(teacher, tmp_path):
    kept = {cache(teacher, tmp_path, **changes).path for changes in ({}, {"temperature": 2.0}, {"prompt_weight": 0.0})}
    assert len(kept) == 3
    assert cache(teacher, tmp_path, prompt_weight=0.1).path in kept  # of all tokens, whatever they weigh


def test_more_tokens_than_there_are_is_an_error(teacher, tmp_path):
    with pytest.raises(UserError, match="the teacher has 320 tokens"):
        cache(teacher, tmp_path, cache_teacher=320)


def exact_kl(teacher, student, rows: list[Batch]) -> float:
    """The mean KL of the whole distributions."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            hidden = [hidden_of(model, row) for model in (student, teacher)]
            weights = token_weights(row.labels, 1.0)
            total += float(divergence(hidden[0], student.head, hidden[1], teacher.head, weights))
    return total / sum(row.tokens for row in rows)


@pytest.fixture
def data(small_data, tmp_path) -> Path:
    return shutil.copytree(small_data.parent, tmp_path / "data") / small_data.name


def go(out: Path, teacher: Path, data: Path, k: int | None, resume: bool = False, **changes) -> Path:
    plan = small_run.recipe(stage1__steps=2, stage2__steps=2, **changes)
    recipe = small_run.write_recipe(out.parent / f"{out.name}.yaml", plan)
    return distill(
        str(recipe), teacher=str(teacher), data=(data,), out=out, device="cpu", cache_teacher=k, resume=resume
    )


def test_a_student_learns_the_same(rows, teacher_folder, data, tmp_path, capsys):
    """Of a teacher that is as sure as trained ones are: a random one gives all 320 tokens much the same chance."""
    sure = load(teacher_folder)
    with torch.no_grad():
        sure.head.weight *= 12
    teacher, folder = sure.requires_grad_(False), tmp_path / "sure"
    save_hovle(teacher, Processor.from_folder(teacher_folder), folder, dtype=torch.float32)
    _, log_probs = top_k(hidden_of(teacher, rows[0])[0], teacher.head.weight, 96)
    assert 0.97 < float(1 - log_probs[:, -1].exp().mean()) < 0.9999
    long = {"stage3__steps": 24, "stage3__lr": 5e-3}
    exact = load(go(tmp_path / "exact", folder, data, None, **long))
    kept = load(go(tmp_path / "kept", folder, data, 96, **long))
    seeded = exact_kl(teacher, load(go(tmp_path / "none", folder, data, None, stage3__steps=0)), rows)
    ends = [exact_kl(teacher, model, rows) for model in (exact, kept)]
    assert ends[0] < seeded / 2  # it has learnt
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
    shown = capsys.readouterr().out
    assert "bytes a token" in shown and "96 tokens hold 99." in shown
    again = go(tmp_path / "again", folder, data, 96, **long)
    line = next(line for line in capsys.readouterr().out.splitlines() if "bytes a token" in line)
    assert " 0 asked" in line.replace("\n", " ")
    first = (tmp_path / "kept" / "model" / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == first


def test_an_interrupted_run_goes_on_to_the_same_weights(teacher_folder, data, tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", teacher_folder, data, K, stage3__steps=6)
    shutil.rmtree(data.parent / ".cache")
    attach, taken = TeacherCache.attach, []

    def stopping(self: TeacherCache, row: Batch) -> Batch:
        taken.append(row)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return attach(self, row)

    monkeypatch.setattr(TeacherCache, "attach", stopping)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "part", teacher_folder, data, K, stage3__steps=6)
    monkeypatch.setattr(TeacherCache, "attach", attach)
    resumed = go(tmp_path / "part", teacher_folder, data, K, resume=True, stage3__steps=6)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("k", [-1, 10**6])
def test_a_number_that_no_stage_has_is_refused(k, teacher_folder, data, tmp_path):
    with pytest.raises(UserError, match=f"--cache-teacher {k}: cache_teacher must be"):
        go(tmp_path / "run", teacher_folder, data, k)


def test_stages_without_logits_refuse_it(teacher_folder, data, tmp_path):
    with pytest.raises(UserError, match=r"stage1\.cache_teacher"):
        go(tmp_path / "run", teacher_folder, data, None, stage1__cache_teacher=8)
