"""The logger "jfog": its level from the environment, and the rank in each record."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

LEVELS = ("debug", "info", "warning", "error")

_rank: int | None = None


class _Logger(logging.LoggerAdapter):
  """Puts the rank in front of each message, for the handlers of the user as well."""

  def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
    return msg if _rank is None else f"rank {_rank}: {msg}", kwargs


logger = _Logger(logging.getLogger("jfog"), {})


def set_rank(rank: int | None) -> None:
  """Sets the rank of the records to come; None in a world of one."""
  global _rank
  _rank = rank


def level_of(environ: Mapping[str, str]) -> str:
  """The value of `JFOG_LOG_LEVEL`, in lower case; "" if it is not set.

  Raises:
    ValueError: for another word.

  Example:
    >>> level_of({"JFOG_LOG_LEVEL": "INFO"})
    'info'
  """
  text = environ.get("JFOG_LOG_LEVEL", "")
  if text and text.lower() not in LEVELS:
    raise ValueError(
      f"JFOG_LOG_LEVEL={text!r} is not a level; set it to one of "
      f"{', '.join(LEVELS)}, or unset it."
    )
  return text.lower()


def configure(environ: Mapping[str, str]) -> None:
  """Applies `JFOG_LOG_LEVEL`: the level, and a handler that writes to stderr.

  Without the variable levels and handlers are the program's own. With it records
  are not passed on to the root logger, whose handlers would print them again.

  Raises:
    ValueError: for another word than a level.
  """
  level = level_of(environ)
  if not level:
    return
  logger.logger.setLevel(level.upper())
  if not any(isinstance(each, _Handler) for each in logger.logger.handlers):
    logger.logger.addHandler(_Handler())
    logger.logger.propagate = False


class _Handler(logging.StreamHandler):
  """Writes `jfog: 12:30:01.250 info: rank 0: ...` to the stderr of the moment."""

  def emit(self, record: logging.LogRecord) -> None:
    self.stream = sys.stderr  # may have been replaced, as in a notebook
    super().emit(record)

  def format(self, record: logging.LogRecord) -> str:
    time = self._formatter.formatTime(record, "%H:%M:%S")
    level = record.levelname.lower()
    return f"jfog: {time}.{record.msecs:03.0f} {level}: {record.getMessage()}"

  _formatter = logging.Formatter()
