"""Kill a training for real, at random moments, and check that nothing is lost.

    python -m tests.training.kill_and_resume                    # ten kills of each kind, two processes
    python -m tests.training.kill_and_resume --script detect.py --kills 3
    python -m tests.training.kill_and_resume --kills 1 --processes 1

A run is killed (-9: all processes, one of them, one of them where torchrun then restarts all by itself, or in the midst
of writing a checkpoint; or asked to stop by SIGTERM) and resumed until it ends. Its weights, average, optimizer and
random generators must then be, bit for bit, those of a run that nobody touched, and every checkpoint that had been
reported must be there and sound.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from dg_timm.training.loop.checkpoints import find_fault, latest_valid
from tests.helpers.scripts import command, one_thread

KINDS = ("all", "one", "writing", "term", "elastic")
CLASSIFY = (
    "--data digits --train-limit 480 --val-limit 64 --image-size 32 --hflip 0 --model dg_test_resnet --drop 0.1 "
    "--drop-path 0.1 --epochs 3 --batch-size 32 --micro-batch 8 --opt adamw --lr 1e-3 --warmup-epochs 1 --mixup 0.2 "
    "--ema-decay 0.9 --save-every 4 --keep 3 --workers 1 --log-every 3"
)
DETECT = (
    "--data digits --train-limit 48 --val-limit 6 --model dg_test_resnet --min-size 80 96 --max-size 128 "
    "--fpn-channels 8 --anchor-size 8 --roi-batch 16 --photometric 0.5 --crop 0.5 --hflip 0.5 --epochs 2 "
    "--batch-size 4 --micro-batch 2 --opt adamw --lr 1e-3 --ema-decay 0.9 --save-every 4 --keep 3 --workers 1 "
    "--log-every 3 --pictures 0"
)
OPTIONS = {"train.py": shlex.split(CLASSIFY), "detect.py": shlex.split(DETECT)}


def start(output: Path, processes: int, restarts: int = 0, script: str = "train.py") -> subprocess.Popen[str]:
    """Start a run, or go on with it; its output goes to a file beside its folder."""
    words = command(
        script, *OPTIONS[script], "--output", output, "--resume", "auto", processes=processes, restarts=restarts
    )
    # restarted ranks otherwise find the addresses of the dead ones in the launcher's store and hang (gloo, torch 2.14)
    env = one_thread({"HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    with (output.parent / f"{output.name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, encoding="utf-8", env=env, start_new_session=True)


def trainers(process: subprocess.Popen[str]) -> list[int]:
    """Find the process ids of the ranks: what runs the script and has no such parent but the launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                group = os.getpgid(int(entry.name))
            except (OSError, ValueError):
                continue
            is_script = any(word.endswith((b"train.py", b"detect.py")) for word in words[:3])
            if is_script and group and parent in (process.pid, os.getpid()):
                found.append(int(entry.name))
    return found


def kill(process: subprocess.Popen[str], kind: str, output: Path, rng: random.Random) -> str:
    """Wait for a random moment of training and kill; return what was done."""
    deadline = time.monotonic() + 120
    checkpoints = output / "checkpoints"
    while not trainers(process) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if kind == "writing":
        wait = rng.randrange(1, 6)  # let some saves pass
        seen: set[str] = set()
        while process.poll() is None and time.monotonic() < deadline:
            saving = {p.name for p in checkpoints.glob(".saving-update-*")} if checkpoints.exists() else set()
            seen |= saving
            if saving and len(seen) >= wait:
                time.sleep(rng.random() * 0.03)
                break
            time.sleep(0.001)
    else:
        while process.poll() is None and time.monotonic() < deadline and not list(checkpoints.glob("update-*")):
            time.sleep(0.01)
        time.sleep(rng.random() * 3)
    if process.poll() is not None:
        return "ended before it was hit"
    ranks = trainers(process)
    newest, _ = latest_valid(checkpoints)
    if kind == "one":
        victim = rng.choice(ranks)
        os.kill(victim, signal.SIGKILL)
        process.wait(90)
    elif kind == "elastic":
        os.kill(rng.choice(ranks), signal.SIGKILL)
        if process.wait(300) != 0:
            raise SystemExit(f"torchrun did not go on by itself:\n{log_of(output)[-3000:]}")
    elif kind == "term":
        os.kill(process.pid, signal.SIGTERM)
        process.wait(90)
        if "Go on with" not in log_of(output):
            raise SystemExit(f"stopped without saving:\n{log_of(output)[-3000:]}")
    else:
        os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait(90)
    after, _ = latest_valid(checkpoints)
    if newest is None or after is None or Path(after).name < Path(newest).name:
        raise SystemExit(f"{kind}: {newest} was lost; the newest is {after}")
    return f"{kind}: killed {len(ranks)} rank(s) with {sorted(p.name for p in checkpoints.glob('update-*'))[-1:]}"


def state(output: Path, processes: int) -> dict[str, str]:
    """Hashes of what the last checkpoint holds."""
    hashes: dict[str, str] = json.loads((output / "checkpoints" / "last" / "hashes.json").read_text(encoding="utf-8"))
    kept = ("model.safetensors", "ema/model.safetensors", "optimizer.bin", "schedule.json")
    kept += tuple(f"random_states_{rank}.pkl" for rank in range(processes))
    return {name: hashes[name] for name in kept}


def finish(output: Path, processes: int, script: str = "train.py") -> None:
    """Let a run end, from the newest sound checkpoint that there is: none may be lost."""
    newest, _ = latest_valid(output / "checkpoints")
    before = len(log_of(output))
    process = start(output, processes, script=script)
    if process.wait(300) != 0:
        raise SystemExit(f"resuming failed:\n{log_of(output)[-3000:]}")
    said = (f"going on from {newest}:", f"{output} is trained already") if newest else ("starting afresh",)
    if not any(line in log_of(output)[before:] for line in said):
        raise SystemExit(f"it should have said {' or '.join(said)!r}:\n{log_of(output)[before:]}")


def log_of(output: Path) -> str:
    log = output.parent / f"{output.name}.log"
    return log.read_text(encoding="utf-8") if log.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=tuple(OPTIONS), default="train.py")
    parser.add_argument("--kills", type=int, default=10, help="number of kills of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--each", type=int, default=2, help="times that a run is killed before it may end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "untouched"
        finish(reference, args.processes, args.script)
        expected = state(reference, args.processes)
        hits = 0
        for kind in args.kinds:
            done = 0
            for attempt in range(20 * args.kills):
                if done >= args.kills:
                    break
                output = Path(scratch) / f"{kind}-{attempt}"
                for _ in range(1 if kind == "elastic" else args.each):
                    process = start(output, args.processes, restarts=2 * (kind == "elastic"), script=args.script)
                    what = kill(process, kind, output, rng)
                    before = {p.name for p in (output / "checkpoints").glob("update-*")}
                    faults = [f for p in before if (f := find_fault(output / "checkpoints" / p)) is not None]
                    if faults:
                        raise SystemExit(f"{what}: unsound checkpoints {faults}")
                    done += not what.startswith("ended")
                    print(what, flush=True)
                finish(output, args.processes, args.script)
                found = state(output, args.processes)
                if found != expected:
                    wrong = [name for name in expected if found[name] != expected[name]]
                    raise SystemExit(f"{output.name}: {wrong} differ from the run that nobody touched")
            hits += done
        print(f"{hits} kills in {args.processes} process(es); every resumed run ended bit for bit as the untouched one")


if __name__ == "__main__":
    main()
