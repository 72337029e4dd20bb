#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.14.1, two processes on CPUs (gloo): a plugin for FSDP2 gives DistributedDataParallel, silently.
#
# AcceleratorState looks at a plugin for FSDP (and at ACCELERATE_USE_FSDP) on accelerators alone. On CPUs the type stays
# MULTI_CPU, `prepare` wraps the network in DistributedDataParallel, and every process keeps all parameters. Nothing warns.
# torch's own fully_shard, in the same processes, shares the same network out. Who tests sharded training without GPUs
# through Accelerate therefore tests DDP, and does not see what a sharded checkpoint, average or evaluation gets wrong.
#
# Seen on x86-64: "2 MULTI_CPU DistributedDataParallel 1.0 0.5": processes, type, wrapper, share of the parameters that a
# process keeps by Accelerate, and by fully_shard. Fails if the line differs or a warning names FSDP.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.14.1 accelerate==1.15.0 numpy==2.2.6
cat > "$folder/shard.py" <<'PY'
import accelerate
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard

assert accelerate.__version__ == "1.15.0", accelerate.__version__


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = network()
whole = sum(p.numel() for p in model.parameters())
prepared, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
kept = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in prepared.parameters())
sharded = fully_shard(network())
shared = sum(p.to_local().numel() for p in sharded.parameters())
if accelerator.is_main_process:
    kind, wrapper = accelerator.distributed_type.value, type(prepared).__name__
    print(accelerator.num_processes, kind, wrapper, kept / whole, shared / whole)
accelerator.end_training()
PY
export OMP_NUM_THREADS=1
"$folder/venv/bin/torchrun" --standalone --nproc_per_node 2 "$folder/shard.py" > "$folder/out" 2> "$folder/err"
tail -1 "$folder/out"
[[ $(tail -1 "$folder/out") == "2 MULTI_CPU DistributedDataParallel 1.0 0.5" ]]
if grep -i fsdp "$folder/err"; then exit 1; fi
