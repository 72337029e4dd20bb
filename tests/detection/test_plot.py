"""Pictures of detections."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from dg_timm._errors import MissingPackage
from dg_timm.detection.observation import detector_statistics
from dg_timm.detection.plot import draw_detections
from tests.helpers.detection import images_of, make_detector, perfect_detections
from tests.helpers.networks import randomize_graph


def test_pictures_show_the_wiring(pages, tmp_path, monkeypatch):
    """A panel a stage of more than one block, with the weights of that image's edges."""
    from matplotlib.axes import Axes

    shown, own = [], Axes.imshow

    def record(self, data, *args, **kwargs):
        shown.append(data)
        return own(self, data, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", record)
    one = make_detector(backbone="dg_resnet18").eval()
    randomize_graph(one)
    split = pages.test.select([0, 5])
    found = [found_._replace(labels=np.minimum(found_.labels, 2)) for found_ in perfect_detections(split)]
    file = draw_detections(one, split, found, pages.categories, tmp_path / "pictures.png")
    assert Image.open(io.BytesIO(file.read_bytes())).width > 1000
    alphas = [data for data in shown if isinstance(data, np.ma.MaskedArray)]
    assert len(alphas) == 2 * 4
    assert not np.allclose(alphas[0].filled(0), alphas[4].filled(0))  # two images, two wirings


def test_a_score_decides_which_predictions_are_drawn(pages, tmp_path, monkeypatch):
    """Over a static backbone, which has no wiring to show."""
    from matplotlib.axes import Axes

    texts = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **options: texts.append(text))
    (found,) = perfect_detections(pages.test.select([0]))
    found = found._replace(scores=np.linspace(0, 1, len(found.scores), dtype=np.float32))
    file, static = tmp_path / "new" / "a.png", make_detector(backbone="resnet18")
    draw_detections(static, pages.test, [found], pages.categories, file, min_score=0.5)
    assert len(texts) == len(found.scores) + int((found.scores >= 0.5).sum())
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(pages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"pip install 'dg-timm\[detect\]'"):
        draw_detections(make_detector(), pages.test, [], pages.categories, tmp_path / "a.png")


def test_statistics_and_pictures_leave_the_modes_alone(pages):
    detector = make_detector().train()
    detector.backbone.body.bn1.eval()
    modes = [module.training for module in detector.modules()]
    row = detector_statistics(detector, images_of(pages.test, 2))
    assert {"cost", "weight.layer1", "open.layer4"} <= set(row)
    assert [module.training for module in detector.modules()] == modes
    assert detector_statistics(make_detector(backbone="resnet18"), images_of(pages.test, 1)) == {}
