"""Pure functions of the graph, against closed forms."""

import warnings

import pytest
import torch

from dg_timm.graph import edges


def test_the_threshold_cuts_what_is_below_and_keeps_the_rest_exactly():
    weight = torch.tensor([[0.3, -0.3, 0.1, -0.1, 0.2, 0.0]])
    cut = edges.apply_threshold(weight, torch.tensor([0.2]))
    assert torch.equal(cut, torch.tensor([[0.3, -0.3, 0.0, 0.0, 0.2, 0.0]]))


def test_threshold_zero_keeps_even_edges_of_weight_zero_open():
    weight = torch.zeros(1, 3, requires_grad=True)
    edges.apply_threshold(weight, torch.tensor([0.0])).sum().backward()
    assert torch.equal(weight.grad, torch.ones(1, 3))


def test_closed_edges_pass_their_gradient_straight_through():
    weight = torch.tensor([[0.5, 0.1]], requires_grad=True)
    (edges.apply_threshold(weight, torch.tensor([0.3])) * torch.tensor([[2.0, 7.0]])).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[2.0, 7.0]]))


@pytest.mark.parametrize("width", [edges.SURROGATE_WIDTH, 0.7])
def test_threshold_gradient_is_that_of_the_surrogate(width):
    weight = torch.tensor([[0.5, 0.1, -0.4]], dtype=torch.float64)
    threshold = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    edges.apply_threshold(weight, threshold, width).sum().backward()
    expected = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (weight * torch.sigmoid((weight.abs() - expected) / width)).sum().backward()
    torch.testing.assert_close(threshold.grad, expected.grad)


@pytest.mark.parametrize("learns", [True, False])
def test_values_do_not_depend_on_whether_gradients_are_wanted(learns):
    logits, scale = torch.randn(5, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    active = torch.tensor([True, False, True, True, False])[:, None]
    with torch.set_grad_enabled(learns):
        row = edges.edge_weights(logits, scale, torch.tensor([0.2], dtype=torch.float64), active)
    weight = torch.sigmoid(logits) * scale
    assert torch.equal(row == 0, (weight < 0.2) | ~active)
    torch.testing.assert_close(row, torch.where((weight >= 0.2) & active, weight, 0.0), rtol=1e-15, atol=1e-15)
    assert 0 < int((row[active[:, 0]] == 0).sum()) < 12


def test_a_weight_that_is_not_a_number_is_below_no_threshold():
    """A corrupt image must be seen, not become a prediction of a network with everything closed."""
    weight = torch.tensor([[float("nan"), 0.1]])
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            cut = edges.apply_threshold(weight, torch.tensor([9.0]))
        assert cut[0].isnan().tolist() == [True, False]
        assert edges.has_open_input(cut).item()


def test_edges_of_an_unreached_node_are_zero_and_still_learn():
    logits = torch.zeros(2, 3, requires_grad=True)
    row = edges.edge_weights(logits, None, torch.tensor([0.0]), torch.tensor([[True], [False]]))
    assert torch.equal(row, torch.tensor([[0.5] * 3, [0.0] * 3]))
    row.sum().backward()
    assert (logits.grad > 0).all()


def test_an_open_input_is_a_weight_other_than_zero():
    weights = torch.tensor([[0.0, 0.0], [0.0, -0.1], [float("nan"), 0.0]], requires_grad=True)
    found = edges.has_open_input(weights)
    assert found.tolist() == [[False], [True], [True]]
    assert not found.requires_grad


def test_the_adjacency_has_each_row_where_its_edges_lead():
    targets = [[1, 3], [2], [3]]
    rows = [torch.rand(2, 2), torch.rand(2, 1), torch.rand(2, 1)]
    alpha = edges.adjacency_matrix(rows, targets)
    assert alpha.shape == (2, 4, 4)
    assert torch.equal(alpha, alpha.triu(1))
    for source, (row, leads_to) in enumerate(zip(rows, targets, strict=True)):
        assert torch.equal(alpha[:, source, leads_to], row)
    assert int((alpha != 0).sum()) == 2 * sum(map(len, targets))
    more = edges.adjacency_matrix([torch.rand(2, len(t), 5) for t in targets], targets)  # further dimensions stay last
    assert more.shape == (2, 4, 4, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_the_weighted_sum_is_that_of_every_image(dtype, memory_format, learns):
    features = [torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)]
    weights = torch.randn(3, 4)
    with torch.set_grad_enabled(learns):
        z = edges.weighted_sum(features, weights)
    expected = torch.einsum("bn,nbchw->bchw", weights.to(dtype).double(), torch.stack(features).double())
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol={torch.bfloat16: 0.1}.get(dtype, 1e-5))


def test_the_weighted_sum_of_an_identity_chain_is_exact():
    features = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    assert torch.equal(edges.weighted_sum(features, torch.tensor([[0.0, 0.0, 1.0]] * 2)), features[-1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("learns", [True, False])
def test_the_weighted_sum_does_not_read_a_closed_edge(bad, learns):
    features = [torch.randn(3, 2, 4, 4) for _ in range(3)]
    weights = torch.rand(3, 3) + 0.5
    weights[1, 0] = weights[2, 2] = 0
    wanted = edges.weighted_sum(features, weights)
    features[0][1], features[2][2] = bad, bad
    with torch.set_grad_enabled(learns):
        assert torch.equal(edges.weighted_sum(features, weights), wanted)
        features[1][0] = bad  # its edge is open
        z = edges.weighted_sum(features, weights)
    assert not z[0].isfinite().any()
    assert z[1:].isfinite().all()


def test_a_trace_records_what_inference_computes():
    """``torch.jit.trace`` records with gradients on; the trace holds no straight-through terms."""

    def formula(weight, threshold):
        return edges.apply_threshold(weight, threshold)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated in newer torch
        traced = torch.jit.trace(formula, (torch.rand(2, 3), torch.tensor([0.5])))
    assert "sigmoid" not in str(traced.graph)
    weight = torch.rand(7, 3)
    assert torch.equal(traced(weight, torch.tensor([0.5])), torch.where(weight < 0.5, 0.0, weight))
