# Keeps a number in System V shared memory, in a semaphore and in a message of a queue, and in POSIX shared memory; another
# process echoes it in both memories. Says after every few rounds that all are the same: "ok N", or what is wrong.
import ctypes
import mmap
import os
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
KEY, BYTES = 0x57A1, 1 << 20
IPC_CREAT, GETVAL, SETVAL, SEMVMX = 0o1000, 12, 16, 32767
libc.semctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Message(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_long), ("value", ctypes.c_long)]


def made(identifier):
    if identifier < 0:
        raise OSError(ctypes.get_errno(), "a System V object")
    return identifier


def attached():
    address = libc.shmat(made(libc.shmget(KEY, BYTES, IPC_CREAT | 0o600)), None, 0)
    return (ctypes.c_long * (BYTES // 8)).from_address(address)


def posix():
    fd = os.open("/dev/shm/sharing", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, BYTES)
    return memoryview(mmap.mmap(fd, BYTES)).cast("l")


semaphore = made(libc.semget(KEY, 1, IPC_CREAT | 0o600))
queue = made(libc.msgget(KEY, IPC_CREAT | 0o600))
if os.fork() == 0:
    pairs = attached(), posix()
    while True:
        for words in pairs:
            words[1] = words[0]
        time.sleep(0.001)

words, others = attached(), posix()
last = len(words) - 1
round = 0
while True:
    round += 1
    words[0] = words[last] = others[0] = others[last] = round
    made(libc.semctl(semaphore, 0, SETVAL, round % SEMVMX))
    message = Message(1, round)
    made(libc.msgsnd(queue, ctypes.byref(message), ctypes.sizeof(ctypes.c_long), 0))
    until = time.monotonic() + 5
    while not words[1] == others[1] == round and time.monotonic() < until:
        time.sleep(0.001)
    made(libc.msgrcv(queue, ctypes.byref(message), ctypes.sizeof(ctypes.c_long), 0, 0))
    found = [words[0], words[1], words[last], others[0], others[1], others[last], message.value]
    value = libc.semctl(semaphore, 0, GETVAL, 0)
    if found != [round] * 7 or value != round % SEMVMX:
        print(f"round {round}: {found}, {value}", flush=True)
    if round % 20 == 0:
        print(f"ok {round // 20}", flush=True)
