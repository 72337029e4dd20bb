"""The counts of a run: sums of an epoch, the best evaluation, and what the host reads of the last updates."""

import json
import math

import pytest
import torch

from dg_timm.training.loop.csv_tables import read_csv, write_csv
from dg_timm.training.loop.distributed import HostAllReduce
from dg_timm.training.loop.objective import Losses
from dg_timm.training.loop.progress import BestTracker, EpochSums, Progress
from dg_timm.training.loop.statistics import RunningStats, masked_sums


def test_only_a_better_evaluation_is_the_best():
    best = BestTracker()
    assert best.offer(10.0, 1, "one")
    assert not best.offer(10.0, 2, "two")
    assert not best.offer(math.nan, 3, "three")
    assert best.offer(10.5, 4, "four")
    assert best == BestTracker(10.5, 4, "four")


def test_the_means_of_an_epoch_are_over_its_images():
    sums = EpochSums()
    assert sums.means() == {"loss": 0.0}
    sums.add(6.0, {"top1": 100.0}, images=3, seconds=0.5)
    sums.add(2.0, {"top1": 100.0}, images=1, seconds=1.5)
    assert sums.means() == {"loss": 2.0, "top1": 50.0}
    assert sums.images_per_second == 2.0


def test_progress_comes_back_from_json():
    progress = Progress(epoch=2, evaluated=1, update=30, skipped=4)
    progress.sums.add(0.1, {"top1": 1 / 3}, images=7, seconds=0.25)
    progress.best.offer(12.5, 1, "update-00000015-epoch-0001")
    again = Progress()
    again.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert again == progress
    again.start_epoch()
    assert again.sums == EpochSums()
    assert progress.sums.images == 7  # no state is shared


def losses(*values: float) -> Losses:
    return Losses(torch.tensor(values), {"top1": torch.tensor([100.0] * len(values))})


def test_images_that_do_not_count_are_not_summed():
    sums = masked_sums(losses(1.0, 2.0, 7.0), torch.tensor([1.0, 1.0, 0.0]))
    assert sums.tolist() == [2.0, 3.0, 200.0]
    assert sums.dtype == torch.float64


def test_the_host_reads_the_sums_of_all_updates_once():
    stats, alone = RunningStats(), HostAllReduce()
    assert stats.collect(alone, 1) is None
    stats.add(masked_sums(losses(1.0, 3.0), torch.ones(2)), ("top1",), 0.1)
    stats.add(masked_sums(losses(5.0), torch.ones(1)), ("top1",), 0.2)
    found = stats.collect(alone, 1)
    assert (found.images, found.loss, found.metrics, found.rates) == (3, 9.0, {"top1": 300.0}, [0.1, 0.2])
    assert found.update_losses.tolist() == [2.0, 5.0]
    assert found.means() == {"top1": 100.0}
    assert found.first_not_finite() is None
    assert stats.collect(alone, 1) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_update_whose_loss_is_not_finite_is_found(bad):
    stats = RunningStats()
    for value in (1.0, bad, 2.0, bad):
        stats.add(masked_sums(losses(value), torch.ones(1)), ("top1",), 0.1)
    assert stats.collect(HostAllReduce(), 1).first_not_finite() == 1


def test_time_that_is_left_out_is_not_training():
    stats = RunningStats()
    stats.add(masked_sums(losses(1.0), torch.ones(1)), ("top1",), 0.1)
    stats.leave_out(1000.0)
    assert stats.collect(HostAllReduce(), 1).seconds < 0


def test_tables_come_back_as_they_were_written(tmp_path):
    rows = [{"epoch": 1, "loss": 0.1, "note": "größer"}, {"epoch": 2, "cost": 1e-30}]
    write_csv(tmp_path / "sub" / "table.csv", rows)
    assert read_csv(tmp_path / "sub" / "table.csv") == rows
    assert read_csv(tmp_path / "nowhere.csv") == []
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["table.csv"]
