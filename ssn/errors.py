"""The one exception type whose message is meant for the person at the keyboard."""


class SSNError(Exception):
    """A problem the user can mend.

    The message is one line that names the file, key or URI at fault and the way out. The command lines print it as
    ``error: <message>`` and exit with status 2; everything else is a bug and keeps its traceback.
    """
