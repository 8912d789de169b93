"""An agent of three roles, by OpenAI's client: plan decides, action says what to search for, reflect judges the answer.

python examples/openai_agent.py --base-url http://127.0.0.1:8000/v1
"""

import argparse
import re
from typing import Any

import openai

PAGES = {
    "Zenvor": "A company. The founder is Milbek. The seat is Holpox.",
    "Milbek": "A person. The birthplace is Tamnex. The profession is baker.",
    "Tamnex": "A city. The country is Hurwen. The mayor is Ferzek.",
    "Holpox": "A city. The country is Linrath. The mayor is Silvol.",
}
SYSTEM = "Tools: Search, Lookup, Finish."  # as the demo's roles were trained


def search(query: str) -> str:
    """The page that has most words in common with `query`; those of a title count three times."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    asked = words(query)
    scores = {title: 3 * len(asked & words(title)) + len(asked & words(text)) for title, text in PAGES.items()}
    best = max(scores, key=scores.__getitem__)
    return f"{best}: {PAGES[best]}" if scores[best] else "No page found."


class Agent:
    """One conversation, which all roles read and write. Whoever speaks finds in the cache what the others left."""

    def __init__(self, client: openai.OpenAI, question: str, max_tokens: int) -> None:
        self._client, self._max_tokens = client, max_tokens
        self._messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]

    def speak(self, role: str) -> str:
        """Lets `role` say what comes next. Its name goes with the message, so that its cache is found again."""
        answer = self._client.chat.completions.create(
            model=role, messages=self._messages, max_tokens=self._max_tokens, temperature=0
        )
        text = answer.choices[0].message.content or ""
        self._messages.append({"role": "assistant", "name": role, "content": text})
        prompt, cached = answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens
        print(f"{role}: {text!r} [{prompt - cached} tokens computed, {cached} reused]")
        return text

    def hear(self, tool_output: str) -> None:
        self._messages.append({"role": "tool", "content": tool_output})
        print(f"tool: {tool_output!r}")

    def run(self, turns: int) -> str:
        """Searches until plan wants to finish and reflect agrees; after `turns` the last answer has to do."""
        for turn in range(1, turns + 1):
            finish = self.speak("plan").rstrip(" .").endswith("Finish") or turn == turns
            argument = self.speak("action").strip()
            if not finish:
                self.hear(search(argument))
            elif self.speak("reflect").rstrip(" .").endswith("right"):
                break
        return argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--question", default="Where was the founder of Zenvor born?")
    parser.add_argument("--turns", type=int, default=6, help="of plan and action, at most")
    parser.add_argument("--max-tokens", type=int, default=48, help="of one answer")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error("--turns must be at least 1")
    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    print(f"answer: {Agent(client, args.question, args.max_tokens).run(args.turns)}")


if __name__ == "__main__":
    main()
