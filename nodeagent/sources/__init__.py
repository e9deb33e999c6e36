"""Sources: where the documents come from, and which of them are in force.

This package owns reading configuration from the outside world. It promises that whatever happens
there (a bad document, an unreadable file, a source that is gone), the last good state stays in
force and the problem is visible; and that no document takes over what another one holds. It may
not interpret documents.
"""

from nodeagent.sources._last_good import LastGood
from nodeagent.sources._source import Source, SourceState
from nodeagent.sources.files import FilesSource

__all__ = ["FilesSource", "LastGood", "Source", "SourceState"]
