"""Which rows form a batch and what an image becomes: the same under any number of workers, processes and resumes."""

import datasets
import numpy as np
import pytest
import torch
from timm.data import create_transform

from dg_timm.training.data import loading
from dg_timm.training.data.loading import (
    Collate,
    Images,
    IndexOrder,
    Key,
    Loader,
    Share,
    StreamOrder,
    read_ahead,
    seeded,
)
from dg_timm.training.data.sources import load_splits
from tests.training.test_sources import png, shards

SIZE = (3, 32, 32)
AUGMENT = create_transform(SIZE, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel")
NAMES = [str(k) for k in range(10)]


def rows_of(order, epoch=0, position=None):
    return [[(key.shard, key.row, key.copy) for key in keys] for keys, _ in order.batches(epoch, position)]


def stream(folder, **options):
    return load_splits(str(folder), val_source=str(folder), streaming=True, label_names=NAMES, **options).train


# --------------------------------------------------------------------------- order


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [2, 4])
def test_an_update_has_the_same_rows_under_any_split(processes, micro):
    """100 rows, 16 an update: 6 updates, whoever shares them."""
    whole = rows_of(IndexOrder(100, 16, shuffle=True, multiple=16))
    parts = [rows_of(IndexOrder(100, micro, Share(p, processes), shuffle=True, multiple=16)) for p in range(processes)]
    accumulation = 16 // micro // processes
    for update, rows in enumerate(whole):
        shared = [row for part in parts for batch in part[update * accumulation :][:accumulation] for row in batch]
        assert sorted(shared) == sorted(rows)
    assert len(whole) == 6
    assert len({row for rows in whole for row in rows}) == 96


def test_epochs_differ_and_repeat_themselves():
    order = IndexOrder(50, 10, shuffle=True, seed=3)
    assert rows_of(order, 0) == rows_of(order, 0)
    assert rows_of(order, 0) != rows_of(order, 1)
    assert rows_of(order, 0) != rows_of(IndexOrder(50, 10, shuffle=True, seed=4), 0)


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_leaves_no_row_out(processes):
    batches = [batch for p in range(processes) for batch in rows_of(IndexOrder(23, 4, Share(p, processes)))]
    assert sorted(row for batch in batches for _, row, _ in batch) == list(range(23))


def test_repeated_augmentation_shows_fewer_rows_more_often():
    rows = [key for batch in rows_of(IndexOrder(60, 6, shuffle=True, multiple=6, repeats=3)) for key in batch]
    assert len(rows) == 60
    assert len({row for _, row, _ in rows}) == 20
    assert {copy for *_, copy in rows} == {0, 1, 2}


