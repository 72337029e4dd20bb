"""Checkpoints of a run: written beside their place, hashed, renamed into it, and rotated.

A checkpoint is a folder: ``model.safetensors`` and ``config.json`` (Hub layout: ``timm.create_model("local-dir:...")``
and validate.py take it), ``ema/`` alike, the states of optimizer, schedule, scaler and every process's random
generators and place in the data, ``args.yaml``, and ``hashes.json``, which is written last.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dg_timm._errors import BadState
from dg_timm._files import put_in_place
from dg_timm.training.data.samplers import Position
from dg_timm.training.loop import sharding
from dg_timm.training.loop.distributed import HostAllReduce

HASHES, OPTIMIZER = "hashes.json", "optimizer.bin"
_DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for a full disk


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: of the checkpoints; the first save makes it.
        accelerator: whose state is saved.
        all_reduce: by which the processes hear of a failure of one.
        model, ema: unwrapped; ``ema`` may be None.
        keep: number of the newest checkpoints that stay; the best one stays beside them.
        args: options of the run, written into every checkpoint.
        write_config: writes config.json of a model into a folder.
        optimizer: one that the accelerator does not save, because its states are sharded.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        all_reduce: HostAllReduce,
        model: nn.Module,
        ema: nn.Module | None,
        *,
        keep: int,
        args: dict[str, Any],
        write_config: Callable[[nn.Module, Path], object],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.folder, self.accelerator, self.all_reduce = folder, accelerator, all_reduce
        self.keep, self.args, self.write_config, self.optimizer = keep, args, write_config, optimizer
        self.networks = {".": model, **({"ema": ema} if ema is not None else {})}
        self.best: str | None = None  # name of the checkpoint that rotation must spare
        self.states: dict[str, Any] = {}  # by file name, what has a state_dict of plain numbers
        # Accelerate would save and load the wrapped model, whose names tell how it was wrapped
        accelerator.register_save_state_pre_hook(self._save_networks)
        accelerator.register_load_state_pre_hook(self._load_networks)

    def save(self, name: str, position: Position | None) -> Path:
        """Write the checkpoint ``name``; every process must call it. A sound one of that name is left alone.

        Raises:
            BadState: in every process, if any of them can't write. Earlier checkpoints are intact.
        """
        place, temporary = self.folder / name, self.folder / f".saving-{name}"
        sound = self.accelerator.is_main_process and place.exists() and find_fault(place) is None
        if self.all_reduce.any(sound):
            if self.accelerator.is_main_process:
                self._point("last", name)
            return place
        failure = self._attempt(lambda: _make_folder(temporary))
        if not failure:
            failure = self._attempt(lambda: self._write(temporary, position), _DISK_ERRORS, everywhere=True)
        if not failure:
            failure = self._attempt(lambda: self._publish(temporary, place))
        if failure:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            left = sorted(place.name for place in _places(self.folder))
            intact = f"the newest one, {left[-1]}, is intact" if left else "there is no earlier one"
            raise BadState(f"checkpoint {name} can't be written to {self.folder} ({failure}); {intact}")
        return place

    def _attempt(
        self, write: Callable[[], None], errors: tuple[type[Exception], ...] = (OSError,), everywhere: bool = False
    ) -> str:
        """Write in the main process, or in all of them; return what failed in any process, or an empty text.

        Every process waits until the others are done.
        """
        failure = ""
        if everywhere or self.accelerator.is_main_process:
            try:
                write()
            except errors as error:
                failure = str(error) or type(error).__name__
        return (failure or "another process failed") if self.all_reduce.any(bool(failure)) else ""

    def _write(self, folder: Path, position: Position | None) -> None:
        self.accelerator.save_state(str(folder))
        self._save_own(folder, position)

    def _publish(self, temporary: Path, place: Path) -> None:
        """Hash what all processes wrote, and give it its name."""
        args = yaml.safe_dump(self.args, sort_keys=False, allow_unicode=True)
        (temporary / "args.yaml").write_text(args, encoding="utf-8")
        _write_hashes(temporary)
        self._set_aside(place)
        put_in_place(temporary, place)
        _sync(self.folder)
        self._point("last", place.name)
        self._rotate()

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint, sound or not."""
        return max(_places(self.folder), default=None)

    def mark_best(self, name: str) -> None:
        """Spare this checkpoint from rotation, and point ``best`` to it."""
        self.best = name
        if self.accelerator.is_main_process and (self.folder / name).exists():
            self._point("best", name)

    def load(self, place: Path) -> Position | None:
        """Put everything back as it was; return the position of this process."""
        self.accelerator.load_state(str(place))  # weights_only=True, by Accelerate's default
        if self.optimizer is not None:
            sharding.load_optimizer(self.optimizer, torch.load(place / OPTIMIZER, weights_only=True))
        for name, state in self.states.items():
            state.load_state_dict(_read_json(place / f"{name}.json"))
        own = self.accelerator.process_index
        statistics = place / f"statistics-{own}.safetensors"
        if statistics.exists():
            saved = load_file(statistics)
            for sub, network in self.networks.items():
                for name, buffer in network.named_buffers():
                    buffer.copy_(saved[f"{sub}/{name}"])
        file = place / f"position-{own}.json"
        position: Position | None = _read_json(file if file.exists() else place / "position-0.json")
        return position

    def clean(self, start: Path | None) -> None:
        """Remove what an interrupted save left, and move aside the checkpoints after ``start``.

        Those belong to a continuation that is abandoned. Without a ``start``, all of them do.
        """
        if self.accelerator.is_main_process:
            for place in _places(self.folder):
                if start is None or place.name > start.name:
                    self._set_aside(place)
            for left in self.folder.glob(".saving-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _set_aside(self, place: Path) -> None:
        if place.exists():
            put_in_place(place, self.folder / f"aside-{place.name}-{time.time_ns()}")

    def _rotate(self) -> None:
        for old in sorted(_places(self.folder))[: -self.keep]:
            if old.name != self.best:
                leaving = old.with_name(f".saving-{old.name}")
                put_in_place(old, leaving)  # never a half-removed checkpoint under its name
                shutil.rmtree(leaving, ignore_errors=True)

    def _point(self, link: str, name: str) -> None:
        temporary = self.folder / f".saving-link-{link}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name, target_is_directory=True)
        put_in_place(temporary, self.folder / link)

    def _save_own(self, folder: Path, position: Position | None) -> None:
        """Write what every process has for itself: its place in the data, and its norm statistics within an epoch."""
        own = self.accelerator.process_index
        if self.optimizer is not None:
            state = sharding.gather(self.optimizer.state_dict())
            if self.accelerator.is_main_process:
                torch.save(state, folder / OPTIMIZER)
        if self.accelerator.is_main_process:  # as JSON: Accelerate would pickle it, and run what it loads
            for name, state in self.states.items():
                (folder / f"{name}.json").write_text(json.dumps(state.state_dict()), encoding="utf-8")
        (folder / f"position-{own}.json").write_text(json.dumps(position), encoding="utf-8")
        if self.accelerator.num_processes > 1:
            buffers = {
                f"{sub}/{name}": b.cpu() for sub, net in self.networks.items() for name, b in net.named_buffers()
            }
            save_file(buffers, folder / f"statistics-{own}.safetensors")

    def _save_networks(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        weights.clear()
        for sub, network in self.networks.items():
            tensors = sharding.gather(network.state_dict())
            if self.accelerator.is_main_process:
                folder = Path(output_dir) / sub
                folder.mkdir(exist_ok=True)
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
                self.write_config(network, folder)

    def _load_networks(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        for sub, network in self.networks.items():
            sharding.load(network, load_file(Path(input_dir) / sub / "model.safetensors"))


def latest_valid(folder: Path) -> tuple[str | None, list[str]]:
    """Find the newest checkpoint whose files are those that were written, and say why newer ones were passed over."""
    faults: list[str] = []
    for place in sorted(_places(folder), reverse=True):
        fault = find_fault(place)
        if fault is None:
            return str(place), faults
        faults.append(f"{place}: {fault}")
    return None, faults


def _places(folder: Path) -> list[Path]:
    return [place for place in folder.glob("update-*") if place.is_dir()]


def find_fault(place: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None if they are those that were written."""
    if not place.is_dir():
        return "there is no such folder"
    try:
        expected: dict[str, str] = dict(_read_json(place / HASHES))
    except FileNotFoundError:
        return f"{HASHES} is missing"
    except (OSError, ValueError, TypeError) as error:
        return f"{HASHES} can't be read ({error})"
    for name, digest in expected.items():
        file = place / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != digest:
            return f"{name} is not what was written (its hash differs)"
    return None if expected else f"{HASHES} names no file"


def read_args(place: Path) -> dict[str, Any]:
    """Read the options of the run that wrote a checkpoint."""
    args: dict[str, Any] = yaml.safe_load((place / "args.yaml").read_text(encoding="utf-8"))
    return args


def _make_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_hashes(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {str(file.relative_to(folder)): _digest(file) for file in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for path in [*files, folder / HASHES, *{file.parent for file in files}]:
        _sync(path)


def _sync(path: Path) -> None:
    """Flush a file to the disk before it is renamed: a power cut must not leave an empty one under the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
