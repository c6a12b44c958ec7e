"""One process or several: what a launcher such as torchrun started."""

import gc

from accelerate import PartialState
from accelerate.utils.environment import get_int_from_env

from .errors import RecipeError


def refuse_several_processes(remedy: str = "start it with `python`, not with `accelerate launch` or `torchrun`") -> None:
    """Raise a `RecipeError` if a launcher started this command in several processes.

    Every process would do the same work and write the same files.
    """
    count = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if count > 1:
        raise RecipeError(f"this command runs in one process, but was started in {count}; {remedy}")


def is_first_process() -> bool:
    """Whether this is the first process of a launcher, or the only one."""
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0


def leave_process_group() -> None:
    """Wait for all training processes, then close their process group, if there is one.

    Unused objects that still refer to the group, such as the reducer of a wrapped model, are freed
    first. If the interpreter freed them later, it would end the thread of gloo while it holds a
    lock that the main thread may wait for, and the process would never exit."""
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
