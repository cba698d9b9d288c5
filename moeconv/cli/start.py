"""Where the process begins: a signal that ends it is met from here on, before anything is imported.

SIGTERM and a terminal that closes end a command as Ctrl-C does: in order, with a word.
"""

import signal
import sys

INTERRUPTED = 130


def end_as_ctrl_c() -> None:
    """Makes both raise KeyboardInterrupt, but for one that the caller ignores (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def main() -> None:
    """The console script."""
    try:
        end_as_ctrl_c()
        from moeconv.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
