"""No call leaves a trace: threads predict while others ask for adjacency and cost, and nothing of the model changes."""

import itertools
import threading

import pytest
import timm
import torch

import dg_timm
from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.graph.context import request
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import randomize, randomize_graph


@pytest.fixture
def model():
    made = randomize(randomize_graph(timm.create_model("dg_cifar_resnet20", num_classes=3), spread=5.0))
    with torch.no_grad():
        for router in routers(made).values():
            router.threshold.fill_(0.3)
    return made


def batches(count, seed):
    """Images of different sizes of batch, which take different paths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + k % 5, 3, 32, 32, generator=generator) * (1 + k) for k in range(count)]


def settings(model):
    """All that a call could change, and must not."""
    hooks = {
        name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks") and isinstance(value, dict)]
        for name, module in model.named_modules()
    }
    stages = {name: (s.execution, s.topology, s.grad_checkpointing) for name, s in graph_stages(model).items()}
    return (
        stages,
        {name: router.fixed_threshold for name, router in routers(model).items()},
        {name: module.training for name, module in model.named_modules()},
        hooks,
        {name: type(module) for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
    )


def together(*works):
    """Run functions in threads of their own; the first error is raised here."""
    errors = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("calls", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_threads_predict_in_sparse_execution_while_another_looks(model, calls):
    """The calls of three kinds, in turn, by one thread; two predict until it has made all of them."""
    dg_timm.set_execution(model, "sparse")
    images, asked = batches(10, seed=1), batches(6, seed=2)
    with torch.no_grad():
        wanted = [model(x) for x in images]
    alphas = [dg_timm.adjacency(model, x) for x in asked]
    costs = [dg_timm.cost(model, x) for x in asked]
    assert any((cost != costs[0][0]).any() for cost in costs)
    dense = randomize_copy(model)
    expected = ExpectedCost(dense)
    before, before_dense = settings(model), settings(dense)
    over, predicted = threading.Event(), [0, 0]

    def predict(own):
        def run():
            with torch.no_grad():
                while not over.is_set() or predicted[own] < 10:
                    k = predicted[own] % len(images)
                    assert torch.equal(model(images[k]), wanted[k])
                    predicted[own] += 1

        return run

    def look():
        try:
            for call in range(calls):
                k = call % len(asked)
                if call % 4 == 0:
                    assert torch.equal(dg_timm.cost(model, asked[k]), costs[k])
                elif call % 4 == 1:
                    found = dg_timm.adjacency(model, asked[k])
                    assert all(torch.equal(found[name], alphas[k][name]) for name in alphas[k])
                elif call % 4 == 2:
                    with dg_timm.record_adjacency(dense) as recorded:
                        dense(asked[k])
                    assert all(len(alpha) == len(asked[k]) for alpha in recorded.values())
                else:
                    with expected.recording(len(asked[k]), noise=1.0, seed=call) as recorded:
                        dense(asked[k])
                    assert recorded()[0].shape == (len(asked[k]),)
        finally:
            over.set()

    together(predict(0), predict(1), look)
    assert min(predicted) >= 10
    assert settings(model) == before
    assert settings(dense) == before_dense


def randomize_copy(model):
    """The same network in dense execution, with open gates: what records or learns a cost runs in no other."""
    twin = timm.create_model("dg_cifar_resnet20", num_classes=3, gates=True)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def test_threads_record_their_own_passes(model):
    """Each sees its batch, though both run one model at the same time."""
    images = batches(4, seed=3)
    wanted = [dg_timm.adjacency(model, x) for x in images]

    def record(k):
        def run():
            for _ in range(20):
                with torch.no_grad(), dg_timm.record_adjacency(model) as recorded:
                    model(images[k])
                assert all(torch.equal(recorded[name], wanted[k][name]) for name in wanted[k])

        return run

    together(*[record(k) for k in range(len(images))])


def test_threads_may_ask_at_several_thresholds(model):
    """A curve is of its own thresholds, whatever other threads predict or ask."""
    images = batches(2, seed=4)
    thresholds = [0.0, 0.2, 0.4, 2.0]
    wanted = dg_timm.threshold_curve(model, images, thresholds)
    with torch.no_grad():
        predictions = [model(x) for x in images]

    def curve():
        for _ in range(3):
            assert dg_timm.threshold_curve(model, images, thresholds) == wanted

    def predict():
        with torch.no_grad():
            for _ in range(30):
                assert all(torch.equal(model(x), p) for x, p in zip(images, predictions, strict=True))

    together(curve, curve, predict)


def test_a_model_that_trains_is_looked_at_through_a_view(model):
    """Its modes stay, its norms see nothing, and threads that train are not disturbed."""
    x = batches(3, seed=5)[2]
    wanted, cost = dg_timm.adjacency(model, x), dg_timm.cost(model, x)
    model.train()
    model.layer2[0].bn1.eval()  # a mode of its own
    before, state = settings(model), {key: value.clone() for key, value in model.state_dict().items()}
    over = threading.Event()

    def look():
        try:
            for _ in range(20):
                found = dg_timm.adjacency(model, x)
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
                assert torch.equal(dg_timm.cost(model, x), cost)
        finally:
            over.set()

    def watch():
        while not over.wait(0.001):  # a thread that never waits holds up the others
            assert all(module.training for name, module in model.named_modules() if name != "layer2.0.bn1")

    together(look, watch)
    assert settings(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(x).sum().backward()  # on the very parameters
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_what_fails_in_the_middle_leaves_everything_as_it_was(model, training, execution):
    dg_timm.set_execution(model, execution)
    dg_timm.set_threshold(model, 0.1)
    model.train(training)
    before = settings(model)
    other = randomize_copy(model)
    calls = [lambda bad: dg_timm.adjacency(model, bad), lambda bad: dg_timm.cost(model, bad),
             lambda bad: dg_timm.threshold_curve(model, [bad], [0.1, 0.2]),
             lambda bad: dg_timm.majority_topology(model, [bad])]  # fmt: skip
    for call, bad in itertools.product(calls, (torch.randn(1, 5, 32, 32), torch.randn(3, 32, 32))):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            call(bad)
        assert settings(model) == before
    handle = model.layer2[1].register_forward_pre_hook(lambda *_: 1 / 0)
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            call(torch.randn(2, 3, 32, 32))
    handle.remove()
    assert settings(model) == before
    assert request() == request().__class__()  # nothing is asked of the next call of this thread
    with pytest.raises(ZeroDivisionError), ExpectedCost(other).recording(1):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), dg_timm.record_adjacency(other):
        1 / 0  # noqa: B018
    assert request() == request().__class__()


def test_a_pass_that_was_interrupted_is_not_recorded_as_a_whole(model):
    x, more = batches(5, seed=6)[3:5]
    handle = model.layer3[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), dg_timm.record_adjacency(model) as recorded:
        with pytest.raises(ZeroDivisionError):
            model(more)
        handle.remove()
        assert list(recorded) == ["layer1", "layer2"]
        model(x)
    wanted = dg_timm.adjacency(model, x)
    assert recorded.keys() == wanted.keys()
    assert all(torch.equal(recorded[name], wanted[name]) for name in wanted)
