"""What an evaluation leaves to read."""

import csv
import json
import math

import pytest

from dg_timm.detection.data.boxes import Categories
from dg_timm.detection.evaluation import APResult, ClassAP, average_precision
from dg_timm.detection.run.results import class_table, write_results
from tests.helpers.detection import make_detector, perfect_detections


@pytest.fixture
def judged(pages):
    """Three pages, found perfectly: (split, result, detections)."""
    split = pages.test.select(range(3))
    found = perfect_detections(split)
    return split, average_precision(found, split, pages.categories), found


def test_results_are_those_of_the_evaluation(judged, pages, tmp_path):
    split, result, found = judged
    write_results(tmp_path / "out", make_detector(), split, pages.categories, result, found)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "figures.json", "per_class.csv", "predictions.json"
    ]  # fmt: skip
    figures = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))
    assert figures == {"split": split.name, "images": 3, **result.overall}
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert len(predictions) == split.boxes
    with (tmp_path / "out" / "per_class.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["boxes"]) for row in rows] == [one.boxes for one in result.classes]
    assert all(math.isnan(float(row["AP"])) == (row["boxes"] == "0") for row in rows)


@pytest.mark.parametrize(("pictures", "drawn"), [(1, [0]), (2, [0, 1]), (9, [0, 1, 2])])
def test_pictures_are_from_all_over_the_split(judged, pages, tmp_path, monkeypatch, pictures, drawn):
    split, result, found = judged
    asked = {}

    def draw(detector, split, found, categories, file, *, min_score):
        asked.update(rows=[one.row for one in found], file=file, min_score=min_score)

    monkeypatch.setattr("dg_timm.detection.run.results.draw_detections", draw)
    write_results(tmp_path, None, split, pages.categories, result, found, pictures=pictures, min_score=0.25)
    assert asked == {"rows": drawn, "file": tmp_path / "detections.png", "min_score": 0.25}


def test_names_of_classes_are_written_whatever_the_locale(judged, tmp_path):
    split, result, found = judged
    named = APResult(result.overall, [ClassAP("Zählung, 数", 1, 50.0, 60.0, 40.0)])
    write_results(tmp_path, None, split, Categories(["Zählung, 数"] * 10, list(range(10))), named, found)
    assert '"Zählung, 数",1,50.0000' in (tmp_path / "per_class.csv").read_bytes().decode("utf-8")


def test_the_table_by_class_is_aligned():
    result = APResult({"AP": 50.0}, [ClassAP("a", 10, 50.0, 62.5, 1.25), ClassAP("longer", 0, *[float("nan")] * 3)])
    assert class_table(result).splitlines() == [
        "         boxes      AP    AP50    AP75",
        "a           10   50.00   62.50    1.25",
        "longer       0     nan     nan     nan",
    ]
    assert len(class_table(APResult({}, [])).splitlines()) == 1  # of an evaluation that found no class
