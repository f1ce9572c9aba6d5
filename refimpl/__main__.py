"""`python -m refimpl` and the `refimpl` command."""

from __future__ import annotations

import sys

from refimpl.core.errors import RefimplError


def main() -> None:
    """Run the command line; print what the user can do about an error, without a traceback."""
    try:
        from refimpl.cli import app

        app(prog_name="refimpl")
    except KeyboardInterrupt:  # before the command line could catch it
        sys.exit(130)
    except (RefimplError, OSError) as error:  # of the system: no such file, no permission, disk full
        print(f"refimpl: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
