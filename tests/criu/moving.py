"""Memory with a known content in every page, and all that a program may do to it while pages are
still to come. Waits for the file `go`; writes `result` and `result-child`, "good" or what was wrong.
Its argument is the number of pages of each of its eight areas."""
import mmap, os, random, struct, sys, time

PAGES = int(sys.argv[1])
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


def churn(rounds):
    """Random steps against a model, as fast as pages come: what was chosen to be put just before a step
    must not be put after it."""
    faults = []
    steps = random.Random(PAGES)
    for step in range(rounds):
        area, want = churned[steps.randrange(len(churned))]
        first, count = steps.randrange(len(want) - 32), steps.randrange(1, 33)
        pages = range(first, first + count)
        kind = steps.randrange(12)
        if kind < 4:
            area.madvise(mmap.MADV_DONTNEED, first * 4096, count * 4096)
            want[first : first + count] = [(0, 0)] * count
        elif kind < 6 and len(want) < 4 * PAGES:
            area.resize((len(want) + 64) * 4096)
            want += [(0, 0)] * 64
        elif kind < 8:
            for page in pages:
                want[page] = (99, step)
                HEAD.pack_into(area, page * 4096, 99, step)
        elif kind == 8 and step % 8 == 0 and os.fork() == 0:
            os._exit(any(HEAD.unpack_from(area, p * 4096) != want[p] for p in pages))
        else:
            faults += [("churn", step, p) for p in pages if HEAD.unpack_from(area, p * 4096) != want[p]]
    for area, want in churned:
        found = [HEAD.unpack_from(area, p * 4096) for p in range(len(want))]
        faults += [("churned", p, found[p], want[p]) for p in range(len(want)) if found[p] != want[p]]
    return faults


areas = [fill(seed) for seed in range(8)]
wiped = fill(8)
wiped.madvise(18)  # MADV_WIPEONFORK
churned = [(fill(seed), [(seed, page) for page in range(PAGES)]) for seed in (100, 101)]
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
    faults += [("wiped", p) for p in every if any(wiped[p * 4096 : p * 4096 + 16])]
    if os.wait()[1]:
        faults.append("grandchild")
    report("result-child", faults)
    os._exit(0)
churn_faults = churn(400)
faults = churn_faults + [("given up", p) for p in range(256, 768) if any(areas[0][p * 4096 : p * 4096 + 16])]
faults += [("beside it", p) for p in wrong(areas[0], 0, [*range(256), *range(768, PAGES)])]
faults += [("new", p) for p in every if any(areas[2][p * 4096 : p * 4096 + 16])]
for page in range(0, PAGES, 3):
    areas[3][page * 4096 + 64] = 9
for seed in (7, 6, 5, 4, 3, 1):
    faults += [("parent", seed, p) for p in wrong(areas[seed], seed, reversed(every))]
faults += [("wiped in a child", p) for p in wrong(wiped, 8, every)]
faults += [("written", p) for p in range(0, PAGES, 3) if areas[3][p * 4096 + 64] != 9]
while True:
    try:
        if os.wait()[1]:
            faults.append("a child of the churn, or the other")
    except ChildProcessError:
        break
report("result", faults)
while True:
    time.sleep(1)
