"""What tests of training have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from lragent.train import examples


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples are kept in a cache of the test run's own."""
    root = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(examples, "cache_root", lambda: root)
    return root
