"""The demo: a world is made, three roles are trained, packed, served from one cache and used, beside what PEFT does."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.table import Table

from lragent.bench.baselines import PeftTeam, PrefillAnew, Turn, fast_dtype
from lragent.chat import BASE, Renderer
from lragent.errors import UserError
from lragent.eval.agent import ACTION, PLAN, REFLECT, ROLES, Complete, Episode, Limits, Message, Reply
from lragent.eval.children import Child
from lragent.eval.examine import Examination, examine
from lragent.eval.openai_client import openai_complete
from lragent.eval.side_by_side import SideBySide, Sums
from lragent.eval.world.generate import TEST_FILE, TRAIN_FILE, write_data_set
from lragent.eval.world.levels import level_named
from lragent.eval.world.questions import Question
from lragent.eval.world.score import Tally, is_right, never_search
from lragent.eval.world.testset import TestSet, load_test_set
from lragent.models import load_model, load_tokenizer, resolve_model

LEVEL = "demo"
MARKER = ".lragent-demo"
"""The file that says that a folder is the demo's own, and may be removed by the next one."""
TRAINED = Limits(iterations=10)
UNTRAINED = Limits(iterations=4, max_tokens={PLAN: 24, ACTION: 16, REFLECT: 16})
"""Enough to search twice, look up and finish; a base model that rambles is cut short."""
AT_LEAST = 20
"""Questions asked, however little time is left."""
WORKERS = 8


@dataclass(frozen=True)
class DemoSettings:
    """minutes: after which no further question is asked; training takes `train_minutes` of them. shown: trajectories
    that are printed step by step. questions: None asks as many of the test set as there is time for."""

    out: Path = Path("runs/demo")
    model: str | None = None
    seed: int = 0
    minutes: float = 7.0
    train_minutes: float = 3.5
    shown: int = 3
    questions: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        for name, least in (("shown", 1), ("questions", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: must be at least {least}, not {value}.")
        if not 0 < self.train_minutes < self.minutes:
            raise UserError(f"train_minutes: must be more than 0 and less than the {self.minutes:g} minutes in all.")


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Everything, from nothing to the numbers of the demo's last line. Writes into `settings.out`.

    Raises `UserError`, and `ChildError` where training or the server fails.
    """
    start = time.monotonic()
    place = _checkout()
    _fresh(settings.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fast_dtype(device)

    console.rule("1. a world of made-up facts")
    write_data_set(level_named(LEVEL), settings.seed, settings.out / "data")
    test = load_test_set(settings.out / "data" / TEST_FILE)
    console.print(
        f"{settings.out / 'data'}: trajectories to train on, and {len(test.questions)} test questions, such as"
    )
    console.print(f"  {test.questions[0].text}  ({test.questions[0].answer})", style="italic", highlight=False)

    console.rule("2. training plan, action and reflect with one tied A")
    summary = _train(settings, place, dtype, device, console)

    console.rule("3. the pack")
    pack, peft = Path(summary["pack"]), {role: Path(summary["peft"]) / role for role in ROLES}
    _inspect(pack)

    console.rule("4. serving all roles from one cache, and using them")
    source = resolve_model(settings.model)
    team = PeftTeam(load_model(source, dtype, device), peft)
    tokenizer = load_tokenizer(source)
    with _served(settings, pack, dtype, console) as client:
        complete = openai_complete(client)
        sides = SideBySide(test, complete, TRAINED, Renderer(tokenizer), tokenizer, team, console)
        _warm_up(client, team)
        questions = test.questions[: settings.questions]
        shown = questions[: settings.shown]
        episodes = [sides.play(question, generate=number == 0) for number, question in enumerate(shown)]
        _print_sums(sides.sums, console)

        console.rule("5. how many answers are right")
        untrained = _ask_untrained(test, questions[:AT_LEAST], client, console)
        deadline = start + settings.minutes * 60
        rest = _ask(test, questions[len(shown) :], complete, deadline, AT_LEAST - len(shown), console)
    asked = Examination((*shown, *rest.questions), (*episodes, *rest.episodes))
    guess = never_search(asked.questions).overall
    _print_scores(asked.score.overall, untrained, guess, console)
    return {
        "train_loss_first": round(summary["train_loss_first"], 4),
        "train_loss_last": round(summary["train_loss_last"], 4),
        "roles": list(ROLES),
        "pack_bytes": pack.stat().st_size,
        "separate_adapter_bytes": sum((path / "adapter_model.safetensors").stat().st_size for path in peft.values()),
        "steps_compared": sides.sums.steps,
        "tokens_computed": sides.sums.computed,
        "tokens_reused": sides.sums.reused,
        "ttft_sum_s": round(sides.sums.ttft_s, 3),
        "ttft_sum_baseline_s": round(sides.sums.per_role_s, 3),
        "ttft_sum_prefill_anew_s": round(sides.sums.anew_s, 3),
        "answers_correct": asked.score.overall.correct,
        "answers_total": asked.score.overall.total,
        "untrained_correct": untrained.correct,
        "untrained_total": untrained.total,
        "never_search_correct": guess.correct,
        "seconds": round(time.monotonic() - start, 1),
    }


def _checkout() -> Path:
    """The checkout that this package is installed from; the demo launches its script and reads its config."""
    place = Path(__file__).resolve().parents[1]
    if not (place / "configs" / "roles" / "demo.yaml").is_file():
        raise UserError("the demo needs the project's checkout; clone it and run `make demo` there.")
    return place


def _fresh(out: Path) -> None:
    """An empty folder at `out`; one that an earlier demo left is removed, any other refused."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out} is there and is not a folder; name another with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"out: {out} holds files that are not the demo's; name another folder with --out.")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("Written by `lragent demo`, which removes this folder when it runs again.\n")
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror or error}).") from error


