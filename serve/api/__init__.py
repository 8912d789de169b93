"""The HTTP side: OpenAI's endpoints over one engine service. Only this package knows HTTP."""
