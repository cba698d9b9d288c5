"""What an exception says, as part of a sentence."""


def first_line(error: BaseException | None) -> str:
    """The first line that it says; for pydantic's, the first field that is wrong."""
    details = getattr(error, "errors", None)
    if callable(details):
        first = details()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
