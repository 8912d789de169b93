"""`python -m lragent.bench kernels`: the kernels at Llama-3.1-8B's shapes against what the GPU can do.

Each is compared with its definition first, and no speed is reported for a wrong result. Times are of CUDA graphs, so
that the host's part is left out, over several layers' tensors, so that none finds its cache in L2. Shares are of the
ceilings measured in the same run: a copy's bandwidth (bytes read and written), and a matrix product's rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from lragent.bench import machine
from lragent.bench.cached_problem import DIM, HEADS, KV_HEADS, CachedProblem
from lragent.bench.graphs import capture, microseconds
from lragent.bench.products import PRODUCTS, measure
from lragent.bench.roofline import Ceilings
from lragent.errors import LRAgentError, UserError
from lragent.kernels.cached import LayerCache, Readers
from lragent.kernels.low_rank import role_up
from lragent.kernels.ops import Way, cached_attention, make_plan

ERROR_LIMIT = 0.01
"""Of a result, as a share of its norm. bfloat16 rounds by up to 0.004."""

HIDDEN = HEADS * DIM


@dataclass(frozen=True)
class Row:
    """One measurement. share: of the ceiling that `of` names."""

    part: str
    case: str
    us: float
    rate: str = ""
    share: float | None = None
    of: str = ""
    error: float | None = None
    note: str = ""


class Bench:
    """Collects rows, and prints each as it comes."""

    def __init__(self, device: torch.device, console: Console, ceilings: Ceilings) -> None:
        self.device = device
        self.console = console
        self.ceilings = ceilings
        self.rows: list[Row] = []
        shown = f"copy {ceilings.copy / 1e12:.2f} TB/s, products {ceilings.products / 1e12:.0f} TFLOP/s"
        console.print(shown, highlight=False)

    def add(
        self,
        part: str,
        case: str,
        us: float,
        *,
        moved: float = 0,
        operations: float = 0,
        error: float | None = None,
        note: str = "",
    ) -> float:
        """Add a row, its share by `moved` bytes or by `operations`; gives the time. Refuses one that is wrong."""
        if error is not None and not error <= ERROR_LIMIT:
            raise LRAgentError(f"{part}, {case}: the result is off by {error:.2%}, so no speed is given.")
        rate, share, of = "", None, ""
        if moved:
            rate, share, of = f"{moved / us / 1e6:.2f} TB/s", moved / us * 1e6 / self.ceilings.copy, "copy"
        elif operations:
            rate = f"{operations / us / 1e6:.0f} TFLOP/s"
            share, of = operations / us * 1e6 / self.ceilings.products, "products"
        row = Row(part, case, us, rate, share, of, error, note)
        self.rows.append(row)
        shown = f"{row.us:10.2f} µs {row.rate:>12} {'' if share is None else f'{share:.1%} of {of}':>18}  {note}"
        self.console.print(f"{part:12} {case:44} {shown}", highlight=False, soft_wrap=True)
        return us


def graphed(step: Callable[[LayerCache], torch.Tensor], problem: CachedProblem, times: int = 15) -> tuple[float, float]:
    """Microseconds of one layer's `step` in a captured graph of all layers, and the last one's error."""
    outs: list[torch.Tensor] = []

    def run() -> None:
        outs[:] = [step(cache) for cache in problem.caches]

    graph = capture(run)
    us = microseconds(graph.replay, times) / len(problem.caches)
    return us, problem.error(outs[-1])


def attending(problem: CachedProblem, way: Way) -> Callable[[LayerCache], torch.Tensor]:
    """Attention of a layer with a plan that is made beforehand, as once a step."""
    plan = make_plan(problem.query, problem.caches[0], problem.batch, way=way)

    def step(cache: LayerCache) -> torch.Tensor:
        return cached_attention(
            problem.query, cache, problem.batch, problem.readers, scale=problem.scale, plan=plan, way=way
        )

    return step


FEW: dict[str, tuple[list[int], list[int], int]] = {
    "1 new at 1k": ([1], [1024], 32),
    "8 new at 1k": ([8], [1024], 32),
    "1 new at 8k": ([1], [8192], 8),
    "1 new at 66k": ([1], [66_400], 4),
    "8 new at 66k": ([8], [66_400], 4),
    "64 new at 66k": ([64], [66_400], 4),
    "16 x 1 new at 4k": ([1] * 16, [4096] * 16, 4),
    "64 x 1 new at 1k": ([1] * 64, [1024] * 64, 4),
    "16 x 8 new at 4k": ([8] * 16, [4096] * 16, 4),
}
"""New tokens, contexts, layers."""


def few_tokens(bench: Bench, ranks: Sequence[int]) -> None:
    """Decode and short appends, with the LR cache, without it, with low-rank keys; and values materialised."""
    for case, (new, context, layers) in FEW.items():
        times = {}
        for rank in (0, *ranks):
            problem = CachedProblem.random(new, context, bench.device, rank_v=rank, layers=layers)
            us, error = graphed(attending(problem, "split"), problem)
            times[rank] = us
            note = f"{us / times[0]:.3f}x of no LR" if rank else ""
            name = f"{case}, {f'r={rank}' if rank else 'no LR'}"
            bench.add("few tokens", name, us, moved=problem.bytes, error=error, note=note)
        rank = ranks[0]
        for name, normalised in (("low-rank keys", False), ("low-rank keys, normalised", True)):
            problem = CachedProblem.random(
                new, context, bench.device, rank_v=rank, rank_k=rank, normalised=normalised, layers=layers
            )
            us, error = graphed(attending(problem, "split"), problem)
            note = f"{us / times[rank]:.2f}x of values alone"
            bench.add("few tokens", f"{case}, r={rank}, {name}", us, moved=problem.bytes, error=error, note=note)
        problem = CachedProblem.random(new, context, bench.device, rank_v=rank, layers=layers)
        us, error = graphed(materialising(problem), problem)
        note = f"Flash-LoRA-Attention is {us / times[rank]:.2f}x as fast"
        bench.add("few tokens", f"{case}, r={rank}, V + LR B materialised", us, error=error, note=note)


def materialising(problem: CachedProblem) -> Callable[[LayerCache], torch.Tensor]:
    """What the kernel saves: each reader's values written out first, then attention without LR."""
    from lragent.kernels.expanded import expand

    spans = problem.batch.spans or ()
    slots = sum(span.context for span in spans)
    keys, values = (problem.query.new_empty(slots, KV_HEADS, DIM) for _ in range(2))
    laid = LayerCache(keys.transpose(0, 1), values.transpose(0, 1))
    starts = [sum(span.context for span in spans[:i]) for i in range(len(spans))]
    table = (
        torch.tensor(starts, device=keys.device).unsqueeze(1)
        + torch.arange(problem.batch.slots.shape[1], device=keys.device)
    ).int()
    batch = replace(problem.batch, slots=table, low_slots=table)
    plan = make_plan(problem.query, laid, batch, way="split")

    def step(cache: LayerCache) -> torch.Tensor:
        for span, start in zip(spans, starts, strict=True):
            part = slice(start, start + span.context)
            expand(cache, problem.batch, problem.readers, span, keys[part], values[part])
        return cached_attention(problem.query, laid, batch, Readers(), scale=problem.scale, plan=plan)

    return step


