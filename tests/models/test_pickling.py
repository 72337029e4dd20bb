"""Whole models of the zoo cross processes: pickled, saved by torch.save, and sent to a spawned worker."""

import copy
import operator
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import timm
import torch

import dg_timm
from tests.helpers.networks import FAMILIES, ZOO, randomize, randomize_graph
from tests.helpers.scripts import python


def trained(name, **options):
    return randomize_graph(randomize(timm.create_model(name, num_classes=3, **options))).requires_grad_(False)


@pytest.mark.parametrize("names", [FAMILIES, pytest.param(ZOO, marks=pytest.mark.slow)], ids=["families", "zoo"])
def test_a_saved_model_opens_in_a_fresh_process(names, tmp_path):
    """It imports torch alone: the file names what else it needs."""
    x = torch.randn(2, 3, 64, 64)
    for name in names:
        model = trained(name)
        torch.save((model, x, model(x)), tmp_path / f"{name}.pt")
    script = f"""
import pathlib, torch
for file in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt")):
    model, x, wanted = torch.load(file, weights_only=False)
    assert torch.equal(model(x), wanted), file
    print(file.stem, type(model).__name__, model.provenance.from_scratch)
"""
    process = python("-c", script)
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == sorted(names)
    assert all(line[1].startswith("DG") and line[2] == "True" for line in lines)


def test_spawned_workers_predict(tmp_path):
    model, x = trained("dg_regnetx_002"), torch.randn(2, 3, 64, 64)
    features = trained_features()
    dg_timm.set_execution(model, "sparse")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert torch.equal(pool.submit(operator.call, model, x).result(), model(x))
        for got, wanted in zip(pool.submit(operator.call, features, x).result(), features(x), strict=True):
            assert torch.equal(got, wanted)


def trained_features():
    model = timm.create_model("dg_resnet18", features_only=True)
    return randomize_graph(randomize(model)).requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_the_same_class_and_network(name):
    model, x = trained(name), torch.randn(2, 3, 64, 64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm.utils.ModelEmaV3(model).module):
        assert type(again) is type(model)
        assert torch.equal(again(x), model(x))
        assert again.provenance == model.provenance
