"""How an entry script ends: user errors as one line and status 2, and the process group always taken down."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from tinytron.errors import TinytronError

_GRACE_SECONDS = 5.0


def run(main: Callable[[], None]) -> None:
    """Call ``main``; on a ``TinytronError`` print ``error: ...`` and exit with status 2, without a traceback."""
    try:
        main()
    except TinytronError as error:
        # All ranks raise the same error. Local rank 0 says it; the others give the launcher time to stop them.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_GRACE_SECONDS)
        sys.stdout.flush()
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        os._exit(2)  # not sys.exit: a peer may be inside a collective, and taking the group down would wait for it
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except SystemExit as end:
        if not end.code:  # a run that was asked to stop, and has saved
            _leave_the_others()
        raise
    _leave_the_others()


def _leave_the_others() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _one_line(error: TinytronError) -> str:
    """The message; a data loader's worker process wraps it in its traceback, of which it is the last line."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
