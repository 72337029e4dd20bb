#!/usr/bin/env bash
# torch 2.14.1, CPU, float32: torch.sigmoid gives the same number another result, by where it stands in a tensor.
#
# An image's row of a batch is an elementwise function of that row alone, and still differs in its last bit when the
# batch is cut: the numbers that do not fill a whole vector at the end of a tensor are rounded by other code. torch.exp,
# torch.tanh and 1 / (1 + torch.exp(-x)) give every number the same bits wherever it stands. Who promises that an image
# is predicted alike in any batch must not use torch.sigmoid on rows that do not fill vectors.
#
# Seen on x86-64: "torch.sigmoid: 2; torch.exp: 1; torch.tanh: 1; 1 / (1 + torch.exp(-x)): 1 results for one number".
# Fails if torch.sigmoid gives one result, or another of these functions two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.14.1 numpy==2.2.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import torch

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
numbers = torch.linspace(-4, 4, 1001)


def most_results(function):
    """The most results that one number gets, as it stands at each of 37 places of a tensor."""
    most = 0
    for number in numbers:
        row = function(number.expand(37).contiguous())
        most = max(most, len(set(row.tolist())))
    return most


found = {
    "torch.sigmoid": most_results(torch.sigmoid),
    "torch.exp": most_results(torch.exp),
    "torch.tanh": most_results(torch.tanh),
    "1 / (1 + torch.exp(-x))": most_results(lambda x: 1 / (1 + torch.exp(-x))),
}
print("; ".join(f"{name}: {count}" for name, count in found.items()), "results for one number")
assert found["torch.sigmoid"] == 2, "torch.sigmoid has changed"
assert all(count == 1 for name, count in found.items() if name != "torch.sigmoid"), "another function has changed"
PY