def _train(settings: DemoSettings, place: Path, dtype: torch.dtype, device: str, console: Console) -> Mapping[str, Any]:
    """Launch the training as a user would; returns its summary."""
    script: list[Path | str] = [
        place / "train" / "train_roles.py",
        "--config",
        place / "configs" / "roles" / "demo.yaml",
    ]
    launch: list[Path | str] = (
        ["--config_file", place / "configs" / "accelerate" / "cpu.yaml"] if device == "cpu" else []
    )
    overrides = {
        "data": settings.out / "data" / TRAIN_FILE,
        "out": settings.out / "roles",
        "dtype": "bf16" if dtype is torch.bfloat16 else "float32",
        "max_minutes": settings.train_minutes,
        "seed": settings.seed,
        "model": settings.model or "null",
    }
    words = [_from_here(part) for part in [*launch, *script]] + [f"{name}={value}" for name, value in overrides.items()]
    console.print("$ accelerate launch " + " ".join(words), highlight=False, soft_wrap=True)
    accelerate = Path(sys.executable).parent / "accelerate"
    env = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else accelerate says at length what it chose
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    log = settings.out / "train.log"
    with Child([str(accelerate), "launch", *words], log, errors_visible=True, extra_env=env) as child:
        child.finish()
        summary: dict[str, Any] = json.loads(child.text.splitlines()[-1])
    console.print(
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s; "
        f"loss {summary['train_loss_first']:.3f} at first, {summary['train_loss_last']:.3f} in the end"
    )
    return summary


