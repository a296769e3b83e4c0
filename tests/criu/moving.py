"""Memory with a known content in every page, and all that a program may do to it while pages are
still to come. Waits for the file `go`; writes `result` and `result-child`, "good" or what was wrong."""
import mmap, os, struct, sys, time

PAGES = 1024
HEAD = struct.Struct("<QQ")


def fill(seed):
    area = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(PAGES):
        HEAD.pack_into(area, page * 4096, seed, page)
    return area


def wrong(area, seed, pages):
    return [p for p in pages if HEAD.unpack_from(area, p * 4096) != (seed, p)]


def report(name, faults):
    with open(name + ".new", "w") as file:
        file.write("good" if not faults else repr(faults)[:2000])
    os.rename(name + ".new", name)


areas = [fill(seed) for seed in range(8)]
every = range(PAGES)
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.001)

areas[0].madvise(mmap.MADV_DONTNEED, 256 * 4096, 512 * 4096)
areas[1].resize(3 * PAGES * 4096)
areas[2].close()
areas[2] = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
areas[3][64] = 9
if os.fork() == 0:
    if os.fork() == 0:
        os._exit(wrong(areas[4], 4, range(0, 64)) != [])
    faults = [("child", seed, p) for seed in (1, 3, 4, 5, 6, 7) for p in wrong(areas[seed], seed, every)]
    if os.wait()[1]:
        faults.append("grandchild")
    report("result-child", faults)
    os._exit(0)
faults = [("given up", p) for p in range(256, 768) if any(areas[0][p * 4096 : p * 4096 + 16])]
faults += [("beside it", p) for p in wrong(areas[0], 0, [*range(256), *range(768, PAGES)])]
faults += [("new", p) for p in every if any(areas[2][p * 4096 : p * 4096 + 16])]
for page in range(0, PAGES, 3):
    areas[3][page * 4096 + 64] = 9
for seed in (7, 6, 5, 4, 3, 1):
    faults += [("parent", seed, p) for p in wrong(areas[seed], seed, reversed(every))]
faults += [("written", p) for p in range(0, PAGES, 3) if areas[3][p * 4096 + 64] != 9]
os.wait()
report("result", faults)
while True:
    time.sleep(1)
