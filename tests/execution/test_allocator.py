"""Memory of large maps: it comes back, is never shared, and is bounded."""

import gc
import threading

import pytest
import torch

import dg_timm
from dg_timm.execution import allocator
from tests.helpers.networks import static_and_dynamic

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty():
    """Start without memory that other tests gave back."""
    gc.collect()
    allocator.release()


def large_map(fill=0.0, mib=8):
    return allocator.empty_like(torch.empty(1, mib * MIB // 4)).fill_(fill)


def test_blocks_come_back_and_are_never_shared():
    like = torch.empty(4, 64, 80, 80)
    first = allocator.empty_like(like).fill_(1)
    second = allocator.empty_like(like).fill_(2)
    view, address = first[1], first.data_ptr()
    del first
    third = allocator.empty_like(like).fill_(3)
    assert (view == 1).all()  # a view holds its block
    assert (second == 2).all()
    assert third.data_ptr() != address
    del view
    gc.collect()
    assert allocator.empty_like(like).data_ptr() == address
    assert allocator.empty_like(like.contiguous(memory_format=torch.channels_last)).stride() == (409600, 1, 5120, 64)
    assert allocator.empty_like(like, 2).shape == (2, 64, 80, 80)


def test_blocks_may_come_back_while_one_is_taken():
    """The garbage collector frees maps at any moment, also in the midst of taking a block."""
    before = gc.get_threshold()
    held = [large_map(fill) for fill in range(3)]
    try:
        for turn in range(300):
            gc.set_threshold(2 + turn % 40)
            cycle = [large_map(100.0 + turn)]
            assert (cycle[0][0, ::4096] == 100.0 + turn).all()  # nobody else writes there
            assert cycle[0].data_ptr() not in [map_.data_ptr() for map_ in held]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert [float(map_[0, 0]) for map_ in held] == [0.0, 1.0, 2.0]
    assert all((map_ == map_[0, 0]).all() for map_ in held)
    assert 0 < allocator.cached_bytes() <= allocator.MAX_CACHED_BYTES


def test_threads_never_share_a_block():
    wrong = []

    def work(own):
        for turn in range(60):
            held = [large_map(own + turn, mib=4) for _ in range(3)]
            if any(not bool((map_ == own + turn).all()) for map_ in held):
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(1000.0 * k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_idle_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(allocator, "MAX_CACHED_BYTES", 16 * MIB)
    held = [large_map() for _ in range(6)]
    assert allocator.cached_bytes() == 0
    del held
    gc.collect()
    assert allocator.cached_bytes() == 16 * MIB


def test_release_gives_all_of_it_back():
    held = [large_map() for _ in range(3)]
    used = large_map(5.0)
    del held
    gc.collect()
    assert allocator.release() == 24 * MIB
    assert allocator.cached_bytes() == 0
    assert allocator.release() == 0
    assert (used == 5.0).all()


def test_small_maps_and_other_devices_are_torchs():
    small = allocator.empty_like(torch.empty(1, allocator.MIN_BYTES // 4 - 1))
    meta = allocator.empty_like(torch.empty(1, 8 * MIB, device="meta"))
    assert meta.is_meta
    del small
    gc.collect()
    assert allocator.cached_bytes() == 0


def test_memory_of_many_sizes_of_batch_stays_bounded():
    """A server whose batches are of any size keeps no more than the bound."""
    _, model = static_and_dynamic("dg_cifar_resnet20")  # a conversion: its batches are whole at first sight
    dg_timm.set_threshold(model, 0.0)
    with torch.no_grad():
        for turn in range(40):
            model(torch.randn(1 + turn * 7 % 64, 3, 32, 32))
            assert allocator.cached_bytes() <= allocator.MAX_CACHED_BYTES
    gc.collect()
    assert allocator.release() > 0