def _from_here(path: Path | str) -> str:
    """A path as one would type it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _inspect(pack: Path) -> None:
    from lragent.cli.main import main

    main(["inspect", str(pack)])


@contextmanager
def _served(settings: DemoSettings, pack: Path, dtype: torch.dtype, console: Console) -> Iterator[openai.OpenAI]:
    """A server on a free loopback port, and the official client talking to it."""
    words = ["serve", "--roles", str(pack), "--sharing", "base_lr_shared", "--port", "0"]
    words += ["--dtype", str(dtype).removeprefix("torch.")]
    words += ["--model", settings.model] if settings.model else []
    console.print("$ lragent " + " ".join(words), highlight=False, soft_wrap=True)
    command = [str(Path(sys.executable).parent / "lragent"), *words]
    with Child(command, settings.out / "serve.log") as child:
        url = child.wait_for(r"serving on (http://\S+)", timeout_s=180)
        console.print(f"the server answers at {url}; the client is OpenAI's own", highlight=False)
        client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # a proxy must not come between
        )
        with client:
            try:
                yield client
            except openai.OpenAIError as error:
                raise child.failure(f"the server did not answer ({error})") from error


def _warm_up(client: openai.OpenAI, team: PeftTeam) -> None:
    """The first runs of a program pay for things that no later one does, on both sides."""
    complete = _apart(client, "warm-up")
    for role in ROLES:
        complete(role, [{"role": "user", "content": "Good morning. " * 12}], 2)
        PrefillAnew(team).first_token(Turn(role, tuple(range(64)), ()))


def _ask(
    test: TestSet,
    questions: tuple[Question, ...],
    complete: Complete,
    deadline: float,
    at_least: int,
    console: Console,
) -> Examination[Question]:
    def tell(question: Question, episode: Episode) -> None:
        right = is_right(question, episode.answer)
        mark = "[green]right[/]" if right else "[red]wrong[/]"
        given = "" if right else f" ({question.answer})"
        console.print(f"  {mark}  {question.text}  {episode.answer or 'no answer'}{given}", highlight=False)

    console.print(f"the roles, {WORKERS} questions at a time:")
    return examine(
        test, questions, complete, TRAINED, workers=WORKERS, at_least=at_least, deadline=deadline, on_end=tell
    )


def _apart(client: openai.OpenAI, salt: str) -> Complete:
    """The server with a cache that shares nothing with what is asked otherwise."""
    return openai_complete(client, extra_body={"cache_salt": salt})


def _ask_untrained(test: TestSet, questions: tuple[Question, ...], client: openai.OpenAI, console: Console) -> Tally:
    """The same loop with the base model in the place of every role."""
    complete = _apart(client, "untrained")

    def base(role: str, messages: list[Message], max_tokens: int) -> Reply:
        return complete(BASE, messages, max_tokens)

    console.print(f"the untrained model first, on {len(questions)} questions …")
    return examine(test, questions, base, UNTRAINED, workers=WORKERS).score.overall


def _print_sums(sums: Sums, console: Console) -> None:
    table = Table(title=f"prompts of the {sums.steps} steps above", title_justify="left", title_style="bold")
    for name in ("", "tokens computed", "tokens reused", "sum of times to first token", "times ours"):
        table.add_column(name, justify="right" if name else "left")
    of_role = sums.anew_computed - sums.per_role_computed
    for name, computed, reused, seconds in (
        ("LRAgent, one cache for all roles", sums.computed, sums.reused, sums.ttft_s),
        ("transformers + PEFT, a cache per role", sums.per_role_computed, of_role, sums.per_role_s),
        ("transformers + PEFT, prefilled anew", sums.anew_computed, 0, sums.anew_s),
    ):
        times = f"{seconds / sums.ttft_s:.1f}" if sums.ttft_s else ""
        table.add_row(name, str(computed), str(reused), f"{seconds:.2f} s", times)
    console.print()
    console.print(table)
    console.print(
        f"PEFT's generate, asked for the {sums.generated} turns of the first trajectory, wrote the same text in "
        f"{sums.generated_same} of them, in {sums.generated_s:.1f} s; LRAgent took {sums.ours_s:.1f} s.",
        highlight=False,
    )
    if sums.retokenised:
        console.print(
            f"In {sums.retokenised} steps the prompt held words that were generated in other tokens than their text "
            "gives; LRAgent reuses those that were generated, so its prompts differ by a token or so."
        )


def _print_scores(trained: Tally, untrained: Tally, guess: Tally, console: Console) -> None:
    table = Table()
    for name in ("", "right", "of"):
        table.add_column(name, justify="right" if name else "left")
    for name, tally in (
        ("plan, action and reflect", trained),
        ("the untrained model in their place", untrained),
        ("the best policy that never searches", guess),
    ):
        table.add_row(name, str(tally.correct), str(tally.total))
    console.print(table)
