"""`python -m mistral_ref` and the command `mistral-ref`: Ctrl-C ends both without a traceback, at any moment.

Python turns Ctrl-C into a KeyboardInterrupt. That must not happen while a module is imported: an extension module that
is interrupted may raise an ImportError instead, or print the interrupt and go on. So Ctrl-C ends the process at once
during an import, and when the command has ended. Nothing is imported before this is set.

While a kernel is compiled, C calls functions of llvmlite's back. Python prints an exception in such a function, and
goes on. So Ctrl-C waits until the function has returned.
"""

from __future__ import annotations

import os
import sys

try:
    import signal
except KeyboardInterrupt:
    os._exit(130)

TYPE_CHECKING = False  # typing's own would be an import
if TYPE_CHECKING:
    from types import FrameType


def main() -> int:
    """Run the command of sys.argv and return its exit status; 130 for Ctrl-C."""
    heeds_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `nohup` and `&` have it ignored
    try:
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, _interrupt)
        from mistral_ref import cli  # noqa: PLC0415

        return cli.main()
    except KeyboardInterrupt:
        return 130
    finally:
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, a moment later in a function that C calls; end the process during an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(130)
        if frame.f_code.co_name.startswith("_raw_object_cache_"):
            import threading  # noqa: PLC0415

            threading.Timer(0.01, signal.raise_signal if os.name == "nt" else _press, [number]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _press(number: int) -> None:
    os.kill(os.getpid(), number)  # unlike raise_signal in another thread, this also wakes a thread that waits


if __name__ == "__main__":
    sys.exit(main())
