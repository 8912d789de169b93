"""What a training run can be told; YAML files in `configs/roles/` and `key=value` words load into this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lragent.adapter_set import Objective
from lragent.modes import PrefixWriter

Tying = Literal["joint", "sequential", "frozen"]


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Its steps learn the same on any number of processes."""

    data: Path
    """Trajectories: a JSONL or Parquet file, a folder or pattern of them, or a dataset of the hub (org/name,
    org/name:config@split)."""
    out: Path
    """Folder for the pack, the PEFT folders, the metrics and the model card; it must be new or empty. While the run
    lasts, its checkpoints lie beside it in a folder of that name with `.partial` at the end."""
    eval_data: Path | None = None
    """Trajectories that are never learnt from; the loss on them is reported per role."""

    model: str | None = None
    """Hub id, folder or GGUF file; None = the embedded model."""
    dtype: Literal["bf16", "float32"] = "bf16"
    """Of the base weights. Adapters are always trained in float32."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen base in 4 bits (needs CUDA and bitsandbytes)."""

    roles: tuple[str, ...] = ("plan", "action", "reflect")
    """Names of the roles, as the data's assistant messages say them."""
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] | None = None
    """The decoder layers to adapt; None = all."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    tying: Tying = "joint"
    """`joint`: A learns from all roles at once. `sequential`: the first of `roles` trains A with its own B, then A is
    frozen and the others train theirs, as in the paper (`objective: per_role` only; `epochs` and `max_steps` count for
    each of both parts). `frozen`: A stays as it starts."""
    a_init: Literal["random", "svd"] = "random"
    """How A starts: as PEFT starts it, or with the directions in which the base weight is strongest."""

    objective: Objective = "mixed"
    """`shared`: each trajectory once, for all roles, as it is served with a shared cache. `per_role`: once for each
    role, alone over the whole context. `mixed`: batches of both in turn."""
    prefix_writer: PrefixWriter = PrefixWriter.BASE
    """Who processes what comes before the first authored token in `shared` batches: `base` or `first`."""

    epochs: int = 3
    """In `mixed`, an epoch meets every trajectory once in `shared` batches, and as many `per_role` batches."""
    max_steps: int | None = None
    """Exactly so many optimizer steps, whatever `epochs` says."""
    max_minutes: float | None = None
    """Stop after so long, the evaluations before and after included, with the learning rate at its end by then. The run
    then depends on the machine's speed."""
    tokens_per_batch: int = 2048
    """Trajectories are laid end to end, without padding, up to so many tokens; a longer one is a batch of its own."""
    batches_per_step: int | None = None
    """Batches of one optimizer step, over all processes, a multiple of their number; None = one for each process. The
    step is the one that a single batch of them all would give, whatever the number of processes."""
    max_length: int | None = None
    """Longer trajectories are cut off after so many tokens."""
    lr: float = 2e-4
    warmup: float = 0.05
    """Share of the run in which the learning rate rises; after it, it falls to zero along a cosine."""
    weight_decay: float = 0.0
    clip: float | None = 1.0
    """Longest gradient; None = as it comes."""
    seed: int = 0
    recompute: bool = False
    """Keep only what goes into each layer and compute the rest again in the backward pass: a third slower, and room for
    trajectories of tens of thousands of tokens."""
    compile: bool | None = None
    """Compile the base's elementwise parts with `torch.compile`; None = on a GPU, except under ZeRO-3."""

    eval_every: int | None = None
    """Optimizer steps between evaluations, besides those before the first step and after the last one."""
    save_every: int | None = None
    """Optimizer steps between checkpoints; None = whenever ten minutes have passed."""
    keep: int = 2
    """How many checkpoints are kept: the newest."""
    tracking: Literal["off", "wandb"] = "off"
    project: str = "lragent"
    """Name of the wandb project."""

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "epochs",
            "max_steps",
            "tokens_per_batch",
            "batches_per_step",
            "max_length",
            "eval_every",
            "save_every",
            "keep",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1")
        for name in ("alpha", "max_minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` is {value}; it must be above 0")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"`weight_decay` is {self.weight_decay}; it must be at least 0")
        if self.tying == "sequential":
            if self.objective != "per_role":
                raise ValueError(
                    "`tying: sequential` trains each role alone, which is `objective: per_role`, not "
                    f"`{self.objective}`"
                )
            if len(self.roles) < 2:
                raise ValueError("`tying: sequential` needs at least two roles")
