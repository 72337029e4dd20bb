"""What an image becomes, and how batches come from workers: the same under any number of workers and resumes."""

import atexit
import gc
import os
import signal
import textwrap
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
from timm.data import create_transform

from dg_timm._compat import end_loader_workers
from dg_timm.training.data.images import Collate, Images
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import MapSampler, SampleKey, StreamSampler
from dg_timm.training.data.seeding import seeded
from dg_timm.training.data.sources import load_splits
from tests.helpers.files import png, shards
from tests.helpers.scripts import ROOT, python

SIZE = (3, 32, 32)


AUGMENT = create_transform(SIZE, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel")


NAMES = [str(k) for k in range(10)]


def stream(folder, **options):
    return load_splits(str(folder), val_source="digits", streaming=True, label_names=NAMES, **options).train


def loader(split, workers, *, batch_size=8, transform=AUGMENT, seed=0, **options):
    order = StreamSampler(split.rows, batch_size, shuffle=True, buffer=16) if split.streamed else None
    order = order or MapSampler(split.size, batch_size, shuffle=True)
    images = Images(split, transform, NAMES, seed=seed)
    return Loader(order, images, Collate(batch_size, SIZE), workers=workers, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_and_resumes_change_no_image(tmp_path, streaming):
    folder = shards(tmp_path / "s", count=3, rows=12)
    split = load_splits(str(folder), val_source="digits", streaming=streaming, label_names=NAMES).train
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
    same = [images[SampleKey(0, 0, 7)][0] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], images[SampleKey(1, 0, 7)][0])
    assert not torch.equal(same[0], images[SampleKey(0, 0, 7, copy=1)][0])


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
    assert [int(batch.sample_mask.sum()) for batch in batches] == [50] * 7 + [10]


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
    assert batch.sample_mask.sum() == 4
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
    assert batch.sample_mask.sum() == 4
    assert batch.images.shape == (8, *SIZE)
    only = Images(damaged, AUGMENT, NAMES)
    assert [type(only[SampleKey(0, 0, row)]).__name__ for row in (1, 2)] == ["tuple", "Unreadable"]


def test_a_streamed_label_outside_the_range_is_named(tmp_path):
    split = stream(shards(tmp_path / "s", count=1, rows=3, label=12))
    with pytest.raises(
        ValueError, match=r"row [012] of shard 0 of the training split of .* has the label 12, outside 0..9"
    ):
        list(loader(split, 0).epoch(0))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class WhoDecodes(torch.utils.data.Dataset):
    """Rows that tell which process made them, and whether it would hear SIGTERM."""

    def __getitem__(self, key):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return os.getpid(), signal.SIGTERM in blocked and signal.SIGINT in blocked


class Made(NamedTuple):
    by: list[tuple[int, bool]]
    unreadable: tuple[str, ...] = ()
    row_errors: tuple[str, ...] = ()


def test_workers_do_not_hear_the_signals_that_stop_a_run_and_end_with_their_loader():
    own = Loader(MapSampler(8, 2), WhoDecodes(), Made, workers=2)
    made = [one for batch in own.epoch(0) for one in batch.by]
    workers = {process for process, _ in made}
    assert len(workers) == 2
    assert all(deaf for _, deaf in made)
    assert all(map(is_alive, workers))  # they stay for the next epoch
    assert {process for batch in own.epoch(1) for process, _ in batch.by} == workers
    own.close()
    assert not any(map(is_alive, workers))


def test_a_loader_that_is_gone_leaves_nothing_to_do_at_exit(monkeypatch):
    registered, unregistered = [], []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(atexit, "unregister", unregistered.append)
    own = loader(load_splits("digits").test, 0)
    assert len(registered) == 1
    del own
    gc.collect()
    assert unregistered == registered


def test_a_program_that_fails_in_an_epoch_ends_by_itself():
    """The traceback holds the iterator, whose workers are deaf to the SIGTERM that Python sends at its exit."""
    code = """
        from tests.training.test_loader import Loader, Made, MapSampler, WhoDecodes
        batches = Loader(MapSampler(8, 2), WhoDecodes(), Made, workers=2).epoch(0)
        next(batches)
        raise KeyError("a defect")
    """
    done = python("-c", textwrap.dedent(code), timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "KeyError: 'a defect'" in done.stderr


def test_without_torchs_private_names_the_workers_are_left_to_the_collector():
    end_loader_workers(object())
    own = Loader(MapSampler(8, 2), WhoDecodes(), Made, workers=1)
    ((worker, _), *_) = [one for batch in own.epoch(0) for one in batch.by]
    del own
    gc.collect()
    assert not is_alive(worker)
