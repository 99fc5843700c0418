"""The one error type that users see, printed as one line by the command line."""


class MlxSvdError(Exception):
    """Bad input. The message is one line that names the file or tensor and the remedy."""
