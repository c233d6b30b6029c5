"""The way in from the shell: `trilevel` and `python -m trilevel`."""

from __future__ import annotations

import sys

from trilevel.cli.exits import INTERRUPTED, USAGE_ERROR
from trilevel.errors import MissingExtraError, require


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        require("typer", extra="cli")
        require("rich", extra="cli")
        from trilevel.cli.main import app

        app()
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
