"""The part of libbpf that the capture needs.

Every function raises OSError with errno and libbpf's own words. Descriptors that are returned are
close-on-exec and the caller's to close; descriptors that are passed stay the caller's.
"""

from typing import Final

MAP_TYPE_ARRAY: Final[int]
MAP_TYPE_HASH: Final[int]
MAP_TYPE_PERCPU_ARRAY: Final[int]
MAP_TYPE_SOCKHASH: Final[int]
MAP_TYPE_SOCKMAP: Final[int]

class Object:
    """A BPF object file in memory: open, set maps, load once, take descriptors."""

    def __init__(self, data: bytes, name: str) -> None: ...
    def reuse_map(self, name: str, fd: int) -> None:
        """Use an existing map instead of creating one. Raises OSError if its shape differs."""
    def load(self) -> None: ...
    def program(self, name: str) -> int: ...
    def instructions(self, name: str) -> bytes:
        """Return a loaded program's instructions; valid while the object is open."""
    def map(self, name: str) -> int: ...
    def close(self) -> None:
        """Close the object's own descriptors; what was attached or pinned stays."""

def create_map(
    kind: int, name: str, key_size: int, value_size: int, max_entries: int, /
) -> int: ...
def update_map(fd: int, key: bytes, value: bytes, fresh: bool = False, /) -> None:
    """Set an entry. Sizes of `key` and `value` must be those of the map.

    `fresh` says that there must be none yet: FileExistsError if there is.
    """

def delete_map(fd: int, key: bytes, /) -> None: ...
def read_map(fd: int, key: bytes, size: int, /) -> bytes:
    """Return an entry; `size` must be at least what the kernel writes."""

def next_key(fd: int, after: bytes | None, size: int, /) -> bytes | None:
    """Return the key of `size` bytes after `after` (None: the first), None at the end."""

def map_id(fd: int, /) -> int: ...
def map_info(fd: int, /) -> tuple[int, int, int, int]:
    """Return type, key size, value size and number of entries."""

def load_sk_lookup(name: str, instructions: bytes, /) -> int:
    """Load a program of that type from instructions alone. Returns its descriptor."""

def program_id(fd: int, /) -> int: ...
def link_info(fd: int, /) -> tuple[int, int]:
    """Return program id and inode of the network namespace, 0 when the namespace is gone.

    Raises ValueError for a link of another kind.
    """

def next_link(after: int, /) -> int | None:
    """Return the id of the kernel's next link after `after` (0: the first), None at the end."""

def open_link(number: int, /) -> int:
    """Return a descriptor of the link with that id. FileNotFoundError once it is gone."""

def program_name(number: int, /) -> str:
    """Return the name of the program with that id. FileNotFoundError once it is gone."""

def link_netns(program: int, netns: int, /) -> int:
    """Attach an sk_lookup program to a network namespace. Returns the link."""

def update_link(link: int, program: int, /) -> None: ...
def pin(fd: int, path: str, /) -> None: ...
def get_pinned(path: str, /) -> int: ...
def file_system(path: str, /) -> int:
    """Return the magic number of the file system that `path` is on (f_type of statfs(2))."""

def run_iterator(program: int, /) -> None:
    """Run an iterator program over what it iterates, in this thread's network namespace."""
