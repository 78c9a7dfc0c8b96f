"""A disk shared by all hosts: real files, of which a power cut leaves what was synchronised, and some of the rest.

Files are as POSIX promises: what was written is there after fsync of the file, and its name after fsync of the folder.
"""

import errno
import io
import os
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.simulation.world import World


class _Entry:
    """A file or folder: what is on the disk of it.

    Attributes:
        host: who has changed it last.
        kept: a file's contents on the disk; None if none of it is.
        names: a folder's entries.
        kept_names: a folder's entries on the disk.
        last: a file's contents when its last name was removed.
    """

    def __init__(self, is_folder: bool, host: str) -> None:
        self.is_folder, self.host = is_folder, host
        self.kept: bytes | None = None
        self.names: dict[str, _Entry] = {}
        self.kept_names: dict[str, _Entry] = {}
        self.last: bytes | None = None


class _FullFile:
    """A file for whose contents there is no room; the error does not say which file it is."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_FullFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: Any) -> None:
        """Fails."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """The files below a folder.

    Args:
        world: whose processes use them.
        root: an empty folder.
        seed: decides what a power cut leaves.

    Attributes:
        full_until: when there is room again.
        lies_until: when it does again what it says.
    """

    def __init__(self, world: World, root: Path, seed: str) -> None:
        self._world, self._root, self._random = world, str(root), random.Random(seed)
        self._top = _Entry(is_folder=True, host="")
        self._handles: dict[int, str] = {}
        self.full_until = self.lies_until = 0.0  # of simulated time
        self._real = {name: getattr(os, name) for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "open")}
        self._real_open = io.open

    def changes(self) -> list[tuple[Any, str, Any]]:
        """For patched(): the functions of Python that the disk replaces."""
        mine = {name: getattr(self, name) for name in self._real}
        return [
            (io, "open", self.open_file),
            *((os, name, function) for name, function in mine.items()),
            (shutil, "rmtree", self.rmtree),
        ]

    def _inside(self, path: Any) -> str | None:
        """The path below the root; None if it is elsewhere, or no simulated process asks."""
        if self._world.current.process is None or isinstance(path, int):
            return None
        path = os.fspath(path)
        return path[len(self._root) + 1 :] if f"{path}/".startswith(f"{self._root}/") else None

    def _entry(self, place: str) -> _Entry | None:
        entry: _Entry | None = self._top
        for name in place.split("/") if place else ():
            entry = entry.names.get(name) if entry else None
        return entry

    def names(self, place: str) -> list[str]:
        """The names in a folder."""
        entry = self._entry(place)
        return list(entry.names) if entry else []

    def _parent(self, place: str) -> tuple[_Entry, str]:
        folder, _, name = place.rpartition("/")
        parent = self._entry(folder)
        if parent is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self._root}/{place}")
        return parent, name

    def _host(self) -> str:
        process = self._world.current.process
        return process.host if process else ""

    def _before(self, place: str, takes_room: bool) -> None:
        """Other tasks may run before a change, and the disk may be full."""
        self._world.pause()
        if takes_room and self._world.now < self.full_until:
            self._world.say(f"the disk is full: {place}")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{self._root}/{place}")

    def _is_full(self, place: str) -> bool:
        """Whether a file can be made, but not be written, as is usual where a disk is full."""
        if self._world.now >= self.full_until or self._random.random() < 0.5:
            return False
        self._world.say(f"there is no room for {place}")
        return True

    def open_file(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Opens a file, as open() does."""
        place = self._inside(path)
        if place is None or not set(mode) & set("wax+"):
            return self._real_open(path, mode, *args, **kwargs)
        is_full = self._is_full(place)
        self._before(place, takes_room=not is_full)
        file = self._real_open(path, mode, *args, **kwargs)
        folder, name = self._parent(place)
        folder.names.setdefault(name, _Entry(is_folder=False, host="")).host = self._host()
        folder.host = self._host()
        self._handles[file.fileno()] = place
        if process := self._world.current.process:
            process.files.append(weakref.ref(file))
        return _FullFile(file) if is_full else file

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        """Opens a file, as os.open() does; the code under test only reads so."""
        handle: int = self._real["open"](path, flags, *args, **kwargs)
        place = self._inside(path)
        if place is not None:
            self._handles[handle] = place
        return handle

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Makes a folder."""
        place = self._inside(path)
        if place is not None:
            self._before(place, takes_room=True)
        self._real["mkdir"](path, *args, **kwargs)
        if place is not None:
            folder, name = self._parent(place)
            folder.names[name], folder.host = _Entry(is_folder=True, host=self._host()), self._host()

    def rename(self, source: Any, target: Any) -> None:
        """Renames a file or folder."""
        old, new = self._inside(source), self._inside(target)
        if old is not None:
            self._before(old, takes_room=False)
        self._real["rename"](source, target)
        if old is not None and new is not None:
            (folder, name), (to_folder, to_name) = self._parent(old), self._parent(new)
            to_folder.names[to_name] = folder.names.pop(name)
            folder.host = to_folder.host = self._host()

    def unlink(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Removes a file."""
        self._remove(path, self._real["unlink"], *args, **kwargs)

    def rmdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Removes a folder."""
        self._remove(path, self._real["rmdir"], *args, **kwargs)

    def _remove(self, path: Any, remove: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        place = self._inside(path)
        if place is None:
            remove(path, *args, **kwargs)
            return
        self._before(place, takes_room=False)
        folder, name = self._parent(place)
        entry = folder.names.get(name)
        if entry and not entry.is_folder:
            entry.last = self._content(path)
        remove(path, *args, **kwargs)
        folder.names.pop(name, None)
        folder.host = self._host()

    def rmtree(self, path: Any, ignore_errors: bool = False) -> None:
        """Removes a folder with all that is in it, a file at a time."""
        if ignore_errors and not os.path.isdir(path):
            return
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                self.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(path)

    def fsync(self, handle: int) -> None:
        """What was written is on the disk from now on."""
        place = self._handles.get(handle)
        if place is None or self._world.current.process is None:
            return
        self._before(place, takes_room=False)
        entry = self._entry(place)
        if self._world.now < self.lies_until:
            return
        if entry and entry.is_folder:
            entry.kept_names = dict(entry.names)
        elif entry:
            entry.kept = self._content(f"{self._root}/{place}")

    def _content(self, path: Any) -> bytes:
        with self._real_open(path, "rb") as file:
            content: bytes = file.read()
        return content

    def remove(self, name: str) -> None:
        """A user removes a folder below the root."""
        self._destroy(f"{self._root}/{name}")
        del self._top.names[name]

    def cut_power(self, hosts: set[str]) -> None:
        """What these hosts have written and not synchronised may be lost."""
        self._world.say(f"power cut at {', '.join(sorted(hosts))}")
        self._lose(self._top, self._root, hosts)

    def _lose(self, folder: _Entry, path: str, hosts: set[str]) -> None:
        if folder.host in hosts:
            self._lose_names(folder, path)
        for name, entry in folder.names.items():
            if entry.is_folder:
                self._lose(entry, f"{path}/{name}", hosts)
            elif entry.host in hosts:
                self._lose_content(entry, f"{path}/{name}")
                entry.kept = self._content(f"{path}/{name}")
        folder.kept_names = dict(folder.names)

    def _lose_names(self, folder: _Entry, path: str) -> None:
        """Each change of names since the last fsync of a folder is on the disk, or not; a renaming is one change."""
        old_names = {entry: name for name, entry in folder.kept_names.items()}
        new_names = {entry: name for name, entry in folder.names.items()}
        for entry in [*old_names, *(entry for entry in new_names if entry not in old_names)]:
            old, new = old_names.get(entry), new_names.get(entry)
            if old == new or self._random.random() < 0.5:
                continue
            if old is not None and old in folder.names and folder.names[old] is not entry:
                continue  # another entry has this name by now
            if new is None and old is not None:
                self._bring_back(entry, f"{path}/{old}")
                folder.names[old] = entry
            elif new is not None and old is None:
                self._destroy(f"{path}/{new}")
                del folder.names[new]
            elif new is not None and old is not None:
                self._real["rename"](f"{path}/{new}", f"{path}/{old}")
                folder.names[old] = folder.names.pop(new)

    def _bring_back(self, entry: _Entry, path: str) -> None:
        """A removed file or folder is there again; of a folder, those entries whose removal was lost, too."""
        if not entry.is_folder:
            with self._real_open(path, "wb") as file:
                file.write(entry.kept if entry.kept is not None else entry.last or b"")
            return
        self._real["mkdir"](path)
        entry.names = {}
        for name, child in entry.kept_names.items():
            if self._random.random() < 0.5:
                self._bring_back(child, f"{path}/{name}")
                entry.names[name] = child

    def _destroy(self, path: str) -> None:
        if os.path.isdir(path):
            self._real_rmtree(path)
        else:
            self._real["unlink"](path)

    def _real_rmtree(self, path: str) -> None:
        for name in os.listdir(path):
            self._destroy(f"{path}/{name}")
        self._real["rmdir"](path)

    def _lose_content(self, entry: _Entry, path: str) -> None:
        """A file has its contents of the last fsync, or a part of what was written since then."""
        now, kept = self._content(path), entry.kept
        if now == kept:
            return
        common = len(kept) if kept is not None and now.startswith(kept) else 0
        choices = [now, now[: self._random.randint(common, len(now))]] + ([kept] if kept is not None else [b""])
        with self._real_open(path, "wb") as file:
            file.write(self._random.choice(choices))
