"""What networks do image by image, against written-out definitions; and rules that leave blocks out."""

import numpy as np
import pytest
import timm
import torch
from scipy import stats

import dg_timm
from dg_timm.analysis.counting import count_costs
from dg_timm.budget.curve import Observed
from dg_timm.experiments.image_costs import Images, budget_rows, cascade_rows, certainty_rows, weigh_images
from dg_timm.experiments.reductions import last_blocks, random_blocks

N = 200


@pytest.fixture
def observed():
    """A cheap pass that is right where it is sure, and a dear one that is always right."""
    labels = torch.arange(N) % 3
    sure = torch.linspace(0.1, 6, N)
    wrong = sure < 1
    guess = torch.where(wrong, (labels + 1) % 3, labels)
    logits = torch.nn.functional.one_hot(guess, 3) * sure[:, None]
    nothing = torch.zeros(N)
    first = Observed(torch.full((N,), 0.5), logits, ~wrong, nothing)
    second = Observed(
        torch.ones(N), torch.nn.functional.one_hot(labels, 3) * 8.0, torch.ones(N, dtype=torch.bool), nothing
    )
    return {0.5: first, 1.0: second}, Images((), labels, (6 - sure).double()), wrong


def test_a_row_for_every_budget(observed):
    found, images, wrong = observed
    cheap, dear = budget_rows(found, images)
    assert cheap["top1"] == pytest.approx(100 * (1 - wrong.double().mean().item()))
    assert (cheap["cost"], dear["cost"], dear["top1"]) == (0.5, 1.0, 100.0)
    assert cheap["rank_correlation"] == 0  # every image costs the same


def test_a_cascade_is_judged_on_images_that_it_was_not_chosen_on(observed):
    found, images, wrong = observed
    (row,) = cascade_rows(found, images, [0.3, 0.75])  # 0.3 can't be had
    assert row["how"] == "cascade 0.75"
    assert row["top1"] > 100 * (1 - wrong.double().mean().item())
    assert row["cost"] <= 0.76
    order = torch.cat([torch.arange(1, N, 2), torch.arange(0, N, 2)])
    flipped = {budget: one._replace(right=one.right.clone()) for budget, one in found.items()}
    flipped[1.0].right[order[: N // 2]] = False  # of odd images alone: the choice made on even ones stays
    (other,) = cascade_rows(flipped, images, [0.75])
    assert other["top1"] < row["top1"]


def test_the_least_sure_tenth_runs_again(observed):
    found, images, wrong = observed
    rows = certainty_rows(found, images)
    assert [row["cost"] for row in rows] == pytest.approx([0.6] * len(rows))
    again = np.zeros(N)
    again[: N // 10] = 1.0
    expected = stats.spearmanr(0.5 + again, images.difficulty.numpy()).statistic
    assert rows[0]["rank_correlation"] == pytest.approx(expected)
    assert rows[0]["top1"] == pytest.approx(100 * (1 - wrong[N // 10 :].sum().item() / N))


def test_difficulty_is_the_static_loss():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), (torch.randn(1, 3, 32, 32), torch.tensor([2]))]
    images = weigh_images(model, batches)
    with torch.no_grad():
        own = [-model(x).log_softmax(1)[torch.arange(len(y)), y] for x, y in batches]
    torch.testing.assert_close(images.difficulty, torch.cat(own))
    assert images.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("choose", [last_blocks, random_blocks])
def test_blocks_are_left_out_until_the_cost_is_met(choose):
    model = dg_timm.dynamize(timm.create_model("tf_efficientnet_lite0"), gates=True)
    chosen = choose(model, 0.8, 3)
    costs = count_costs(model)
    saved = [
        costs.stages[name].blocks[node - 1] / costs.static_total for name, nodes in chosen.items() for node in nodes
    ]
    assert 1 - sum(saved) <= 0.8 < 1 - sum(saved) + max(saved)
    assert choose(model, 1.0, 3) == {}
    if choose is last_blocks:
        assert all(nodes == list(range(nodes[0], max(nodes) + 1)) for nodes in chosen.values())
    else:
        assert choose(model, 0.8, 3) == chosen != choose(model, 0.8, 4)
