"""complexity.py: the counts beside the paper's Table 1."""

import json

from dg_timm.benchmarks import table1


def test_the_rows_of_table_1_are_close_to_the_paper(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table1, "TABLE_1", {name: table1.TABLE_1[name] for name in ("resnet18", "mobilenetv2_100")})
    out = tmp_path / "counts.json"
    assert table1.main(["--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | static params (M) | DG | paper |")
    assert lines[2].startswith("| dg_resnet18 | 11.69 | 11.70 | 11.71 | 1814 | ")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"] == "train_scripts/complexity.py"
    for row in result["models"]:
        params, flops = table1.TABLE_1[row["model"].removeprefix("dg_")]
        assert abs(row["dynamic"]["params"] / 1e6 / params - 1) < 0.05
        assert abs(row["dynamic"]["multiply_adds"] / 1e6 / flops - 1) < 0.05
        assert row["dynamic"]["multiply_adds"] > row["static"]["multiply_adds"]


def test_a_network_of_32_pixels_is_counted_at_32_pixels():
    size, static, dynamic = table1.count("cifar_resnet20")
    assert size == (3, 32, 32)
    assert dynamic.params > static.params
