"""Made-up rows in AutoAct's format."""

from __future__ import annotations

from typing import Any

VERDICT = "Answer is CORRECT"
"""What the environment says last; nobody may ever read it."""

Step = tuple[str, str, str]
"""Thought, action, observation."""


def row(question: str, answer: str, steps: list[Step], **more: Any) -> dict[str, Any]:
    """A row with `steps`, numbered from 1."""
    lines = [
        f"Thought {number}: {thought}\nAction {number}: {action}\nObservation {number}: {observation}"
        for number, (thought, action, observation) in enumerate(steps, 1)
    ]
    prompt = "\n".join([f"Tools are described here.\nQuestion: {question}\n\n", *lines])
    whole = {"question": question, "answer": answer, "correct": True, "reward": 1.0, "halted": False, "error": ""}
    return {**whole, "prompt": prompt, **more}


def about(lake: str, depth: str, **more: Any) -> dict[str, Any]:
    """A row that searches for a lake, reads on, answers and judges the answer right."""
    page = f"{lake} is a lake. It lies in the hills. The depth of {lake} is {depth} m. Its depth varies by season."
    return row(
        f"How deep is {lake}?",
        depth,
        [
            (f"I need {lake}.", f"Retrieve[{lake}]", page),
            ("How deep is it?", "Lookup[depth]", f"(Result 1/2) The depth of {lake} is {depth} m."),
            ("That is it.", f"Finish[{depth}]", "Please reflect your answer."),
            ("The page says so.", "Reflect[right]", VERDICT),
        ],
        **more,
    )
