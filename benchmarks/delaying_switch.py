"""A switch between the pretended machines of slow_link.sh that delays frames.

Usage: delaying_switch.py MILLISECONDS, in the network namespace of the switch. Each
interface named machine... or uplink is a port. Kernels without netem have no other
way to delay; at a gigabit per second it takes a good part of a core.
"""

import collections
import contextlib
import ctypes
import select
import signal
import socket
import sys
import time

_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
# The header of segmentation offload, which goes on with the frame, then addresses.
_VNET_HEADER, _ADDRESS = 10, 6
_PR_SET_PDEATHSIG = 1
_LOOK_FOR_PORTS = 0.05  # seconds
_SHORT = 0.002  # seconds


def main():
  """Forwards frames until the process that started it ends."""
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  delay = float(sys.argv[1]) / 1000
  ports = {}  # socket by name
  learned = {}  # socket by address
  in_flight = collections.deque()  # (due, frame, from)
  poll = select.poll()
  by_number = {}
  looked = 0.0
  while True:
    now = time.monotonic()
    if now - looked > _LOOK_FOR_PORTS:
      looked = now
      for _, name in socket.if_nameindex():
        if name not in ports and name.startswith(("machine", "uplink")):
          ports[name] = _port(name)
          by_number[ports[name].fileno()] = ports[name]
          poll.register(ports[name], select.POLLIN)
    wait = _LOOK_FOR_PORTS
    if in_flight:
      wait = min(wait, max(0.0, in_flight[0][0] - now))
    if wait < _SHORT:  # less than a poll can wait
      time.sleep(wait)
      wait = 0.0
    for number, _ in poll.poll(1000 * wait):
      source = by_number[number]
      for _ in range(64):
        try:
          frame, address = source.recvfrom(1 << 17)
        except (BlockingIOError, OSError):
          break
        if address[2] == socket.PACKET_OUTGOING:
          continue  # what this switch has sent
        in_flight.append((time.monotonic() + delay, frame, source))
    now = time.monotonic()
    while in_flight and in_flight[0][0] <= now:
      _, frame, source = in_flight.popleft()
      _forward(frame, source, ports, learned)


def _port(name):
  port = socket.socket(
    socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3)
  )
  port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
  port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
  port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26)
  port.bind((name, 0))
  return port


def _forward(frame, source, ports, learned):
  """Sends a frame to the port of its destination, or to all others."""
  at = _VNET_HEADER
  destination = frame[at : at + _ADDRESS]
  learned[frame[at + _ADDRESS : at + 2 * _ADDRESS]] = source
  port = learned.get(destination)
  for each in [port] if port else ports.values():
    if each is source:
      continue
    # Where the queue is full the frame is lost, as in a switch.
    with contextlib.suppress(OSError):
      each.send(frame)


if __name__ == "__main__":
  main()
