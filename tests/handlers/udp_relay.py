"""A program, no handler: a UDP relay that loses a fifth of the packets each way, repeats some and delays some.

`udp_relay.py PORT SEED` prints its own port, and relays between its clients and 127.0.0.1:PORT until its input is
closed.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from collections.abc import Callable

LOST, REPEATED, REORDERED = 0.2, 0.05, 0.1
_BUFFER = 1 << 22


def udp() -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.setblocking(False)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return found


class Relay:
    """One socket for the clients, and one towards the server for each of them."""

    def __init__(self, port: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.server = ("127.0.0.1", port)
        self.front = udp()
        self.front.bind(("127.0.0.1", 0))
        self.loop.add_reader(self.front, self.from_clients)
        self.backs: dict[object, socket.socket] = {}

    def from_clients(self) -> None:
        for _ in range(64):
            try:
                data, client = self.front.recvfrom(2048)
            except BlockingIOError:
                return
            if client not in self.backs:
                back = self.backs[client] = udp()
                back.connect(self.server)
                self.loop.add_reader(back, self.from_server, back, client)
            self.pass_on(self.backs[client].send, data)

    def from_server(self, back: socket.socket, client: tuple[str, int]) -> None:
        for _ in range(64):
            try:
                data = back.recv(2048)
            except BlockingIOError:
                return
            self.pass_on(lambda packet: self.front.sendto(packet, client), data)

    def pass_on(self, send: Callable[[bytes], object], data: bytes) -> None:
        if self.random.random() < LOST:
            return
        for _ in range(2 if self.random.random() < REPEATED else 1):
            if self.random.random() < REORDERED:
                self.loop.call_later(self.random.uniform(0.001, 0.02), self.send, send, data)
            else:
                self.send(send, data)

    def send(self, send: Callable[[bytes], object], data: bytes) -> None:
        try:
            send(data)
        except OSError:  # a full buffer, or a client that has gone: lost as well
            return


async def main() -> None:
    relay = Relay(int(sys.argv[1]), int(sys.argv[2]))
    print(relay.front.getsockname()[1], flush=True)
    await relay.loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
