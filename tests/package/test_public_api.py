"""The public API changes on purpose, or not at all."""

import dg_timm
from tests.package.api import describe, differences, frozen_api, public_api


def test_the_public_api_is_the_frozen_one():
    changes = differences(frozen_api(), public_api())
    assert not changes, "\n".join(
        ["the public API differs from tests/package/public_api.json:", *changes]
        + ["If that is meant, run `make api`, commit the file, and say so in CHANGELOG.md."]
    )


def test_every_name_is_described():
    api = frozen_api()
    assert sorted(api) == sorted(dg_timm.__all__)
    assert {"function", "class", "module", "constant"} == {entry["kind"] for entry in api.values()}
    assert api["cost"]["signature"].startswith("(model")
    assert api["Accuracy"]["members"]


def test_a_change_is_noticed():
    """The comparison above would be empty otherwise."""

    class Before:
        size: int = 1

        def run(self, images: list) -> None: ...

    class After:
        size: int = 2

        def run(self, images: list, share: float = 0.5) -> None: ...

        def stop(self) -> None: ...

    assert not differences(describe(Before), describe(Before))
    changes = differences({"a": describe(Before), "gone": {}}, {"a": describe(After)})
    assert changes == [
        "changed  dg_timm.a.run: (self, images: list) -> None is now (self, images: list, share: float=0.5) -> None",
        "changed  dg_timm.a.size: int = 1 is now int = 2",
        "added    dg_timm.a.stop",
        "removed  dg_timm.gone",
    ]