LONG = {
    "4k": (4096, 4096),
    "16k": (16_384, 16_384),
    "64k": (65_536, 65_536),
    "8k after 57k": (8192, 65_536),
    "2k after 64k": (2048, 66_400),
    "512 after 66k": (512, 66_400),
}
"""New tokens, context."""


def long_prefill(bench: Bench, ranks: Sequence[int]) -> None:
    """Long chunks as they are dispatched, and by our kernel, against cuDNN on contiguous tensors without LR."""
    for case, (new, context) in LONG.items():
        problem = CachedProblem.random([new], [context], bench.device)
        operations = problem.operations
        theirs = None
        if new == context:
            theirs = bench.add(
                "long prefill", f"{case}, cuDNN, contiguous, no LR", cudnn(problem, 0), operations=operations
            )
            for rank in ranks if context < 65_536 else ranks[:1]:
                us = cudnn(problem, rank)
                note = f"{us / theirs:.2f}x of no LR"
                bench.add("long prefill", f"{case}, cuDNN, widened by r={rank}", us, operations=operations, note=note)
        times: dict[tuple[int, int, str], float] = {}
        ways: tuple[Way, ...] = ("expanded", "prefill") if context < 65_536 or new <= 8192 else ("expanded",)
        for rank, rank_k in ((0, 0), *((rank, 0) for rank in ranks), (ranks[0], ranks[0])):
            problem = CachedProblem.random([new], [context], bench.device, rank_v=rank, rank_k=rank_k)
            for way in ways:
                if way == "prefill" and rank_k and new > 8192:
                    continue
                times[rank, rank_k, way], error = graphed(attending(problem, way), problem, times=5)
                us = times[rank, rank_k, way]
                note = f"{us / times[0, 0, way]:.3f}x of no LR" if rank else ""
                note += f"{', ' if note else ''}{us / theirs:.3f}x of cuDNN's" if theirs else ""
                name = "laid out for cuDNN" if way == "expanded" else "our kernel"
                keys = ", low-rank keys" if rank_k else ""
                title = f"{case}, {f'r={rank}' if rank else 'no LR'}{keys}, {name}"
                bench.add("long prefill", title, us, operations=operations, error=error, note=note)


