"""A workload that has sockets of every kind, and says what it sees of them.

Each line that comes by TCP is an order; what it answers shows that nothing of it was lost, or happened twice.
"""

import os
import select
import socket
import struct
import sys
import threading
import time

CLIENT = sys.argv[1], 7100


def child(sock, wake):
    """Counts what comes through a Unix socket, or wakes it by an eventfd; waits for both by epoll."""
    poll, count, woken = select.epoll(), 0, 0
    poll.register(sock.fileno(), select.EPOLLIN)
    poll.register(wake, select.EPOLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake:
                woken += struct.unpack("=Q", os.read(wake, 8))[0]
            else:
                sock.recv(1)
                count += 1
                sock.sendall(b"%d %d\n" % (count, woken))


def datagrams():
    sock, count = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0
    sock.bind(("0.0.0.0", 7001))
    while True:
        said, peer = sock.recvfrom(1000)
        count += 1
        sock.sendto(b"%d %s" % (count, said), peer)


class Outward:
    """A connection that the workload has opened itself."""

    def __init__(self):
        self.lock, self.file, self.count = threading.Lock(), None, 0

    def ask(self):
        with self.lock:
            if not self.file:
                self.file = socket.create_connection(CLIENT).makefile("rw", newline="\n")
            self.count += 1
            self.file.write("%d\n" % self.count)
            self.file.flush()
            return self.file.readline().strip()


def serve(sock, inner, wake, outward):
    lines = sock.makefile("r", newline="\n")
    for line in lines:
        order, _, text = line.strip().partition(" ")
        if order == "echo":
            sock.sendall(text.encode() + b"\n")
        elif order == "set":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
            sock.sendall(b"set\n")
        elif order == "get":
            sock.sendall(b"%d %d %d\n" % (
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)))
        elif order == "cork":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            sock.sendall(text.encode())
        elif order == "uncork":
            sock.sendall(text.encode() + b"\n")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        elif order == "inner":
            os.write(wake, struct.pack("=Q", 1))
            inner.sendall(b"x")
            sock.sendall(inner.makefile("rb").readline())
        elif order == "outward":
            sock.sendall(outward.ask().encode() + b"\n")
        elif order == "bye":
            # This end closes first: it is the one that waits (TIME_WAIT).
            sock.close()
            return
    # The other end has nothing more to say, and goes on listening.
    number = 0
    while True:
        number += 1
        sock.sendall(b"%d\n" % number)
        time.sleep(0.02)


def guarded(*arguments):
    try:
        serve(*arguments)
    except OSError:
        pass


inner, sock = socket.socketpair()
wake = os.eventfd(0, 0)
if not os.fork():
    child(sock, wake)
listener = socket.create_server(("0.0.0.0", 7000))
threading.Thread(target=datagrams, daemon=True).start()
outward = Outward()
while True:
    threading.Thread(target=guarded, args=(listener.accept()[0], inner, wake, outward), daemon=True).start()
