"""Runs a command in a terminal of its own, as a person would: terminal.py STEPS COMMAND...

STEPS is a JSON list of ["wait", text], ["send", keys], ["interrupt"] and ["size", columns, rows]. Prints a line of JSON:
the exit code, the screen at the end, and every screen that differed from the one before.
"""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

import pyte

PATIENCE = 60
steps, command = json.loads(sys.argv[1]), sys.argv[2:]
columns, rows = 80, 24
screen = pyte.HistoryScreen(columns, rows, history=1000)
stream = pyte.ByteStream(screen)

child, terminal = pty.fork()
if child == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.execvp(command[0], command)

started = time.monotonic()
raw, screens, open_ = b"", [], True


def display():
    return [line.rstrip() for line in screen.display]


def read(seconds):
    """Takes what the command writes within so many seconds."""
    global raw, open_
    if not open_ or not select.select([terminal], [], [], seconds)[0]:
        return
    try:
        written = os.read(terminal, 1 << 16)
    except OSError:
        # The other side is closed.
        written = b""
    if not written:
        open_ = False
        return
    raw += written
    stream.feed(written)
    if not screens or screens[-1] != display():
        screens.append(display())


def wait(text):
    while not any(text in line for line in display()):
        if not open_ or time.monotonic() - started > PATIENCE:
            sys.exit(f"{text!r} does not come: {json.dumps(display(), ensure_ascii=False)}")
        read(0.1)


for step in steps:
    match step:
        case ["wait", text]:
            wait(text)
        case ["send", keys]:
            os.write(terminal, keys.encode())
        case ["interrupt"]:
            os.kill(child, signal.SIGINT)
        case ["size", columns, rows]:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            screen.resize(rows, columns)
        case _:
            sys.exit(f"no step: {step}")
while open_:
    if time.monotonic() - started > PATIENCE:
        os.kill(child, signal.SIGKILL)
        sys.exit(f"the command does not end: {json.dumps(display(), ensure_ascii=False)}")
    read(0.1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
report = {"code": code, "screen": display(), "screens": screens, "cursor": not screen.cursor.hidden}
report["raw"] = raw.decode(errors="replace")
print(json.dumps(report))
