"""The outward form of trajectories, which training data and the agent loop must agree on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a trajectory is cut into messages."""

    system: str
    """Text of the system message; empty for none."""
    split_turns: bool = False
    """Whether thought and tool name, reason and verdict, are turns of their own, as in the paper."""
