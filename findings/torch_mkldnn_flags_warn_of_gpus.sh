#!/usr/bin/env bash
# torch 2.14.1, CPU build: "with torch.backends.mkldnn.flags(enabled=False)" warns of TF32 on Intel GPUs.
#
# The context manager sets every flag of oneDNN, those that were not named too, and setting allow_tf32 (to the value
# that it has) warns on a build without Intel GPUs. Assigning torch.backends.mkldnn.enabled = False warns of nothing and
# switches the same. So code that runs with warnings as errors, as many test suites do, can't use the documented way.
#
# Seen on x86-64: "flags(enabled=False): UserWarning: TF32 acceleration on top of oneDNN is available for Intel GPUs. ...;
# enabled = False: no warning". Fails if the first stays silent, or the second warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.14.1 numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__


def seen(switch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        switch()
    return [f"{one.category.__name__}: {str(one.message)[:70]}" for one in caught]


def by_assignment():
    torch.backends.mkldnn.enabled = False
    assert not torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = True


def by_context():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not torch.backends.mkldnn.enabled


assigned, context = seen(by_assignment), seen(by_context)
print("flags(enabled=False):", *(context or ["no warning"]), "...; enabled = False:", *(assigned or ["no warning"]))
assert any("TF32" in text and "Intel GPUs" in text for text in context), "the context manager is silent now"
assert not assigned, "the assignment warns now"
PY
