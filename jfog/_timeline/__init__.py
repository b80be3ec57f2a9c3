"""The timeline: spans of Python and operations of the native core, over all ranks.

Each rank writes a part, a file of lines of JSON, while it runs; merging them makes a
file in Chrome's trace format. Reading and merging use the standard library alone,
since the launcher merges, too.
"""

from ._merge import add_profile as add_profile
from ._merge import find_parts as find_parts
from ._merge import merge as merge
from ._merge import merge_folder as merge_folder
from ._recorder import EVENTS as EVENTS
from ._recorder import Recorder as Recorder
from ._recorder import span as span
