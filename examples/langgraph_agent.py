"""An agent of three roles as a LangGraph graph: plan and action search, reflect judges the answer.

    python examples/langgraph_agent.py --base-url http://127.0.0.1:8000/v1

Each role is a node with a `ChatOpenAI` of its own, whose `model` names the role. The server's answer brings the role in
`name`, ChatOpenAI keeps that in the AIMessage and sends it back with the conversation: all roles then share one cache.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

PAGES = {
    "Zenvor": "A company. The founder is Milbek. The seat is Holpox.",
    "Milbek": "A person. The birthplace is Tamnex. The profession is baker.",
    "Tamnex": "A city. The country is Hurwen. The mayor is Ferzek.",
    "Holpox": "A city. The country is Linrath. The mayor is Silvol.",
}
SYSTEM = "Tools: Search, Lookup, Finish."  # as the demo's roles were trained


class State(MessagesState):
    """The conversation, and how often plan has spoken."""

    turns: int


def search(state: State) -> dict[str, Any]:
    """The tool: the page that has most words in common with what action said; a title's count three times."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    asked = words(state["messages"][-1].text)
    scores = {title: 3 * len(asked & words(title)) + len(asked & words(text)) for title, text in PAGES.items()}
    best = max(scores, key=scores.__getitem__)
    found = f"{best}: {PAGES[best]}" if scores[best] else "No page found."
    return {"messages": [ToolMessage(found, tool_call_id="search")]}  # the call itself is action's text


def speaker(role: str, base_url: str, max_tokens: int) -> Callable[[State], dict[str, Any]]:
    """The node of `role`."""
    model = ChatOpenAI(model=role, base_url=base_url, api_key="none", temperature=0, max_tokens=max_tokens)

    def speak(state: State) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])], "turns": state["turns"] + (role == "plan")}

    return speak


def build(base_url: str, turns: int, max_tokens: int) -> Any:
    """The graph: plan, action, then the tool or reflect, and back to plan, `turns` times at most."""

    def finishing(state: State) -> bool:
        plan = next(message for message in reversed(state["messages"]) if message.name == "plan")
        return plan.text.rstrip(" .").endswith("Finish") or state["turns"] >= turns

    def ended(state: State) -> bool:
        return state["messages"][-1].text.rstrip(" .").endswith("right") or state["turns"] >= turns

    graph = StateGraph(State)
    for role in ("plan", "action", "reflect"):
        graph.add_node(role, speaker(role, base_url, max_tokens))
    graph.add_node("search", search)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "action")
    graph.add_conditional_edges("action", lambda state: "reflect" if finishing(state) else "search")
    graph.add_edge("search", "plan")
    graph.add_conditional_edges("reflect", lambda state: END if ended(state) else "plan")
    return graph.compile()


def show(message: AIMessage | ToolMessage) -> None:
    """One step: who spoke, what was said, and what of the prompt was reused."""
    if isinstance(message, ToolMessage):
        print(f"tool: {message.text!r}")
        return
    prompt, cached = message.usage_metadata["input_tokens"], message.usage_metadata["input_token_details"]["cache_read"]
    print(f"{message.name}: {message.text!r} [{prompt - cached} tokens computed, {cached} reused]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--question", default="Where was the founder of Zenvor born?")
    parser.add_argument("--turns", type=int, default=6, help="of plan and action, at most")
    parser.add_argument("--max-tokens", type=int, default=48, help="of one answer")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error("--turns must be at least 1")
    asked = {"messages": [SystemMessage(SYSTEM), HumanMessage(args.question)], "turns": 0}
    graph, answer = build(args.base_url, args.turns, args.max_tokens), ""
    for update in graph.stream(asked, {"recursion_limit": 4 * args.turns + 4}, stream_mode="updates"):
        for message in next(iter(update.values()))["messages"]:
            show(message)
            answer = message.text.strip() if message.name == "action" else answer
    print(f"answer: {answer}")


if __name__ == "__main__":
    main()
