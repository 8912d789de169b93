"""What GPUs can do, found by their names."""

from __future__ import annotations

import pytest
import torch

from lragent.train.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A4000", None),  # neither an A40
        ("NVIDIA RTX A1000", None),  # nor an A10
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(
    name: str, tera: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if tera is None else tera * 1e12)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
