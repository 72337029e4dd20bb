"""Pure functions of the graph, against closed forms."""

import pytest
import torch

from dg_timm.graph import edges as graph


def test_close_cuts_below_the_threshold_and_keeps_the_rest_exactly():
    weight = torch.tensor([[0.3, -0.3, 0.1, -0.1, 0.2, 0.0]])
    closed = graph.close(weight, torch.tensor(0.2))
    assert torch.equal(closed, torch.tensor([[0.3, -0.3, 0.0, 0.0, 0.2, 0.0]]))


def test_threshold_zero_keeps_even_edges_of_weight_zero_open():
    weight = torch.zeros(1, 3, requires_grad=True)
    graph.close(weight, torch.tensor(0.0)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(1, 3))


def test_closed_edges_pass_their_gradient_straight_through():
    weight = torch.tensor([[0.5, 0.1]], requires_grad=True)
    (graph.close(weight, torch.tensor(0.3)) * torch.tensor([[2.0, 7.0]])).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[2.0, 7.0]]))


def test_threshold_gradient_is_that_of_the_surrogate():
    weight = torch.tensor([[0.5, 0.1, -0.4]], dtype=torch.float64)
    threshold = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    graph.close(weight, threshold).sum().backward()
    expected = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (weight * torch.sigmoid((weight.abs() - expected) / graph.SURROGATE_WIDTH)).sum().backward()
    torch.testing.assert_close(threshold.grad, expected.grad)


def test_edges_of_an_unreached_node_are_zero_and_still_learn():
    logits = torch.zeros(2, 3, requires_grad=True)
    row = graph.edge_weights(logits, None, torch.tensor(0.0), torch.tensor([[True], [False]]))
    assert torch.equal(row, torch.tensor([[0.5] * 3, [0.0] * 3]))
    row.sum().backward()
    assert (logits.grad > 0).all()


def test_column_and_adjacency_agree():
    rows = [torch.rand(2, 3), torch.rand(2, 2), torch.rand(2, 1)]
    alpha = graph.adjacency_matrix(rows)
    assert alpha.shape == (2, 4, 4)
    assert torch.equal(alpha, alpha.triu(1))
    for target in (1, 2, 3):
        assert torch.equal(graph.column(rows, target, list(range(target))), alpha[:, :target, target])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_aggregate_is_the_weighted_sum_of_every_image(dtype, memory_format):
    features = [torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)]
    weights = torch.randn(3, 4)
    z = graph.aggregate(features, weights)
    expected = torch.einsum("bn,nbchw->bchw", weights.to(dtype).double(), torch.stack(features).double())
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol={torch.bfloat16: 0.1}.get(dtype, 1e-5))


def test_aggregate_of_an_identity_chain_is_exact():
    features = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    assert torch.equal(graph.aggregate(features, torch.tensor([[0.0, 0.0, 1.0]] * 2)), features[-1])
