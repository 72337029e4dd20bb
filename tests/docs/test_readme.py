"""The README is short, and every block in it runs without a network connection."""

import pytest
from PIL import Image

from tests.helpers.docs import ROOT, blocks, check_command, commands, run_page
from tests.helpers.scripts import python

README = ROOT / "README.md"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_python_blocks_print_what_the_page_shows(tmp_path):
    assert run_page(README, tmp_path) == 2
    assert (tmp_path / "wiring.png").stat().st_size > 1000
    assert (tmp_path / "my-network" / "model.safetensors").is_file()


def test_every_block_is_of_a_kind_that_is_checked():
    listed = blocks(README)
    assert {block.language for block in listed} == {"python", "bash", "text"}
    assert not any(block.is_network for block in listed)


@pytest.mark.parametrize(
    "words", [words for block in blocks(README) if block.language == "bash" for words in commands(block)], ids=" ".join
)
def test_every_command_exists_with_its_options(words):
    check_command(words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_run_as_they_stand(tmp_path):
    """Word for word and in their order, as a reader types them; `make` and `pip` have tests of their own."""
    Image.new("RGB", (40, 40), (200, 30, 60)).save(tmp_path / "picture.png")
    listed = [words for block in blocks(README) if block.language == "bash" for words in commands(block)]
    of_ours = [words[1:] for words in listed if words[0] == "dg-timm"]
    assert [words[0] for words in of_ours] == ["train", "predict", "show", "detect", "publish"]
    for words in of_ours:
        process = python("-m", "dg_timm", *words, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, timeout=1800)
        assert process.returncode == 0, (words, process.stdout + process.stderr)
    assert (tmp_path / "wiring.png").stat().st_size > 1000
