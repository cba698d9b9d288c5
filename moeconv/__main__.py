"""`python -m moeconv`: the command line."""

from moeconv.cli.start import main

if __name__ == "__main__":
    main()
