"""The wheel, built from a clean tree, in an environment that has nothing of the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.scripts import execute, python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build with what is installed (no isolation): the sdist, and from it the wheel."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    process = execute(command)
    assert process.returncode == 0, process.stdout + process.stderr
    return out


def test_the_wheel_holds_the_package_and_no_more(built):
    (wheel,) = built.glob("*.whl")
    assert len(list(built.glob("*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {
        str(path.relative_to(ROOT))
        for folder in ("dg_timm", "dg_timm_cli")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c", ".h", ".md", ".typed", ".json", ".safetensors", ".png", ".yaml")
    }
    shipped |= {"dg_timm/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == shipped
    assert {
        "dg_timm/execution/backends/cpu.c",
        "dg_timm/execution/backends/cpu_sparse.h",
        "dg_timm/hub/card_template.md",
        "dg_timm/models/pretrained/dg_cifar_resnet26.cifar10/model.safetensors",
        "dg_timm/recipes/digits.yaml",
        "dg_timm/recipes/detection/digits.yaml",
    } <= shipped


def test_the_wheel_works_without_the_repository(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    program = (
        "import dg_timm, timm, torch\n"
        f"assert dg_timm.__file__.startswith({str(site)!r}), dg_timm.__file__\n"
        "model = timm.create_model('dg_resnet18', num_classes=3).eval()\n"
        f"folder = dg_timm.save_pretrained(model, {str(tmp_path / 'model')!r})\n"
        "again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()\n"
        "x = torch.randn(1, 3, 64, 64)\n"
        "assert torch.equal(again(x), model(x))\n"
        "shipped = timm.create_model('dg_cifar_resnet26.cifar10', pretrained=True).eval()\n"
        "assert dg_timm.cost(shipped, torch.randn(2, 3, 32, 32)).max() < 1\n"
    )
    for words in (["-c", program], ["-m", "dg_timm", "train", "--recipe", "digits", "--dry-run"]):
        process = python(*words, cwd=tmp_path, env={"PYTHONPATH": str(site)})
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_installs_into_an_empty_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    interpreter = str(venv / "bin" / "python")
    subprocess.run([interpreter, "-m", "pip", "install", "-q", str(wheel)], check=True, capture_output=True)
    program = (
        "import dg_timm, timm, torch; m = timm.create_model('dg_regnetx_002').eval()\n"
        "print(sorted(dg_timm.adjacency(m, torch.randn(1, 3, 64, 64))))\n"
        "try:\n    dg_timm.draw_wiring(dg_timm.adjacency(m, torch.randn(1, 3, 64, 64)), 'x.png')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    process = execute([interpreter, "-c", program], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "['s1', 's2', 's3', 's4']" in process.stdout
    assert "pip install 'dg-timm[plots]'" in process.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_work_in_an_empty_environment(built, tmp_path):
    """From `pip install` to a prediction: what a new user runs, with the wheel alone."""
    (wheel,) = built.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", f"{wheel}[train,plots]"]
    subprocess.run(pip, check=True, capture_output=True)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), (200, 30, 60)).save(picture)
    shortened = ["--epochs", "3", "--train-limit", "320", "--val-limit", "100", "--workers", "0"]
    for words in (
        ["--version"],
        ["train", "--recipe", "digits", *shortened],
        ["predict", "output/train/model", str(picture), "--output", "predictions.parquet"],
        ["predict", "dg_cifar_resnet26.cifar10", str(picture), "--json"],
        ["show", "output/train/model", str(picture)],
        ["validate", "output/train/model", "--data", "digits", "--val-limit", "100", "--workers", "0"],
        ["convert", "resnet18", "--random", "--output", "converted"],
        ["card", "output/train/model"],
        ["publish", "output/train/model", "your-name/my-network", "--dry-run"],
        ["list", "cifar*"],
        ["doctor", "--offline"],
    ):
        process = execute([str(venv / "bin" / "dg-timm"), *words], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
        assert process.returncode == 0, (words, process.stdout + process.stderr)
    assert (tmp_path / "wiring.png").is_file()
    assert (tmp_path / "predictions.parquet").is_file()
    lacking = execute([str(venv / "bin" / "dg-timm"), "detect", "--recipe", "digits"], cwd=tmp_path)
    assert lacking.returncode == 2
    assert lacking.stderr.startswith("error: ")
    assert "pip install 'dg-timm[detect]'" in lacking.stderr
