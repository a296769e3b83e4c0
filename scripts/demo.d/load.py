"""Clients that write and remember what they were told."""

import threading
import time

from lab import now_ms

WORKERS = 4
PAUSE_S = 0.004


class Writer(threading.Thread):
    """Counts in a closed loop, through reconnects, and records every acknowledgement.

    It writes through what `connect(index)` gives: something with `write()`, which returns the number that the server
    made by adding one to the last that it knew, and `close()`. `acks` holds (sent, received, number).
    """

    def __init__(self, connect, index):
        super().__init__(daemon=True)
        self.connect, self.index = connect, index
        self.acks = []
        self.reconnects = 0
        self.done = threading.Event()

    def run(self):
        connection = None
        while not self.done.is_set():
            try:
                if connection is None:
                    connection = self.connect(self.index)
                sent = now_ms()
                number = connection.write()
                self.acks.append((sent, now_ms(), number))
                time.sleep(PAUSE_S)
            except (OSError, RuntimeError):
                self.reconnects += 1
                if connection is not None:
                    connection.close()
                    connection = None
                time.sleep(PAUSE_S)
        if connection is not None:
            connection.close()

    def first_reply_after(self, when):
        return next((received for _, received, _ in list(self.acks) if received > when), None)

    def rolled_back(self, before=float("inf")):
        """Writes acknowledged before that time which the server later did not know of (it counted on from less)."""
        lost = 0
        for index, (_, _, number) in enumerate(self.acks[1:], 1):
            if number <= self.acks[index - 1][2]:
                lost += sum(1 for _, received, earlier in self.acks[:index]
                            if earlier >= number and received < before)
        return lost


class Load:
    """Some writers and, if the workload has one, what else keeps it busy: something with `start`, `again`, `stop`."""

    def __init__(self, connect, background=None):
        self.background = background
        if background:
            background.start()
        self.writers = [Writer(connect, index) for index in range(WORKERS)]
        for writer in self.writers:
            writer.start()

    def again(self):
        """What waits for answers of a host that is gone gives up."""
        if self.background:
            self.background.again()

    def stop(self):
        for writer in self.writers:
            writer.done.set()
        for writer in self.writers:
            writer.join()
        if self.background:
            self.background.stop()

    def acked(self):
        return sum(len(writer.acks) for writer in self.writers)

    def reconnects(self):
        return sum(writer.reconnects for writer in self.writers)

    def rolled_back(self, before=float("inf")):
        return sum(writer.rolled_back(before) for writer in self.writers)

    def first_reply_after(self, when):
        replies = [writer.first_reply_after(when) for writer in self.writers]
        replies = [reply for reply in replies if reply is not None]
        return min(replies) if replies else None

    def all_answered_after(self, when):
        return all(writer.first_reply_after(when) is not None for writer in self.writers)

    def longest_gap(self, since):
        """The longest time without any reply to anybody, milliseconds."""
        times = sorted(received for writer in self.writers for _, received, _ in writer.acks if received >= since)
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)