def cudnn(problem: CachedProblem, rank: int) -> float:
    """torch's fused attention over contiguous tensors; values widened by `rank` columns."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cache = problem.caches[0]
    query = problem.query.transpose(0, 1).unsqueeze(0).contiguous()
    columns = cache.value.new_ones(KV_HEADS, cache.value.shape[1], -(-rank // 8) * 8)
    value = torch.cat((cache.value, columns), dim=-1)

    def run() -> None:
        F.scaled_dot_product_attention(
            query, cache.key.unsqueeze(0), value.unsqueeze(0), is_causal=True, enable_gqa=True
        )

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return microseconds(capture(run).replay, times=5)


def rotary_and_write(bench: Bench) -> None:
    """A layer's rotary embedding and cache writes, against the definition's own arithmetic in torch."""
    from lragent.kernels.rotary_write import rotary_write, rotary_write_torch

    slots, rank = 20_000, 8
    for tokens in (1, 8, 64, 512, 8192):
        layers = 8 if tokens > 1000 else 32
        angle = torch.arange(slots, device=bench.device).unsqueeze(1) * torch.rand(1, DIM // 2, device=bench.device)
        rope = (torch.cat((angle.cos(),) * 2, 1), torch.cat((angle.sin(),) * 2, 1))
        width = (HEADS + 2 * KV_HEADS) * DIM
        fused = [torch.randn(tokens, width + rank, device=bench.device).bfloat16() for _ in range(layers)]
        pools = [
            [torch.zeros(KV_HEADS, slots, DIM, device=bench.device).bfloat16() for _ in range(2)] for _ in range(layers)
        ]
        lows = [torch.zeros(slots, rank, device=bench.device).bfloat16() for _ in range(layers)]
        positions = torch.arange(tokens, dtype=torch.int32, device=bench.device) + 7
        places = torch.randperm(slots, device=bench.device)[:tokens].int()

        def write(
            how: Callable[..., None],
            row: torch.Tensor,
            pool: list[torch.Tensor],
            low: torch.Tensor,
            tokens: int = tokens,
            rope: tuple[torch.Tensor, torch.Tensor] = rope,
            positions: torch.Tensor = positions,
            places: torch.Tensor = places,
        ) -> None:
            query, key, value, low_v = row.split((HIDDEN, KV_HEADS * DIM, KV_HEADS * DIM, rank), dim=1)
            views = (x.view(tokens, -1, DIM) for x in (query, key, value))
            how(*views, low_v, None, rope, positions, places, places, *pool, low, None)

        mine, right = fused[0].clone(), fused[0].clone()
        exact = [torch.zeros_like(x) for x in (*pools[0], lows[0])]
        write(rotary_write, mine, pools[0], lows[0])
        write(rotary_write_torch, right, exact[:2], exact[2])
        pairs = zip((mine, *pools[0], lows[0]), (right, *exact), strict=True)
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)

        def run(layers: int = layers, write: Callable[..., None] = write, fused: list[torch.Tensor] = fused,
                pools: list[list[torch.Tensor]] = pools, lows: list[torch.Tensor] = lows) -> None:  # fmt: skip
            for layer in range(layers):
                write(rotary_write, fused[layer], pools[layer], lows[layer])

        us = microseconds(capture(run).replay) / layers
        moved = tokens * (2 * 2 * (width + rank) + 2 * 4 * DIM // 2)
        bench.add("rotary+write", f"{tokens} tokens, r={rank}", us, moved=moved, error=error)


def grouped_up(bench: Bench, ranks: Sequence[int]) -> None:
    """`y += (h A) B[role]` at d_out 4096 for mixes of roles: the grouped kernel, and the dense one-hot form."""
    from lragent.kernels.grouped_up import group_by_role, grouped_up_

    for tokens in (1, 16, 64, 512, 8192):
        for roles in (3, 16, 256):
            mixes = {
                "identical": torch.ones(tokens),
                "all distinct": 1 + torch.arange(tokens) % roles,
                "uniform": torch.randint(1, roles + 1, (tokens,)),
                "skewed": 1 + (torch.rand(tokens) ** 4 * roles).long().clamp(max=roles - 1),
            }
            for mix, each in mixes.items():
                if tokens == 1 and mix != "identical":
                    continue
                layers, rank = (8 if tokens > 1000 else 32), ranks[0]
                of = each.int().to(bench.device)
                up = torch.randn(roles, rank, HIDDEN, device=bench.device).bfloat16() / 3
                low = torch.randn(tokens, rank, device=bench.device).bfloat16()
                outs = [torch.randn(tokens, HIDDEN, device=bench.device).bfloat16() for _ in range(layers)]
                order = group_by_role(of)
                exact = outs[0].float() + torch.einsum("tr,trd->td", low.float(), up[of.long() - 1].float())
                found = grouped_up_(outs[0].clone(), low, up, of, order)
                error = float((found.float() - exact).norm() / exact.norm())

                def grouped(outs: list[torch.Tensor] = outs, low: torch.Tensor = low, up: torch.Tensor = up,
                            of: torch.Tensor = of, order: torch.Tensor = order) -> None:  # fmt: skip
                    for out in outs:
                        grouped_up_(out, low, up, of, order)

                def dense(outs: list[torch.Tensor] = outs, low: torch.Tensor = low, up: torch.Tensor = up,
                          of: torch.Tensor = of) -> None:  # fmt: skip
                    for out in outs:
                        out.add_(role_up(low, up, of))

                us, other = (microseconds(capture(run).replay) / layers for run in (grouped, dense))
                moved = 2 * tokens * HIDDEN * 2 + len(each.unique()) * rank * HIDDEN * 2
                name = f"{tokens} tokens, {roles} roles, {mix}"
                note = f"one-hot {other:.2f} µs"
                bench.add("grouped B", name, us, moved=moved if tokens >= 512 else 0, error=error, note=note)


def products(bench: Bench) -> None:
    """A layer's products for few tokens. Bytes are those of the weights, once."""
    for tokens in (1, 4, 16):
        for product in PRODUCTS:
            found = measure(product, tokens, bench.device)
            note = f"cuBLAS with kernels around it {found.around:.2f} µs, alone {found.alone:.2f} µs"
            bench.add(
                "products",
                f"{tokens} tokens, {product.name}",
                found.ours,
                moved=found.moved,
                error=found.error,
                note=note,
            )


