"""Errors that the user can correct: one line instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RecipeError(ValueError):
    """A recipe, a data set or a command line that cannot be used. The message is one line."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with a one-line message instead of a traceback for errors that the user can correct.

    These are wrong input, a full disk, a data loading process that was killed, and Ctrl-C.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, NotImplementedError, StrictDataclassError, SafetensorError) as error:
        sys.exit(_in_one_line(error))
    except RuntimeError as error:
        # Because PyTorch raises a plain RuntimeError for a failed write and for a killed data
        # loading worker, we recognise them by text.
        if not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "DataLoader worker")):
            raise
        sys.exit(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())
