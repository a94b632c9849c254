"""Directories that are whole or not there, and the checkpoints among them: damage, full disks, how many are kept."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyppo.checkpoint import CheckpointError, checkpoints, last_valid_checkpoint
from asyppo.config import ConfigError
from asyppo.loop import TrainingLoop
from asyppo.run.directory import RunDirectory, durable, read_jsonl
from asyppo.trainer import TrainingError

Make = Callable[..., Any]


def score(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of a tiny run's time would be its report."""
    monkeypatch.setattr("asyppo.loop.report_at_the_end", lambda path: None)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed directory with a few files."""
    directory = tmp_path / "sealed"
    (directory / "inner").mkdir(parents=True)
    (directory / "inner" / "weights").write_bytes(bytes(range(256)) * 100)
    (directory / "empty").write_text("")
    (directory / ".hidden").write_text("counts, too")
    durable.seal(directory)
    return directory


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda d: flip(d / "inner" / "weights"), "inner/weights has another checksum"),
    "the end": (lambda d: os.truncate(d / "inner" / "weights", 999), "inner/weights has 999 bytes, not 25600"),
    "a file": (lambda d: (d / "empty").unlink(), "empty is missing"),
    "a hidden file": (lambda d: flip(d / ".hidden"), ".hidden has another checksum"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing or cannot be read"),
    "half a manifest": (lambda d: os.truncate(d / "manifest.json", 99), "manifest.json is missing or cannot be read"),
    "another manifest": (
        lambda d: (d / "manifest.json").write_text("[]"),
        "manifest.json is missing or cannot be read",
    ),
    "a checksum": (
        lambda d: (d / "manifest.json").write_text(
            (d / "manifest.json").read_text().replace('"blake2b": "', '"blake2b": "0', 1)
        ),
        ".hidden has another checksum",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(sealed: Path, name: str) -> None:
    assert durable.damage(sealed) is None
    act, said = DAMAGE[name]
    act(sealed)
    assert durable.damage(sealed) == said


def test_what_was_added_is_no_damage(sealed: Path) -> None:
    (sealed / "README.md").write_text("The best one.")
    assert durable.damage(sealed) is None


def test_text_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    durable.write_text(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            durable.write_text(file, "new")
    assert file.read_text() == "old"
    durable.write_text(file, "new")
    assert file.read_text() == "new"
    durable.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


# --- checkpoints ---


@pytest.fixture
def three(tiny_config: Make, tiny_trainer: Make) -> Path:
    """The directory of a run with checkpoints 1, 2 and 3."""
    return tiny_trainer(tiny_config(max_steps=3, save_steps=1), score).train().run.path


def test_a_damaged_checkpoint_is_passed_over(three: Path, tiny_config: Make, tiny_trainer: Make) -> None:
    before = read_jsonl(three / "metrics.jsonl")
    flip(three / "checkpoint-3" / "policy" / "model.safetensors")
    (three / "checkpoint-2" / "rng.json").unlink()
    with pytest.warns(UserWarning, match="passed over") as warned:
        result = tiny_trainer(tiny_config(max_steps=3, save_steps=1, resume=True), score).train()
    text = [str(w.message) for w in warned if "passed over" in str(w.message)]
    assert text == [
        f"{three}/checkpoint-3 is passed over for checkpoint-1: policy/model.safetensors has another checksum",
        f"{three}/checkpoint-2 is passed over for checkpoint-1: rng.json is missing",
    ]
    again = read_jsonl(three / "metrics.jsonl")
    assert [row["critic/vf_loss"] for row in again] == [row["critic/vf_loss"] for row in before]
    assert [path.name for path in checkpoints(three)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all(durable.damage(path) is None for path in checkpoints(three))
    assert (three / "damaged-checkpoint-3").exists()  # to be looked at
    assert result.checkpoint == three / "checkpoint-3"


def test_no_checkpoint_is_valid(three: Path, tiny_config: Make, tiny_trainer: Make) -> None:
    before = (three / "metrics.jsonl").read_bytes()
    for path in checkpoints(three):
        flip(path / "trainer_state.json")
    with pytest.raises(CheckpointError) as error:
        tiny_trainer(tiny_config(max_steps=3, resume=True), score).train()
    assert "checkpoint-3: trainer_state.json has another checksum; checkpoint-2: trainer_state.json" in str(error.value)
    assert len(checkpoints(three)) == 3  # nothing was touched
    assert (three / "metrics.jsonl").read_bytes() == before
    assert last_valid_checkpoint(three.parent) is None


def test_the_last_and_the_best_are_kept(
    tiny_config: Make, tiny_trainer: Make, scripted_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.5, 4: 0.2, 5: 0.3, 6: 0.4}
    config = tiny_config(max_steps=6, save_steps=1, save_total_limit=2, evaluation={"every": 1})
    trainer, kept = tiny_trainer(config, score), []
    monkeypatch.setattr(TrainingLoop, "evaluate", lambda self, run, step: scripted_evaluation(accuracy[step]))
    save = TrainingLoop.save

    def look(self: TrainingLoop, run: Any, *arguments: Any, wait: bool) -> Path:
        path = save(self, run, *arguments)  # written when it returns
        kept.append([int(p.name.split("-")[1]) for p in checkpoints(run.path)])
        return path

    monkeypatch.setattr(TrainingLoop, "save", look)
    run = trainer.train().run.path
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    assert not list(run.glob(".checkpoint-*"))
    # A run that goes on knows the best one of before.
    os.truncate(run / "checkpoint-6" / "rng.json", 9)
    trainer = tiny_trainer(tiny_config(**(vars(config) | {"max_steps": 6, "resume": True, "critic": {}})), score)
    with pytest.warns(UserWarning, match="passed over"):
        trainer.train()
    assert [int(p.name.split("-")[1]) for p in checkpoints(run)] == [2, 5, 6]


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a disk of a given size."""
    place = tmp_path / "disk"

    def mount(size: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a disk")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock, and samples."""
    metrics = read_jsonl(run / "metrics.jsonl")
    timeless = [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in metrics]
    return timeless + read_jsonl(run / "samples.jsonl")


def test_a_read_only_disk(tiny_config: Make, small_disk: Make) -> None:
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(
        ConfigError, match=f"output_dir: cannot write to {disk}, needs a directory with write permission"
    ):
        RunDirectory(tiny_config(output_dir=str(disk / "runs")))


@pytest.mark.parametrize("room", [40, 400, 900])
def test_a_full_disk(room: int, tiny_config: Make, tiny_trainer: Make, small_disk: Make) -> None:
    """Whatever does not fit any more, weights or a row: the error is a line, and the last checkpoint is whole."""
    whole = tiny_trainer(tiny_config(max_steps=9, save_steps=2, run_name="whole"), score).train().run.path
    disk = small_disk(f"{room}k")
    fields = {"output_dir": str(disk), "save_steps": 2, "max_steps": 9}
    with pytest.raises(TrainingError, match=r"cannot write .*") as error:
        tiny_trainer(tiny_config(**fields), score).train()
    text = str(error.value)
    assert not list((disk / "run").glob(".checkpoint-*"))  # what did not fit makes room again
    assert "\n" not in text
    assert "No space left on device" in text or "MiB are free" in text
    saved = checkpoints(disk / "run")
    assert all(durable.damage(path) is None for path in saved)
    assert (f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet") in text
    subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
    assert rows(tiny_trainer(tiny_config(**fields, resume=True), score).train().run.path) == rows(whole)


@pytest.mark.parametrize("at", [0, 2, 5, 7])
def test_a_write_that_fails(
    at: int, tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no disk can be mounted: the system refuses one of the writes."""
    count = {"fsync": -1}
    fsync = os.fsync

    def full(descriptor: int) -> None:
        count["fsync"] += 1
        if count["fsync"] >= 3 + 17 * at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match=r"cannot write .*: No space left on device; ") as error:
        tiny_trainer(tiny_config(max_steps=9, save_steps=2), score).train()
    saved = checkpoints(tmp_path / "runs" / "run")
    assert all(durable.damage(path) is None for path in saved)
    assert (f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet") in str(error.value)
