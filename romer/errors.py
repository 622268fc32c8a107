"""The one exception for bad input: its message is a single line that names the culprit, what was found and what was
expected.

Stages turn it into that line on stderr and exit code 2; library users catch it as a ValueError.
"""


class InputError(ValueError):
    """Bad input from a user: a wrong name, value, file or artifact. The message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
