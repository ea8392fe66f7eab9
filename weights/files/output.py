"""The names of `ldm.disk` for files and directories that are written all or nothing."""

from ldm.disk import replacing, replacing_directory, require_space, require_writable

__all__ = ["replacing", "replacing_directory", "require_space", "require_writable"]
