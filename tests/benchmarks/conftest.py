import pytest
import torch


@pytest.fixture(autouse=True)
def _threads():
    """The commands set the number of threads of their process, which here is that of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
