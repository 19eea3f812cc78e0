"""Errors as one line for the user."""


def in_words(error: BaseException, more: str) -> str:
    """An error as one line; of one that was not foreseen, its type and how to see more.

    Args:
        more: what shows where it comes from.

    >>> in_words(ValueError("row 3: no\\n  time"), "run again with --debug")
    'row 3: no time'
    >>> in_words(KeyError("time"), "run again with --debug")
    "unexpected KeyError: 'time'; run again with --debug to see where it comes from"
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())  # those of libraries may have many lines
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError):  # the last: of an optional package
        return text
    return f"unexpected {type(error).__name__}: {text}; {more} to see where it comes from"
