"""Broken files give one clear line; a write that fails leaves the old file or folder as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmmamba.checkpoints import fingerprint, load, read_safetensors, save_hovle, write_atomically
from mmmamba.checkpoints.io import Weights, read_with_metadata, write_safetensors
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config.json:1: not JSON"),
        (b"", r"config.json:1: not JSON"),
        (b"[1]", r"config.json: must hold a JSON object, got list"),
        (b"\xff\xfe{}", r"config.json: not UTF-8 text \(byte 0\)"),
        (b'{"model_type": ["gpt2"]}', r"config.json: 'model_type' must be a text, got \['gpt2'\]"),
        (b'{"model_type": {}}', r"config.json: 'model_type' must be a text, got {}"),
        (b'{"model_type": "gpt2"}', r"config.json: model_type 'gpt2' is not known"),
    ],
)
def test_bad_json(golden_folder, content: bytes, message: str) -> None:
    folder = golden_folder("hovle_tiny_A")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in one_line(error)


def test_missing_files(golden_folder, tmp_path: Path) -> None:
    folder = golden_folder("hovle_tiny_A")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights \(model.safetensors, pytorch_model.bin"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load(folder)
    with pytest.raises(UserError, match="recipe X: is a folder"):
        read_json(tmp_path, "recipe X")
    with pytest.raises(UserError, match="no such file"):
        read_safetensors(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1], ids=["empty", "header", "half", "one byte short"])
def test_truncated_weights(golden_folder, keep: int) -> None:
    folder = golden_folder("hovle_tiny_A")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated or not a safetensors file") as error:
        load(folder)
    assert str(file) in one_line(error)


# ---------------------------------------------------------------------------------------------- writing


def test_files_and_folders_are_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "down" / "a.txt"
    for text in ("one", "two"):
        assert write_atomically(file, lambda path, text=text: path.write_text(text)) == file
        assert file.read_text() == text

    folder = tmp_path / "folder"
    for name in ("one", "two"):
        write_atomically(folder, lambda path, name=name: (path / name).write_text(name), folder=True)
        assert [entry.name for entry in folder.iterdir()] == [name]
    write_atomically(folder, lambda path: path.mkdir())  # a writer may make the folder itself
    assert not list(folder.iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "folder"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", lambda path: (path / "x").touch(), folder=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_failed_write_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "folder"
    write_atomically(folder, lambda path: (path / "old").write_text("old"), folder=True)

    def fail(path: Path) -> None:
        (path / "half").write_text("half")
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_atomically(folder, fail, folder=True)
    if expected is UserError:
        assert str(caught.value) == f"{folder}: not written: No space left on device"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert [entry.name for entry in folder.iterdir()] == ["old"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "folder"
    write_atomically(folder, lambda path: (path / "old").touch(), folder=True)

    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        write_atomically(folder, lambda path: (path / "new").touch(), folder=True)
    assert (folder / "old").exists() and [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="below: not written:") as error:
        write_atomically(tmp_path / "file" / "below", lambda path: path.touch())
    one_line(error)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "row": base[1], "columns": base[:, :2], "turned": base.T}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "x.safetensors").stat().st_size < 1000


def test_a_file_of_ours_is_read_by_the_formats_own_library_and_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtypes = (torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.float64)
    tensors = {f"x.{i}": torch.randint(0, 2, (3, i)).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors["scalar"] = torch.tensor(2.5)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, tensors, {"a": "é\n"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs, {"a": "é\n"})
    for path in (ours, theirs):
        for found in (load_file(path), read_with_metadata(path)[0]):
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert read_with_metadata(path)[1] == {"a": "é\n"}


def test_a_number_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"odd": torch.zeros(2, dtype=torch.uint16)}, path)
    for read in (read_with_metadata, lambda file: Weights(file, [file])):
        with pytest.raises(UserError, match=r"x\.safetensors: tensor 'odd' is U16") as error:
            read(path)
        one_line(error)


def test_a_folder_with_other_things_in_it_is_not_replaced(tiny_model, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    save_hovle(tiny_model(), None, folder)  # empty
    save_hovle(tiny_model(), None, folder)  # a model
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex', which is no part of a model; give a new or empty"):
        save_hovle(tiny_model(), None, folder)
    assert (folder / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file; give a folder"):
        save_hovle(tiny_model(), None, folder / "thesis.tex")


def test_a_model_of_somebody_else_is_replaced_only_when_asked(tiny_model, tmp_path: Path) -> None:
    folder = save_hovle(tiny_model(), None, tmp_path / "model")
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")  # edited by hand
    with pytest.raises(UserError, match=r"holds 'config.json', which was not written here or was changed since"):
        save_hovle(tiny_model(), None, folder)
    save_hovle(tiny_model(), None, folder, overwrite=True)
    (folder / ".mmmamba.json").unlink()  # as an earlier version left it, or another program
    with pytest.raises(UserError, match=r"holds 'config.json', which was not written here"):
        save_hovle(tiny_model(), None, folder)
    save_hovle(tiny_model(), None, folder, overwrite=True)
    for name in ("README.md", "my-token.txt", "vocab-notes.md", "model_config.json", "extra.safetensors", "link"):
        other = folder / name
        if name == "link":
            other.symlink_to(folder / "config.json")
        else:
            other.write_text("mine")
        with pytest.raises(UserError, match=rf"holds '{name}', which is no part of a model"):
            save_hovle(tiny_model(), None, folder, overwrite=True)
        other.unlink()
    save_hovle(tiny_model(), None, folder)


FULL_DISK = """
import resource, sys
from mmmamba.checkpoints import load, save_hovle
from mmmamba.errors import UserError
model = load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # no file may grow past this: the weights are larger
try:
    save_hovle(model, None, sys.argv[1], overwrite=True)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk_leaves_the_old_model_and_says_one_line(golden_folder, tmp_path: Path) -> None:
    """The operating system refuses the write half way, as it does on a full disk."""
    folder = golden_folder("hovle_tiny_A")
    before = fingerprint(folder)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {folder}: not written:") and "File too large" in lines[0]
    assert fingerprint(folder) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]
    load(folder)