@pytest.mark.parametrize(("count", "processes"), [(5, 1), (5, 2), (5, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_are_dealt_out_with_nothing_twice_and_nothing_left(tmp_path, count, processes, shuffle):
    rows = stream(shards(tmp_path / "s", count=count, rows=7)).rows
    orders = [StreamOrder(rows, 4, Share(p, processes), shuffle=shuffle, buffer=6) for p in range(processes)]
    parts = [[key for batch in rows_of(order) for key in batch] for order in orders]
    together = sorted((shard, row) for part in parts for shard, row, _ in part)
    assert together == [(shard, row) for shard in range(count) for row in range(7)]
    if count >= processes:  # then nothing is read twice either: no shard in two processes
        owners = [{shard for shard, *_ in part} for part in parts]
        assert sum(map(len, owners)) == count


def test_a_stream_is_shuffled_anew_each_epoch(tmp_path):
    order = StreamOrder(stream(shards(tmp_path / "s", count=4, rows=8)).rows, 4, shuffle=True, buffer=10)
    assert rows_of(order, 0) == rows_of(order, 0)
    assert rows_of(order, 0) != rows_of(order, 1)
    assert rows_of(order, 0) != sorted(rows_of(order, 0))


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("count", [5, 1])
def test_a_stream_goes_on_from_every_position(tmp_path, count, process):
    order = StreamOrder(
        stream(shards(tmp_path / "s", count, rows=9)).rows, 2, Share(process, 2), shuffle=True, buffer=5
    )
    whole = list(order.batches(1))
    for done, (_, position) in enumerate(whole, start=1):
        assert [keys for keys, _ in order.batches(1, position)] == [keys for keys, _ in whole[done:]]


def test_a_stream_is_not_resumed_by_another_number_of_processes(tmp_path):
    rows = stream(shards(tmp_path / "s", 4)).rows
    position = next(iter(StreamOrder(rows, 2, Share(0, 2)).batches(0)))[1]
    with pytest.raises(ValueError, match=r"was begun by 2 processes.*go on with as many, not 1"):
        next(StreamOrder(rows, 2).batches(0, position))


def test_an_indexed_order_goes_on_with_another_number_of_processes():
    two = [list(IndexOrder(96, 4, Share(p, 2), shuffle=True, multiple=16).batches(0)) for p in range(2)]
    position = two[0][3][1]  # after two updates of 16
    one = rows_of(IndexOrder(96, 16, shuffle=True, multiple=16), 0, position)
    assert one == rows_of(IndexOrder(96, 16, shuffle=True, multiple=16))[2:]


def test_a_stream_keeps_a_bounded_number_of_rows(tmp_path, monkeypatch):
    order = StreamOrder(stream(shards(tmp_path / "s", count=6, rows=20)).rows, 4, shuffle=True, buffer=8)
    made = []
    monkeypatch.setattr(loading, "Key", lambda *args: made.append(args) or Key(*args))
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


# --------------------------------------------------------------------------- images


def loader(split, workers, *, batch_size=8, transform=AUGMENT, seed=0, **options):
    order = StreamOrder(split.rows, batch_size, shuffle=True, buffer=16) if split.streamed else None
    order = order or IndexOrder(split.size, batch_size, shuffle=True)
    images = Images(split, transform, NAMES, seed=seed)
    return Loader(order, images, Collate(batch_size, SIZE), workers=workers, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_and_resumes_change_no_image(tmp_path, streaming):
    folder = shards(tmp_path / "s", count=3, rows=12)
    split = load_splits(str(folder), val_source=str(folder), streaming=streaming, label_names=NAMES).train
    torch.manual_seed(1)
    alone = list(loader(split, 0).epoch(2))
    torch.manual_seed(2)
    workers = loader(split, 2)
    list(workers.epoch(1))
    shared = list(workers.epoch(2))
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.labels, b.labels)
    assert len({image.sum().item() for batch in alone for image in batch.images}) == 36  # each was augmented on its own
    first = loader(split, 2)
    interrupted = first.epoch(2)
    for _ in range(2):
        next(interrupted)
    rest = list(loader(split, 0).epoch(2, first.position))
    assert len(rest) == len(alone) - 2
    for a, b in zip(alone[2:], rest, strict=True):
        assert torch.equal(a.images, b.images)


def test_an_image_changes_with_epoch_and_copy_alone():
    images = Images(load_splits("digits").train, AUGMENT, NAMES, seed=5)
    same = [images[Key(0, 0, 7)][0] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], images[Key(1, 0, 7)][0])
    assert not torch.equal(same[0], images[Key(0, 0, 7, copy=1)][0])


def test_seeding_leaves_the_generators_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with seeded(1, 2):
        torch.rand(3)
        np.random.rand(3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


def test_a_loader_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    next(loader(load_splits("digits").test, 0).epoch(0))
    assert torch.equal(state, torch.get_rng_state())


def test_the_last_batch_is_filled_up_with_rows_that_do_not_count():
    batches = list(loader(load_splits("digits").test, 0, batch_size=50).epoch(0))
    assert [len(batch.images) for batch in batches] == [50] * 8
    assert [int(batch.weights.sum()) for batch in batches] == [50] * 7 + [10]


@pytest.fixture
def damaged(tmp_path):
    """Six digits, two of which can't be decoded: one truncated, one no image at all."""
    images = [{"bytes": png(k), "path": f"{k}.png"} for k in range(6)]
    images[2]["bytes"] = images[2]["bytes"][:60]
    images[4]["bytes"] = b"not an image"
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict({"image": images, "label": [0] * 6}, features=features).save_to_disk(tmp_path)
    rows = datasets.load_from_disk(str(tmp_path)).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "again")
    return load_splits(str(tmp_path / "again"), val_source="digits").train


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_row_that_can_not_be_read(damaged, tmp_path, streaming):
    damaged.rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "damaged.parquet", batch_size=3)
    split = load_splits(str(tmp_path / "damaged.parquet"), val_source="digits", streaming=streaming).train
    lines = []
    (batch,) = loader(split, 1, on_bad_image="skip", report=lines.append).epoch(0)
    assert batch.weights.sum() == 4
    assert len(lines) == 2
    with pytest.raises(ValueError, match=r"unreadable image in row \d( of shard \d)? of the training split of"):
        list(loader(split, 1).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(damaged, workers):
    with pytest.raises(
        ValueError, match=r"unreadable image in row [24] of the training split of .* \([24].png\): .*skip"
    ):
        list(loader(damaged, workers).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_reported_on_request(damaged, workers):
    lines = []
    own = loader(damaged, workers, on_bad_image="skip", report=lines.append)
    (batch,) = own.epoch(0)
    assert own.skipped == 2
    assert sorted(line.split("row ")[1][0] for line in lines) == ["2", "4"]
    assert batch.weights.sum() == 4
    assert batch.images.shape == (8, *SIZE)
    only = Images(damaged, AUGMENT, NAMES)
    assert [type(only[Key(0, 0, row)]).__name__ for row in (1, 2)] == ["tuple", "Unreadable"]


def test_a_streamed_label_outside_the_range_is_named(tmp_path):
    split = stream(shards(tmp_path / "s", count=1, rows=3, label=12))
    with pytest.raises(
        ValueError, match=r"row [012] of shard 0 of the training split of .* has the label 12, outside 0..9"
    ):
        list(loader(split, 0).epoch(0))
