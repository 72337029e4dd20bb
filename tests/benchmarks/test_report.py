"""Tables, lines and pictures of benchmark.py."""

from matplotlib.axes import Axes

from dg_timm.benchmarks import report
from dg_timm.benchmarks.figures import draw_results
from dg_timm.benchmarks.timing import MemoryCopy, order_of_round, seconds

COMMON = dict(model="m", mode="i", batch_size=1, layout="nchw", dtype="f")


def test_a_line_through_exact_points():
    rows = [dict(COMMON, image_size=9, cost=c, ratio=0.1 + 0.9 * c) for c in (0.2, 0.5, 1)]
    (fit,) = report.fit_lines(rows)
    assert (fit["slope"], fit["intercept"], fit["r_squared"]) == (0.9, 0.1, 1.0)


def test_every_image_size_has_a_line_of_its_own():
    rows = [dict(COMMON, image_size=px, cost=c, ratio=px * c) for px in (1, 2) for c in (0.2, 0.5, 1)]
    fits = report.fit_lines(rows)
    assert [(fit["image_size"], fit["slope"]) for fit in fits] == [(1, 1.0), (2, 2.0)]


def test_every_row_has_a_bar_though_two_have_one_name(tmp_path, monkeypatch):
    rows = [dict(COMMON, image_size=9, low=0.1, high=1.0, ratio=0.5)] * 12
    drawn = []
    monkeypatch.setattr(Axes, "barh", lambda self, places, values, **options: drawn.extend(values))
    draw_results(tmp_path / "bars.png", {"times": rows})
    assert len(drawn) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["bars.png"]


def test_parts_of_a_table_have_the_same_columns_and_one_header():
    first = report.table([dict(COMMON, ratio=1)], report.TIMES)
    second = report.table([dict(COMMON, ratio=2, cost=0.5)], report.TIMES, header=False)
    lines = [*first.splitlines(), *second.splitlines()]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| m | i |")


def test_a_table_has_the_columns_that_some_row_has():
    text = report.table([{"way": "kernels", "ms": 1.5}, {"way": "x|y"}], report.AGGREGATION)
    assert text == "| way | ms |\n|---|---|\n| kernels | 1.5 |\n| x\\|y |  |"


def test_the_order_turns_round_in_every_second_round():
    assert [list(order_of_round("abc", number)) for number in range(3)] == [list("abc"), list("cba"), list("abc")]


def test_a_call_is_timed_once():
    calls = []
    assert seconds(lambda: calls.append(1)) > 0
    assert len(calls) == 1


def test_a_copy_counts_what_it_reads_and_writes():
    copy = MemoryCopy("cpu", megabytes=1)
    copy.target.zero_()
    copy()
    assert copy.target.equal(copy.source)
    assert copy.bytes == 2 * 2**20
