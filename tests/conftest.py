import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse 4.49 renamed

CHECKOUT = Path(__file__).parent.parent


def pytest_configure() -> None:
    """What is imported stays: no garbage collection walks it in each test."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)  # exports and parsers make many short-lived objects
    gc.enable()


@pytest.fixture(autouse=True)
def memory_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line keeps torch from filling what it allocates; later tests shall notice what was not written."""
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)


@pytest.fixture(autouse=True)
def own_modules_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test allows is no longer allowed in the next."""
    monkeypatch.setattr("patchad.trust._trusted", {"patchad"})


@pytest.fixture(autouse=True)
def one_runtime_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed: nothing is measured, and nothing is written into the home of who tests."""
    monkeypatch.setattr("patchad.engines.installed", lambda _: None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights, where the machine has them."""
    folder = Path(os.environ.get("PATCHAD_SHARED", CHECKOUT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set PATCHAD_SHARED to a folder with data/ and weights/")
    return folder


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic product in MVTec AD's layout: 12 training images, 4 + 6 test images of 96 x 96 pixels."""
    from patchad.data.synthetic import write_synthetic  # where several processes test, the first one only waits

    root = tmp_path_factory.mktemp("products") / "product"
    write_synthetic(root, train=12, test_normal=4, test_defective=7, size=96)
    return root


@pytest.fixture(scope="session")
def padded_product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `product`, of 8 training images; every third image is cut to 96 x 72 pixels, so that it is padded."""
    from PIL import Image

    from patchad.data.synthetic import write_synthetic

    root = tmp_path_factory.mktemp("products") / "padded"
    write_synthetic(root, train=8, test_normal=4, test_defective=6, size=96)
    for path in sorted(root.glob("t*/*/*.png"))[::3]:
        for file in (path, root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"):
            if file.is_file():
                with Image.open(file) as image:
                    cut = image.crop((0, 0, 96, 72))
                cut.save(file)
    return root
