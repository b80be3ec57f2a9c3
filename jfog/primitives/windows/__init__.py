"""Windows: slots that in-neighbors write asynchronously."""

from jfog.primitives.windows._free import win_free as win_free
from jfog.primitives.windows._interface import win_accumulate as win_accumulate
from jfog.primitives.windows._interface import (
  win_accumulate_start as win_accumulate_start,
)
from jfog.primitives.windows._interface import (
  win_associated_p as win_associated_p,
)
from jfog.primitives.windows._interface import win_create as win_create
from jfog.primitives.windows._interface import win_get as win_get
from jfog.primitives.windows._interface import win_get_start as win_get_start
from jfog.primitives.windows._interface import win_put as win_put
from jfog.primitives.windows._interface import win_put_start as win_put_start
from jfog.primitives.windows._interface import win_update as win_update
from jfog.primitives.windows._interface import (
  win_update_then_collect as win_update_then_collect,
)
from jfog.primitives.windows._interface import win_version as win_version
from jfog.primitives.windows._missing import win_missing as win_missing
from jfog.primitives.windows._mutex import win_mutex as win_mutex
from jfog.primitives.windows._window import Window as Window
