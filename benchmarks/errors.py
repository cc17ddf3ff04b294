"""The error that ends in one clear line; imports nothing, so that every room can raise it."""


class UsageError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""
