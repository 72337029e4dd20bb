"""detection_cost.py: the paper's Table 2, and detectors that are timed in turn. No time is looked at."""

import json

import pytest
import timm

import dg_timm
from dg_timm.benchmarks import detection as cost
from dg_timm.detection.backbone import STRIDES


@pytest.mark.parametrize("backbone", ["dg_resnet50", "dg_resnet101", "dg_resnext50_32x4d"])
def test_the_papers_cost(backbone):
    """Table 2: GFLOPs at 800 x 1333, two a multiply-add, within 1.5 %."""
    for name, place in ((backbone.removeprefix("dg_"), 0), (backbone, 1)):
        model = timm.create_model(name, features_only=True, device="meta")
        assert set(STRIDES) <= set(model.feature_info.reduction())
        flops = 2e-9 * dg_timm.complexity(model, (3, 800, 1333)).multiply_adds
        assert flops == pytest.approx(cost.TABLE_2[backbone.removeprefix("dg_")][place], rel=0.015)


def test_the_table_shows_how_far_the_paper_is(capsys, tmp_path):
    assert cost.main(["--backbones", "resnet50", "--json", str(tmp_path / "cost.json")]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.count("paper") == 2
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[0], cells[2], cells[5]) == ("resnet50", "174", "176")
    assert all(abs(float(cell.removesuffix(" %"))) < 1.5 for cell in (cells[3], cells[6]))
    result = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert result["command"].startswith("train_scripts/detection_cost.py --backbones resnet50")
    assert result["flops"][0]["dynamic"] > result["flops"][0]["static"]
    assert result["times"] == []
    assert "torch" in result["hardware"]


def test_a_size_that_the_paper_has_not_is_compared_with_nothing():
    row = {"backbone": "resnet50", "static": 174.0, "dynamic": 176.0}
    assert cost.flops_cells(row, [480, 640]) == ["resnet50", "174.0", None, None, "176.0", None, None]
    assert cost.flops_cells({**row, "backbone": "resnet18"}, [800, 1333])[2] is None


def test_detectors_are_timed_in_turn(capsys, tmp_path):
    command = ["--backbones", "resnet18", "--size", "64", "96", "--time", "--rounds", "2"]
    assert cost.main([*command, "--json", str(tmp_path / "times.json")]) == 0
    rows = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))["times"]
    assert [row["execution"] for row in rows] == [
        "static", "dense, identity", "sparse, identity", "sparse, 50 % of the blocks removed"
    ]  # fmt: skip
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert capsys.readouterr().out.count("| resnet18 |") == 1 + 4


def test_a_conversion_that_detects_something_else_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(cost, "_same", lambda found, expected: False)
    assert cost.main(["--backbones", "resnet18", "--size", "64", "96", "--time", "--rounds", "2"]) == 2
    assert "dg_resnet18 does not detect what resnet18 does in dense execution" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "error"),
    [(["--backbones", "dg_resnet18"], "dg_resnet18 is not a static timm model"),
     (["--backbones", "nothing"], "nothing is not a static timm model"),
     (["--backbones", "vit_tiny_patch16_224"], "vit_tiny_patch16_224 can't become dynamic"),
     (["--time", "--rounds", "1"], "--rounds must be at least 2")],
)  # fmt: skip
def test_what_can_not_be_counted_is_refused(command, error, capsys):
    assert cost.main(command) == 2
    assert error in capsys.readouterr().err
