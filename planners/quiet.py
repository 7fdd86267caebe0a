"""nnU-Net prints as it works; its words go to the debug log instead of the user's screen."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

logger = logging.getLogger("autoseg.nnunet")


@contextlib.contextmanager
def nnunet_quiet() -> Iterator[None]:
    """Send what is printed inside the block to the logger `autoseg.nnunet` at debug level; warnings are dropped."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        text = captured.getvalue().strip()
        if text:
            logger.debug(text)
