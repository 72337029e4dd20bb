"""Which rows form a batch: the same under any number of processes and resumes."""

import pytest

from dg_timm._errors import BadState
from dg_timm.training.data import samplers
from dg_timm.training.data.prefetch import read_ahead
from dg_timm.training.data.samplers import MapSampler, Rank, SampleKey, StreamSampler
from dg_timm.training.data.sources import load_splits
from tests.helpers.files import shards

NAMES = [str(k) for k in range(10)]


def rows_of(order, epoch=0, position=None):
    return [[(key.shard, key.row, key.copy) for key in keys] for keys, _ in order.batches(epoch, position)]


def stream(folder, **options):
    return load_splits(str(folder), val_source="digits", streaming=True, label_names=NAMES, **options).train


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [2, 4])
def test_an_update_has_the_same_rows_under_any_split(processes, micro):
    """100 rows, 16 an update: 6 updates, whoever shares them."""
    whole = rows_of(MapSampler(100, 16, shuffle=True, multiple=16))
    parts = [rows_of(MapSampler(100, micro, Rank(p, processes), shuffle=True, multiple=16)) for p in range(processes)]
    accumulation = 16 // micro // processes
    for update, rows in enumerate(whole):
        shared = [row for part in parts for batch in part[update * accumulation :][:accumulation] for row in batch]
        assert sorted(shared) == sorted(rows)
    assert len(whole) == 6
    assert len({row for rows in whole for row in rows}) == 96


def test_epochs_differ_and_repeat_themselves():
    order = MapSampler(50, 10, shuffle=True, seed=3)
    assert rows_of(order, 0) == rows_of(order, 0)
    assert rows_of(order, 0) != rows_of(order, 1)
    assert rows_of(order, 0) != rows_of(MapSampler(50, 10, shuffle=True, seed=4), 0)


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_leaves_no_row_out(processes):
    batches = [batch for p in range(processes) for batch in rows_of(MapSampler(23, 4, Rank(p, processes)))]
    assert sorted(row for batch in batches for _, row, _ in batch) == list(range(23))


def test_repeated_augmentation_shows_fewer_rows_more_often():
    rows = [key for batch in rows_of(MapSampler(60, 6, shuffle=True, multiple=6, repeats=3)) for key in batch]
    assert len(rows) == 60
    assert len({row for _, row, _ in rows}) == 20
    assert {copy for *_, copy in rows} == {0, 1, 2}


@pytest.mark.parametrize(("count", "processes"), [(5, 1), (5, 2), (5, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_are_dealt_out_with_nothing_twice_and_nothing_left(tmp_path, count, processes, shuffle):
    rows = stream(shards(tmp_path / "s", count=count, rows=7)).rows
    orders = [StreamSampler(rows, 4, Rank(p, processes), shuffle=shuffle, buffer=6) for p in range(processes)]
    parts = [[key for batch in rows_of(order) for key in batch] for order in orders]
    together = sorted((shard, row) for part in parts for shard, row, _ in part)
    assert together == [(shard, row) for shard in range(count) for row in range(7)]
    if count >= processes:  # then nothing is read twice either: no shard in two processes
        owners = [{shard for shard, *_ in part} for part in parts]
        assert sum(map(len, owners)) == count


def test_a_stream_is_shuffled_anew_each_epoch(tmp_path):
    order = StreamSampler(stream(shards(tmp_path / "s", count=4, rows=8)).rows, 4, shuffle=True, buffer=10)
    assert rows_of(order, 0) == rows_of(order, 0)
    assert rows_of(order, 0) != rows_of(order, 1)
    assert rows_of(order, 0) != sorted(rows_of(order, 0))


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("count", [5, 1])
def test_a_stream_goes_on_from_every_position(tmp_path, count, process):
    order = StreamSampler(
        stream(shards(tmp_path / "s", count, rows=9)).rows, 2, Rank(process, 2), shuffle=True, buffer=5
    )
    whole = list(order.batches(1))
    for done, (_, position) in enumerate(whole, start=1):
        assert [keys for keys, _ in order.batches(1, position)] == [keys for keys, _ in whole[done:]]


def test_a_stream_is_not_resumed_by_another_number_of_processes(tmp_path):
    rows = stream(shards(tmp_path / "s", 4)).rows
    position = next(iter(StreamSampler(rows, 2, Rank(0, 2)).batches(0)))[1]
    with pytest.raises(BadState, match=r"2 processes began this epoch of a stream.*go on with as many, not 1"):
        next(StreamSampler(rows, 2).batches(0, position))


def test_an_indexed_order_goes_on_with_another_number_of_processes():
    two = [list(MapSampler(96, 4, Rank(p, 2), shuffle=True, multiple=16).batches(0)) for p in range(2)]
    position = two[0][3][1]  # after two updates of 16
    one = rows_of(MapSampler(96, 16, shuffle=True, multiple=16), 0, position)
    assert one == rows_of(MapSampler(96, 16, shuffle=True, multiple=16))[2:]


def test_a_stream_keeps_a_bounded_number_of_rows(tmp_path, monkeypatch):
    order = StreamSampler(stream(shards(tmp_path / "s", count=6, rows=20)).rows, 4, shuffle=True, buffer=8)
    made = []
    monkeypatch.setattr(samplers, "SampleKey", lambda *args: made.append(args) or SampleKey(*args))
    batches = order.batches(0)
    used = 0
    for keys, _ in batches:
        used += len(keys)
        assert len(made) - used <= 3 * 8 + 1
    assert used == 120


def test_reading_ahead_hands_on_errors_and_ends_its_thread():
    def items():
        yield 1
        raise OSError("the network is gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the network is gone"):
        next(ahead)
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    ahead = read_ahead(source := endless())
    assert next(ahead) == 0
    ahead.close()
    source.close()
    assert closed
