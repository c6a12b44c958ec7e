"""How a process that a launcher starts runs its test and ends."""

import os
import traceback
from collections.abc import Callable

from modeling_uhop.training.processes import leave_process_group


def run_worker(main: Callable[[], None]) -> None:
    """Call a function and leave the process group; after an error, print it and exit with status 1."""
    try:
        main()
        leave_process_group()
    except Exception:
        traceback.print_exc()
        # Because the traceback refers to the process group, and an exit that frees the group can
        # hang, we exit without freeing it.
        os._exit(1)
