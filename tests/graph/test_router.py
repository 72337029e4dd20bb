"""A router: which edges it weighs, in which order, by which threshold, and through which layer."""

import threading

import pytest
import torch
from torch import nn

from dg_timm import set_threshold
from dg_timm.graph.context import request, requesting
from dg_timm.graph.router import Router
from dg_timm.graph.topology import complete
from tests.helpers.stages import images, make_stage

SPARSE_TOPOLOGY = [[], [0], [0], [1], [2], [0, 3, 4]]


def random_router(topology, node=0, **options):
    router = Router(5, node, topology, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
        router.threshold.fill_(0.1)
    return router


@pytest.mark.parametrize(
    ("topology", "node", "targets", "in_degrees"),
    [
        (complete(3), 0, [1, 2, 3, 4], [1, 2, 3, 4]),
        (complete(3), 3, [4], [4]),
        (SPARSE_TOPOLOGY, 0, [1, 2, 5], [1, 1, 3]),
        (SPARSE_TOPOLOGY, 2, [4], [1]),
    ],
)
def test_it_weighs_the_edges_that_there_are_in_the_order_of_their_targets(topology, node, targets, in_degrees):
    router = random_router(topology, node)
    assert router.targets == targets
    pooled = torch.randn(6, 5)
    row = router(pooled)
    assert row.shape == (6, len(targets))
    weight = torch.sigmoid(router.fc(pooled)) * router.scale
    torch.testing.assert_close(row, torch.where(weight.abs() < 0.1, 0.0, weight))
    assert router.initial_scale(identity=False).tolist() == pytest.approx([2 / degree for degree in in_degrees])
    assert router.initial_scale(identity=True).tolist() == [2.0 * (target == node + 1) for target in targets]


def test_a_fresh_node_gets_the_mean_of_its_predecessors():
    for node, topology in ((0, complete(3)), (2, complete(3)), (0, SPARSE_TOPOLOGY)):
        row = Router(5, node, topology)(torch.randn(2, 5))
        wanted = torch.tensor(
            [1 / len(topology[target]) for target in range(len(topology)) if node in topology[target]]
        )
        assert torch.equal(row, wanted.expand(2, -1))


def test_without_a_scale_the_weights_are_the_papers():
    router = random_router(complete(3), edge_scale=False)
    assert "scale" not in dict(router.named_parameters())
    pooled = torch.randn(4, 5)
    weight = torch.sigmoid(router.fc(pooled))
    torch.testing.assert_close(router(pooled), torch.where(weight < 0.1, 0.0, weight))


def test_a_removed_node_has_no_edges():
    router = random_router(complete(3))
    row = router(torch.randn(3, 5), torch.tensor([[True], [False], [True]]))
    assert (row[1] == 0).all()
    assert (row[[0, 2]] != 0).any()


def test_it_calls_its_layer():
    """Adapters, quantized layers and hooks take part (peft, torch.ao)."""

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 3

    router, pooled = random_router(complete(3)), torch.randn(4, 5)
    seen = []
    router.fc.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    plain = router.compute_logits(pooled)
    shifted = Shifted(5, 4)
    shifted.load_state_dict(router.fc.state_dict())
    router.fc = shifted
    torch.testing.assert_close(router.compute_logits(pooled), plain + 3)
    assert seen == [(4, 4)]


def test_the_threshold_of_a_call_comes_before_the_set_one_and_that_before_the_learned_one():
    router = random_router(complete(3))
    assert router.effective_threshold() is router.threshold
    router.fixed_threshold = 0.0
    assert router.effective_threshold().tolist() == [0.0]
    with requesting(threshold=0.7):
        assert router.effective_threshold().tolist() == pytest.approx([0.7])
        with requesting(execution="dense"):  # asks for something more
            assert router.effective_threshold().tolist() == pytest.approx([0.7])
    assert router.effective_threshold().tolist() == [0.0]
    assert router.threshold.shape == (1,)
    assert "fixed_threshold" not in router.state_dict()


def test_requests_end_with_their_block_and_stay_in_their_thread():
    elsewhere = []

    def interrupted():
        with requesting(threshold=0.7):
            thread = threading.Thread(target=lambda: elsewhere.append(request().threshold))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert elsewhere == [None]
    assert request().threshold is None


def test_a_threshold_of_a_call_is_right_in_every_execution():
    stage, x = make_stage("shortcut", 4), images("shortcut")
    set_threshold(stage, 0.4)
    with torch.no_grad():
        wanted = stage(x)
        set_threshold(stage, None)
        assert not torch.allclose(stage(x), wanted)
        for stage.execution in ("dense", "sparse", "fixed"):
            with requesting(threshold=0.4):
                torch.testing.assert_close(stage(x), wanted)