PARTS: dict[str, Callable[[Bench, Sequence[int]], None]] = {
    "few": few_tokens,
    "long": long_prefill,
    "rotary": lambda bench, _: rotary_and_write(bench),
    "grouped": grouped_up,
    "products": lambda bench, _: products(bench),
}


def show(bench: Bench, console: Console) -> None:
    """All rows as a table."""
    table = Table(title="bfloat16, 32/8 heads of 128")
    for name in ("part", "case", "µs", "rate", "share", "error", ""):
        table.add_column(name, justify="right" if name in ("µs", "rate", "share", "error") else "left")
    for row in bench.rows:
        share = "" if row.share is None else f"{row.share:.1%}"
        error = "" if row.error is None else f"{row.error:.4f}"
        table.add_row(row.part, row.case, f"{row.us:.2f}", row.rate, share, error, row.note)
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the numbers, and print them as the last line."""
    parser = argparse.ArgumentParser(prog="python -m lragent.bench kernels", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], metavar="R", help="of the LR cache (8 16)")
    parser.add_argument("--no-save", action="store_true", help="write nothing to bench/results/")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("kernels: needs a CUDA device.")
    if min(args.ranks) < 1:
        raise UserError("--ranks: must be at least 1.")
    device, console = torch.device("cuda", 0), Console(width=None if Console().is_terminal else 180)
    bench = Bench(device, console, Ceilings.measure(device))
    for part in args.parts:
        PARTS[part](bench, args.ranks)
    numbers = {
        "benchmark": "kernels",
        **machine.facts(device),
        "triton": version("triton"),
        "ceilings": asdict(bench.ceilings),
        "rows": [asdict(row) for row in bench.rows],
    }
    show(bench, console)
    if not args.no_save:
        console.print(f"saved to {machine.save('kernels', numbers)}", highlight=False)
    print(json.dumps(numbers))
    return 0
