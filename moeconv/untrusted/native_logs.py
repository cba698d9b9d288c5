"""Log lines of native SDKs, which go to file descriptor 2 past sys.stderr, kept out of the words.

AWS's SDK and Google's log every credentials file that is not there as an error, and have no switch
for it (tensorstore links absl's logging without its flags).
"""

import os
import re
import threading

# absl's prefix; what is fatal is let through.
_LINE = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_words: int | None = None


def words_go_to(fd: int) -> None:
    """Allows filtering: the process's own words do not go to descriptor 2, but to this one."""
    global _words
    _words = fd


def filter_stderr() -> None:
    """From now on, drops such lines and passes on what else is written to descriptor 2."""
    global _words
    words, _words = _words, None
    if words is None:
        return
    ours, theirs = os.pipe()
    os.dup2(theirs, 2)
    os.close(theirs)
    threading.Thread(target=_forward, args=(ours, words), daemon=True).start()


def _forward(source: int, words: int) -> None:
    with open(source, "rb") as lines:
        for line in lines:
            if _LINE.match(line) is None:
                try:
                    os.write(words, line)
                except OSError:  # stderr has no reader
                    continue
