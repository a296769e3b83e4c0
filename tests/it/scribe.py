# Changes the files of a directory in every way that files can be changed, keeps in memory what they must be, and says
# after every few changes whether they are: "ok N", or what is wrong.
import mmap
import os
import random
import sys
import time

base = sys.argv[1]
rng = random.Random(7)
names = {}  # name -> content; two hard links share one bytearray
links = {}  # symbolic link -> text
DIRS = ["d0", "d1", "d2"]
FILES_MAX, BYTES_MAX = 40, 300_000


def at(name):
    return os.path.join(base, name)


def held(name, size):
    """A file of which only a descriptor and, with `other`, another name are left."""
    content = rng.randbytes(size)
    fd = os.open(at(name), os.O_RDWR | os.O_CREAT)
    os.write(fd, content)
    return fd, bytearray(content)


def child():
    # In a second process: an open file that has lost the name by which it was opened, and kept another.
    fd, content = held("child", 5000)
    os.link(at("child"), at("child-kept"))
    os.unlink(at("child"))
    os.write(ready, b"x")
    while True:
        if os.pread(fd, 9999, 0) != content:
            print("the child's file differs", flush=True)
        time.sleep(0.01)


def fresh():
    return f"{rng.choice(DIRS)}/f{rng.randrange(10**6)}"


def create():
    if len(names) < FILES_MAX:
        name, content = fresh(), rng.randbytes(rng.randrange(70_000))
        with open(at(name), "wb") as file:
            file.write(content)
        names[name] = bytearray(content)


def write():
    name = rng.choice(list(names))
    offset, content = rng.randrange(BYTES_MAX), rng.randbytes(rng.randrange(1, 9000))
    with open(at(name), "r+b") as file:
        file.seek(offset)
        file.write(content)
    data = names[name]
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(content)] = content


def cut():
    name, size = rng.choice(list(names)), rng.randrange(BYTES_MAX)
    os.truncate(at(name), size)
    data = names[name]
    data.extend(bytes(max(0, size - len(data))))
    del data[size:]


def rename():
    old = rng.choice(list(names))
    new = rng.choice([fresh(), rng.choice(list(names))])
    os.rename(at(old), at(new))
    # Of two names of one file neither goes.
    if names.get(new) is not names[old]:
        names[new] = names.pop(old)


def unlink():
    if len(names) > 5:
        name = rng.choice(list(names))
        os.unlink(at(name))
        del names[name]


def link():
    if len(names) < FILES_MAX:
        old, new = rng.choice(list(names)), fresh()
        os.link(at(old), at(new))
        names[new] = names[old]


def symlink():
    if len(links) > 5:
        old = rng.choice(list(links))
        os.unlink(at(old))
        del links[old]
    name, text = fresh(), str(rng.random())
    os.symlink(text, at(name))
    links[name] = text


def swap_directories():
    one, two = rng.sample(DIRS, 2)
    os.rename(at(one), at("swap"))
    os.rename(at(two), at(one))
    os.rename(at("swap"), at(two))
    for kept in (names, links):
        turned = {}
        for name, value in kept.items():
            dir, rest = name.split("/") if "/" in name else ("", name)
            dir = {one: two, two: one}.get(dir, dir)
            turned[f"{dir}/{rest}" if dir else rest] = value
        kept.clear()
        kept.update(turned)


def append():
    content = rng.randbytes(rng.randrange(1, 3000))
    os.write(log, content)
    names["log"].extend(content)
    if len(names["log"]) > 500_000:
        os.ftruncate(log, 0)
        names["log"].clear()


def store():
    # Through a mapping: no system call, no time stamp.
    offset, content = rng.randrange(60_000), rng.randbytes(16)
    mapping[offset : offset + 16] = content
    names["mapped"][offset : offset + 16] = content


def scribble():
    offset, content = rng.randrange(20_000), rng.randbytes(50)
    os.pwrite(ghost, content, offset)
    ghost_content[offset : offset + 50] = content


def look():
    found, links_found, inodes = {}, {}, {}
    for dir, _, entries in os.walk(base):
        for entry in entries:
            path = os.path.join(dir, entry)
            name = os.path.relpath(path, base)
            if os.path.islink(path):
                links_found[name] = os.readlink(path)
                continue
            with open(path, "rb") as file:
                found[name] = file.read()
            inodes[name] = os.stat(path).st_ino
    return found, links_found, inodes


def check():
    # Inode numbers are a host's own: those of two hosts cannot be compared.
    host = None
    while host != os.stat(base).st_ino:
        host = os.stat(base).st_ino
        found, links_found, inodes = look()
    for name in sorted(names.keys() | found.keys()):
        if names.get(name) != found.get(name):
            sizes = [None if x is None else len(x) for x in (names.get(name), found.get(name))]
            yield f"{name}: {sizes[0]} bytes expected, {sizes[1]} found"
    if links != links_found:
        yield f"symbolic links: {links} expected, {links_found} found"
    for one in names:
        for two in names:
            if one in inodes and two in inodes:
                if (names[one] is names[two]) != (inodes[one] == inodes[two]):
                    yield f"{one} and {two}: hard links differ"
    if os.pread(ghost, 99_999, 0) != ghost_content:
        yield "the file without a name differs"


for dir in DIRS:
    os.mkdir(at(dir))
wait, ready = os.pipe()
if os.fork() == 0:
    child()
os.read(wait, 1)
with open(at("child-kept"), "rb") as file:
    child_kept = bytearray(file.read())
log = os.open(at("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with open(at("mapped"), "w+b") as file:
    file.write(bytes(65536))
    file.flush()
    mapping = mmap.mmap(file.fileno(), 65536)
ghost, ghost_content = held("ghost", 30_000)
os.unlink(at("ghost"))
FIXED = {"log": bytearray(), "mapped": bytearray(65536), "child-kept": child_kept}

OPERATIONS = [create, write, cut, rename, unlink, link, symlink, swap_directories]
for _ in range(10):
    create()
names.update(FIXED)
checks = 0
while True:
    for _ in range(20):
        operation = rng.choice(OPERATIONS)
        # These keep their names.
        others = {name: names.pop(name) for name in FIXED if name in names}
        operation()
        names.update(others)
        append()
        store()
        scribble()
        time.sleep(0.002)
    for wrong in check():
        print(wrong, flush=True)
    checks += 1
    print("ok", checks, flush=True)
