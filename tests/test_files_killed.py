"""A save that is cut off at any moment leaves the old adapter or the new one, never a mixture."""

import io
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import EVERYTHING, adapted, assert_same_outputs, tokens, toy

import peftkern
from peftkern import LoraConfig

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def same(first, second):
    """Other kernels round otherwise; another adapter is another function altogether."""
    return torch.allclose(first, second, atol=1e-4)


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


def save_killed_at(step, model, path, monkeypatch):
    """Dies right before the step-th call that touches the disk; True if the save got through."""
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == step:
                raise Killed
            calls += 1
            return real(*args, **kwargs)

        return call

    def opened(*args):
        file = io.FileIO(args[0], "w")
        write, torn = counted(file.write), file.write

        class Torn:
            """Half of what it should write is there when the process dies."""

            def write(self, content):
                try:
                    write(content)
                except Killed:
                    torn(content[: len(content) // 2])
                    raise

            def __enter__(self):
                return self

            def __exit__(self, *args):
                file.close()

            flush, fileno = file.flush, file.fileno

        return Torn()

    with monkeypatch.context() as patch:
        patch.setattr("peftkern._folder.open", opened, raising=False)
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        for name in ("unlink", "mkdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            peftkern.save_adapter(model, path)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("change", [LoraConfig(r=2), EVERYTHING], ids=["new config", "same config"])
def test_a_save_killed_at_any_step_leaves_the_old_adapter_or_the_new(change, tmp_path, monkeypatch):
    old, new, last = adapted(), adapted(change, seed=3), adapted(LoraConfig(r=3))
    expected = {"old": old(tokens()), "new": new(tokens())}
    seen, through = [], False
    for step in range(99):
        path = tmp_path / str(step)
        peftkern.save_adapter(old, path)
        through = save_killed_at(step, new, path, monkeypatch)
        outputs = peftkern.load_adapter(toy(), path)(tokens())
        seen += [which for which, y in expected.items() if same(outputs, y)]
        assert len(seen) == step + 1, f"neither, or both, after step {step}"
        try:  # peft knows nothing of a save that was cut: it finds the same, or nothing
            theirs = peft.PeftModel.from_pretrained(toy(), path).eval()
        except (ValueError, OSError):
            pass
        else:
            assert any(same(theirs(tokens()), y) for y in expected.values())
        peftkern.save_adapter(last, path)  # the next save clears up
        assert sorted(f for f in os.listdir(path) if not f.endswith(".tmp")) == FILES
        assert_same_outputs(peftkern.load_adapter(toy(), path), last)
        if through:
            break
    assert through and seen[0] == "old" and seen[-1] == "new"
    assert seen == sorted(seen, reverse=True)  # once the new one counts, it stays


def test_a_save_after_a_killed_save_may_be_killed_as_well(tmp_path, monkeypatch):
    saves = [adapted(), adapted(LoraConfig(r=2), seed=3), adapted(seed=4)]
    expected = [model(tokens()) for model in saves]
    for first in range(99):
        done = False
        for second in range(99):
            path = tmp_path / f"{first}-{second}"
            peftkern.save_adapter(saves[0], path)
            through = save_killed_at(first, saves[1], path, monkeypatch)
            done = save_killed_at(second, saves[2], path, monkeypatch)
            outputs = peftkern.load_adapter(toy(), path)(tokens())
            assert sum(same(outputs, y) for y in expected) == 1
            if done:
                assert sorted(f for f in os.listdir(path) if not f.endswith(".tmp")) == FILES
                break
        if through:
            break
    assert through and done


def test_a_process_killed_in_the_middle_of_the_tensors_leaves_the_old_adapter(tmp_path):
    peftkern.save_adapter(adapted(), tmp_path)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import peftkern
from models import LoraConfig, adapted
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
peftkern.save_adapter(adapted(LoraConfig(r=2)), {str(tmp_path)!r})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert_same_outputs(peftkern.load_adapter(toy(), tmp_path), adapted())
