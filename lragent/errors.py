"""The errors that a user may see.

A `UserError` carries one clear sentence that names the field or file and the mend. Commands print it and exit with
a non-zero status, the server turns it into an OpenAI-shaped body; neither shows a traceback for it.
"""


class LRAgentError(Exception):
    """Base of all errors that LRAgent raises on purpose."""


class UserError(LRAgentError):
    """Bad input: a file, a field or an option that the user can mend."""
