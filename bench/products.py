"""The products of a layer of Llama-3.1-8B for few tokens, with all that stands around them, against cuBLAS alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lragent.bench.graphs import capture, microseconds
from lragent.kernels.ops import gate, normalise, project
from lragent.kernels.skinny_linear import skinny_linear_reference

LAYERS = 12
"""Layers of distinct weights, so that none is found in the L2 cache."""


@dataclass(frozen=True)
class Product:
    """One of a layer's four: rows of its weight, columns, and what stands around it."""

    name: str
    rows: int
    columns: int
    normed: bool = False
    gated: bool = False
    added: bool = False


PRODUCTS = (
    Product("norm, q k v A", 6160, 4096, normed=True),
    Product("o, residual", 4096, 4096, added=True),
    Product("norm, gate and up, SiLU", 28672, 4096, normed=True, gated=True),
    Product("down, residual", 4096, 14336, added=True),
)


@dataclass(frozen=True)
class Measured:
    """Microseconds: ours with all around it, cuBLAS's with kernels of ours around it, cuBLAS's product alone.

    moved: bytes of weights, which must be read. error: of ours, as a share of the result's norm.
    """

    ours: float
    around: float
    alone: float
    moved: int
    error: float


def measure(product: Product, tokens: int, device: torch.device) -> Measured:
    """`tokens`: as many as `project` gives to the skinny kernel."""
    weights = [
        torch.randn(product.rows, product.columns, device=device, dtype=torch.bfloat16) / product.columns**0.5
        for _ in range(LAYERS)
    ]
    x = torch.randn(tokens, product.columns, device=device, dtype=torch.bfloat16)
    d_out = product.rows // 2 if product.gated else product.rows
    norm = (torch.rand(product.columns, device=device, dtype=torch.bfloat16), 1e-5) if product.normed else None
    residual = torch.randn(tokens, d_out, device=device, dtype=torch.bfloat16) if product.added else None
    options: dict[str, Any] = {"norm": norm, "gated": product.gated, "residual": residual}
    exact = skinny_linear_reference(x, weights[0], **options)
    error = float((project(x, weights[0], **options).float() - exact).norm() / exact.norm())
    sums = torch.zeros(tokens, d_out, device=device, dtype=torch.bfloat16)

    def ours() -> None:
        for weight in weights:
            project(x, weight, **options)

    def around() -> None:
        for weight in weights:
            states = x if norm is None else normalise(x, *norm)
            if residual is not None:
                sums.addmm_(states, weight.T)
            elif product.gated:
                gate(F.linear(states, weight), d_out)
            else:
                F.linear(states, weight)

    def alone() -> None:
        for weight in weights:
            F.linear(x, weight)

    fused, beside, bare = (microseconds(capture(run).replay) / LAYERS for run in (ours, around, alone))
    return Measured(fused, beside, bare, weights[0].nbytes, error)
