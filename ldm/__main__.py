"""The command line, `ldm` or `python -m ldm`: arguments in, pictures and exit codes out."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from ldm.cli import COMMANDS, arguments, terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, as listed in terminal.EXIT_CODES. Errors are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name or prompt is unprintable
    spelled: Mapping[str, str] = {}
    try:
        with terminal.warnings_in_a_line(), terminal.termination_as_exception():
            args = arguments.parse(COMMANDS, argv)
            spelled = args.spelled
            args.run(args)
            return 0
    except SystemExit as done:  # --help, --version
        return done.code if isinstance(done.code, int) else 0
    except BrokenPipeError:  # the interpreter would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, terminal.Terminated) as stop:
        terminal.say("ldm: stopped; the pictures listed are complete")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except Exception as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        text, code = terminal.explain(error, spelled)
        terminal.say(f"ldm: error: {text}")
        return code


if __name__ == "__main__":
    sys.exit(main())
