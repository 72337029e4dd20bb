#!/usr/bin/env bash
# torch 2.14.1: torch.jit.script leaves in the caller's own model what __prepare_scriptable__ returned, for good.
#
# A module may define __prepare_scriptable__ to hand the compiler a scriptable stand-in. The stand-in does not only go
# into the scripted program: it also takes the module's place in the eager model that was passed in, so that the model
# has other modules after scripting than before, although nothing was assigned. The stand-in therefore has to be a full
# substitute in eager mode: state dict, hooks, training and isinstance checks.
#
# Seen: "before: Chosen, after: StandIn; eager gave 2 and gives 1, the scripted program gives 1".
# Fails if the eager model keeps its module.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/model.py" <<'PY'
import warnings

import torch
from torch import nn

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
warnings.simplefilter("ignore")  # TorchScript is deprecated


class StandIn(nn.Module):
    def forward(self, x):
        return x + 1


class Chosen(nn.Module):
    def forward(self, x):
        return x + 2

    def __prepare_scriptable__(self):
        return StandIn()


model = nn.Sequential(Chosen())
before, answer = type(model[0]).__name__, model(torch.zeros(1)).item()
scripted = torch.jit.script(model)
after = type(model[0]).__name__
print(f"before: {before}, after: {after}; eager gave {answer:g} and gives {model(torch.zeros(1)).item():g}, "
      f"the scripted program gives {scripted(torch.zeros(1)).item():g}")
assert (before, after) == ("Chosen", "StandIn"), "torch.jit.script leaves the eager model alone now"
assert (answer, model(torch.zeros(1)).item(), scripted(torch.zeros(1)).item()) == (2, 1, 1)
PY
"$folder/venv/bin/python" "$folder/model.py"
