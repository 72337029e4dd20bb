#!/usr/bin/env bash
# torch 2.14.1, timm 1.0.31, CPU, glibc: after the first updates a training still takes most of its memory anew from the
# kernel in every update, page by page.
#
# torch has no pool for CPU tensors: each feature is malloc'd and freed. glibc raises its mmap threshold as large blocks
# are freed, which is meant to end this, and in a training it does not. The same training under MALLOC_MMAP_MAX_=0
# MALLOC_TRIM_THRESHOLD_=-1 takes no page anew, and its losses are equal bit for bit. What that is worth in time depends on
# the kernel and the machine: an update of EfficientNet-Lite0 (batch 64, 112 px) took 4.1 to 5.1 s with glibc's own settings
# and 1.5 to 1.6 s with these, on one thread of a virtual machine that did other work, too (n = 4).
#
# Seen on x86-64, glibc 2.36: "page faults an update, glibc's own settings: 37636, keeping: 0; losses equal". Fails if the
# first falls below 20,000 (80 MiB), the second is above a tenth of it, or the losses differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.2.6
cat > "$folder/train.py" <<'PY'
import resource

import timm
import torch

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
torch.manual_seed(0)
torch.set_num_threads(1)
model = timm.create_model("mobilenetv2_100", num_classes=10).train()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
images, labels = torch.randn(32, 3, 112, 112), torch.randint(10, (32,))
losses, faults = [], []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]), *map(float.hex, losses))
PY
unset MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ MALLOC_MMAP_THRESHOLD_ GLIBC_TUNABLES
read -r own losses <<< "$("$folder/venv/bin/python" -W ignore "$folder/train.py")"
read -r keeping same <<< "$(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 "$folder/venv/bin/python" -W ignore "$folder/train.py")"
echo "page faults an update, glibc's own settings: $own, keeping: $keeping;" \
    "losses $([ "$losses" = "$same" ] && echo equal || echo differ)"
[ "$own" -ge 20000 ] && [ "$keeping" -le $((own / 10)) ] && [ "$losses" = "$same" ]
