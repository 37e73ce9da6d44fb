"""The folder of a run: whose it is, and what may lie in it."""

from __future__ import annotations

import pytest
import yaml

from robustft.training.run import CONFIG_FILE, configured, in_use


def claim(folder, config, resume=False):
    with configured(folder, config, resume):
        pass


def test_resume_does_not_claim_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no run to resume"):
        claim(tmp_path, {}, resume=True)
    with pytest.raises(FileExistsError, match="already holds a run or other files"):
        claim(tmp_path, {})
    with pytest.raises(FileExistsError, match="is a file"):
        claim(tmp_path / "mine.txt", {})
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_kill_during_the_first_write_leaves_a_folder_that_can_be_used(tmp_path):
    for resume in (False, True):
        folder = tmp_path / str(resume)
        folder.mkdir()
        (folder / ".config.yaml.0123456789ab").write_text("se")
        (folder / "run.lock").write_text("1\n")
        claim(folder, {"seed": 0}, resume)
        assert yaml.safe_load((folder / CONFIG_FILE).read_bytes()) == {"seed": 0}


def test_a_run_goes_on_under_its_own_configuration_only(tmp_path):
    claim(tmp_path / "a", {"seed": 0, "sizes": (1, 2), "lr": 1e-5})
    claim(tmp_path / "a", {"seed": 0, "sizes": (1, 2), "lr": 1e-5}, resume=True)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        claim(tmp_path / "a", {"seed": 1}, resume=True)
    with pytest.raises(FileExistsError, match="--resume continues it"):
        claim(tmp_path / "a", {"seed": 0})
    for damaged in (b"[", b"\xff\xfe\x00"):
        (tmp_path / "a" / CONFIG_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="config.yaml cannot be read"):
            claim(tmp_path / "a", {"seed": 0}, resume=True)


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    with configured(tmp_path / "a", {}, resume=False):
        with pytest.raises(BlockingIOError, match="a is in use by another run"):
            claim(tmp_path / "a", {}, resume=True)
        with in_use(tmp_path / "a" / "method"):
            pass
    claim(tmp_path / "a", {}, resume=True)
    with pytest.raises(OSError, match="output folder /proc/robustft cannot be written"):
        claim(tmp_path.__class__("/proc/robustft"), {})
