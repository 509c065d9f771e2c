"""Pictures that were replaced are found, though the JSONL is the same: by a run that is resumed, and by a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import small_run
from mmmamba.config_files import from_dict
from mmmamba.data import picture_hashes
from mmmamba.data.encoded_cache import EncodedCache
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.distill.distill import distill
from mmmamba.distill.recipe import DistillRecipe
from mmmamba.distill.run_folder import RunFolder
from mmmamba.errors import UserError

PLAN = from_dict(DistillRecipe, small_run.recipe(), where="small")


@pytest.fixture
def data(small_data: Path, tmp_path: Path) -> Path:
    """A set of its own, to be changed."""
    return Path(shutil.copytree(small_data.parent, tmp_path / "data")) / small_data.name


def replace(picture: str | Path, by: bytes) -> None:
    """Other bytes of the same length."""
    content = Path(picture).read_bytes()
    Path(picture).write_bytes((by * len(content))[: len(content)])


def test_one_changed_picture_is_found_in_a_small_set(data: Path) -> None:
    before = PictureHashes.of(JsonlDataset(data))
    assert before.changed(before.text) is None and len(before.pictures) > 1
    last = before.pictures[-1][0]
    replace(last, b"x")
    assert PictureHashes.of(JsonlDataset(data)).changed(before.text) == last
    Path(last).unlink()  # a cache needs none of them: what has gone has not changed
    assert PictureHashes.of(JsonlDataset(data)).changed(before.text) is None
    assert before.changed("") is None, "a run of an earlier version kept none"


def test_of_a_large_set_a_sample_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PictureHashes.of(JsonlDataset(data))
    monkeypatch.setattr(picture_hashes, "ALL", 2)
    monkeypatch.setattr(picture_hashes, "SAMPLED", 2)
    sample = PictureHashes.of(JsonlDataset(data))
    assert 1 <= len(sample.pictures) <= 2 < len(whole.pictures) + 1
    for path, _ in whole.pictures:
        replace(path, b"x")
    assert PictureHashes.of(JsonlDataset(data)).changed(sample.text) is not None


def test_a_run_does_not_go_on_with_other_pictures(data: Path, tmp_path: Path) -> None:
    found = {"0": PictureHashes.of(JsonlDataset(data))}
    run = RunFolder(tmp_path / "run", PLAN, {}, resume=False)
    run.note(pictures=run.check_pictures(found))
    RunFolder(tmp_path / "run", PLAN, {}, resume=True).check_pictures(found)
    first = found["0"].pictures[0][0]
    replace(first, b"x")
    with pytest.raises(UserError, match=rf"{first}: changed since the run in .*run began; give another --out"):
        RunFolder(tmp_path / "run", PLAN, {}, resume=True).check_pictures({"0": PictureHashes.of(JsonlDataset(data))})
    manifest = tmp_path / "run" / "manifest.json"
    kept = json.loads(manifest.read_text())
    del kept["pictures"]  # a run of an earlier version is gone on with
    manifest.write_text(json.dumps(kept))
    RunFolder(tmp_path / "run", PLAN, {}, resume=True).check_pictures({"0": PictureHashes.of(JsonlDataset(data))})


def test_distill_resume_after_all_pictures_were_replaced(data: Path, teacher_folder: Path, tmp_path: Path) -> None:
    plan = small_run.recipe(stage1__steps=1, stage2__steps=1, stage3__steps=1)
    recipe = small_run.write_recipe(tmp_path / "plan.yaml", plan)

    def go(resume: bool) -> Path:
        return distill(str(recipe), teacher=str(teacher_folder), data=(data,), out=tmp_path / "run", resume=resume)

    go(resume=False)
    go(resume=True)
    pictures = PictureHashes.of(JsonlDataset(data)).pictures
    for path, _ in pictures[1:]:
        shutil.copyfile(pictures[0][0], path)
    with pytest.raises(UserError, match=r"changed since the run in .*run began"):
        go(resume=True)


def test_a_cache_is_made_again_when_a_picture_changes(data: Path, tiny_processor, tmp_path: Path, capsys) -> None:
    def tiles() -> bytes:
        cache = EncodedCache(JsonlDataset(data), tiny_processor, tmp_path / "cache")
        return b"".join(np.ascontiguousarray(cache.encode(i).tiles).tobytes() for i in range(len(cache)))

    before = tiles()
    pictures = PictureHashes.of(JsonlDataset(data)).pictures
    assert tiles() == before and "changed since" not in capsys.readouterr().err
    shutil.copyfile(pictures[0][0], pictures[1][0])
    assert tiles() != before and "changed since it was encoded" in capsys.readouterr().err
    for path, _ in pictures:
        Path(path).unlink()
    tiles()  # the cache needs none of them
