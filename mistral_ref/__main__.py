"""`python -m mistral_ref` and the command `mistral-ref`: Ctrl-C ends both without a traceback, at any moment.

Python turns Ctrl-C into a KeyboardInterrupt. That must not happen while modules are imported: an extension module that
is interrupted may raise an ImportError instead, or print the interrupt and go on. So Ctrl-C ends the process at once
until the command begins, and again after it has ended. Nothing is imported before this is set.
"""

from __future__ import annotations

import os
import sys

try:
    import signal
except KeyboardInterrupt:
    os._exit(130)


def main() -> int:
    """Run the command of sys.argv and return its exit status; 130 for Ctrl-C."""
    heeds_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `nohup` and `&` have it ignored
    try:
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        from mistral_ref import cli  # noqa: PLC0415

        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return cli.main()
    except KeyboardInterrupt:
        return 130
    finally:
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))


if __name__ == "__main__":
    sys.exit(main())
