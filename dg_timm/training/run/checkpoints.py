"""Checkpoints of a run: written beside their place, checked by hashes, renamed into it, and rotated.

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
from typing import Any, Optional

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dg_timm.training.data.loading import Position
from dg_timm.training.loop.distributed import Agreement
from dg_timm.training.run.networks import load_weights

HASHES = "hashes.json"


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: of the checkpoints; made by the first save.
        model, ema: unwrapped; ``ema`` may be None.
        keep: how many of the newest stay; the best one stays beside them.
        args: the options of the run, written into every checkpoint.
        write_config: writes config.json of a model into a folder.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        agreement: Agreement,
        model: nn.Module,
        ema: Optional[nn.Module],
        *,
        keep: int,
        args: dict[str, Any],
        write_config: Callable[[nn.Module, Path], None],
    ) -> None:
        self.folder, self.accelerator, self.agreement, self.keep, self.args = folder, accelerator, agreement, keep, args
        self.write_config = write_config
        self.networks = {".": model, **({"ema": ema} if ema is not None else {})}
        self.best: Optional[str] = None  # name of the checkpoint that rotation must spare
        self.states: dict[str, Any] = {}  # by file name, what has a state_dict of plain numbers
        # Accelerate would save and load the wrapped model, whose names tell how it was wrapped
        accelerator.register_save_state_pre_hook(self._save_networks)
        accelerator.register_load_state_pre_hook(self._load_networks)

    def save(self, name: str, position: Optional[Position]) -> Path:
        """Write the checkpoint ``name``; every process must call it. A sound one of that name is left alone.

        Raises:
            OSError: in every process, if any of them can't write. Earlier checkpoints are intact.
        """
        place, beside = self.folder / name, self.folder / f".saving-{name}"
        sound = self.accelerator.is_main_process and place.exists() and find_fault(place) is None
        if self.agreement.any(sound):
            if self.accelerator.is_main_process:
                self._point("last", name)
            return place
        failure = ""
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
        if not self.agreement.any(bool(failure)):  # also waits for the folder
            try:
                self.accelerator.save_state(str(beside))
                self._save_own(beside, position)
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # torch and safetensors have their own for a full disk
                failure = str(error)
        if self.agreement.any(bool(failure)):
            raise self._failed(name, beside, failure)
        try:
            if self.accelerator.is_main_process:
                (beside / "args.yaml").write_text(yaml.safe_dump(self.args, sort_keys=False))
                _write_hashes(beside)
                self._set_aside(place)
                os.replace(beside, place)
                _sync(self.folder)
                self._point("last", name)
                self._rotate()
        except OSError as error:
            failure = str(error)
        if self.agreement.any(bool(failure)):
            raise self._failed(name, beside, failure)
        return place

    @property
    def newest(self) -> Optional[Path]:
        """The newest checkpoint, sound or not."""
        return max(_places(self.folder), default=None)

    def mark_best(self, name: str) -> None:
        """Spare this checkpoint from rotation, and point ``best`` to it."""
        self.best = name
        if self.accelerator.is_main_process and (self.folder / name).exists():
            self._point("best", name)

    def load(self, place: Path) -> Optional[Position]:
        """Put everything back as it was; the position of this process."""
        self.accelerator.load_state(str(place))  # weights_only=True, by Accelerate's default
        for name, state in self.states.items():
            state.load_state_dict(json.loads((place / f"{name}.json").read_text()))
        own = self.accelerator.process_index
        statistics = place / f"statistics-{own}.safetensors"
        if statistics.exists():
            saved = load_file(statistics)
            for sub, network in self.networks.items():
                for name, buffer in network.named_buffers():
                    buffer.copy_(saved[f"{sub}/{name}"])
        file = place / f"position-{own}.json"
        position: Optional[Position] = json.loads((file if file.exists() else place / "position-0.json").read_text())
        return position

    def clean(self, start: Optional[Path]) -> None:
        """Remove what an interrupted save left, and set aside what lies after ``start``: it is of another course."""
        if self.accelerator.is_main_process:
            for place in _places(self.folder):
                if start is None or place.name > start.name:
                    self._set_aside(place)
            for left in self.folder.glob(".saving-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _set_aside(self, place: Path) -> None:
        if place.exists():
            os.replace(place, self.folder / f"aside-{place.name}-{time.time_ns()}")

    def _rotate(self) -> None:
        for old in sorted(_places(self.folder))[: -self.keep]:
            if old.name != self.best:
                os.replace(old, old.with_name(f".saving-{old.name}"))  # never a half-removed checkpoint under its name
                shutil.rmtree(old.with_name(f".saving-{old.name}"), ignore_errors=True)

    def _point(self, link: str, name: str) -> None:
        beside = self.folder / f".saving-link-{link}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(name, target_is_directory=True)
        os.replace(beside, self.folder / link)

    def _failed(self, name: str, beside: Path, failure: str) -> OSError:
        if self.accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
        left = sorted(place.name for place in _places(self.folder))
        intact = f"the newest one, {left[-1]}, is intact" if left else "there is no earlier one"
        return OSError(
            f"checkpoint {name} can't be written to {self.folder} ({failure or 'another process failed'}); {intact}"
        )

    def _save_own(self, folder: Path, position: Optional[Position]) -> None:
        """What every process has for itself: its place in the data, and its norm statistics within an epoch."""
        own = self.accelerator.process_index
        if self.accelerator.is_main_process:  # as JSON: Accelerate would pickle it, and run what it loads
            for name, state in self.states.items():
                (folder / f"{name}.json").write_text(json.dumps(state.state_dict()))
        (folder / f"position-{own}.json").write_text(json.dumps(position))
        if self.accelerator.num_processes > 1:
            buffers = {
                f"{sub}/{name}": b.cpu() for sub, net in self.networks.items() for name, b in net.named_buffers()
            }
            save_file(buffers, folder / f"statistics-{own}.safetensors")

    def _save_networks(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        weights.clear()
        if not self.accelerator.is_main_process:
            return
        for sub, network in self.networks.items():
            folder = Path(output_dir) / sub
            folder.mkdir(exist_ok=True)
            tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            self.write_config(network, folder)

    def _load_networks(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        for sub, network in self.networks.items():
            load_weights(network, Path(input_dir) / sub / "model.safetensors")


def newest_sound(folder: Path) -> tuple[Optional[str], list[str]]:
    """The newest checkpoint whose files are those that were written, and why newer ones were left out."""
    faults: list[str] = []
    for place in sorted(_places(folder), reverse=True):
        fault = find_fault(place)
        if fault is None:
            return str(place), faults
        faults.append(f"{place}: {fault}")
    return None, faults


def _places(folder: Path) -> list[Path]:
    return [place for place in folder.glob("update-*") if place.is_dir()]


def find_fault(place: Path) -> Optional[str]:
    """What is wrong with a checkpoint's files; None if they are those that were written."""
    if not place.is_dir():
        return "there is no such folder"
    try:
        expected: dict[str, str] = dict(json.loads((place / HASHES).read_text()))
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
    """The options of the run that wrote this checkpoint."""
    args: dict[str, Any] = yaml.safe_load((place / "args.yaml").read_text())
    return args


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_hashes(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {str(file.relative_to(folder)): _digest(file) for file in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1))
    for path in [*files, folder / HASHES, *{file.parent for file in files}]:
        _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold it before it is renamed: a power cut must not leave an empty file under the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
