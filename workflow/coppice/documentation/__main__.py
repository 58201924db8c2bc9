"""`python -m coppice.documentation [--check]`."""

from __future__ import annotations

import argparse

from coppice.documentation.generated import outdated_files, write_files


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates the files that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    if not parser.parse_args().check:
        write_files()
    elif outdated := outdated_files():
        names = " and ".join(map(str, outdated))
        raise SystemExit(f"error: {names} out of date; run `python -m coppice.documentation`.")


if __name__ == "__main__":
    main()
